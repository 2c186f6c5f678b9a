"""UA-MT, the uncertainty-aware Mean Teacher (Yu et al., MICCAI 2019; https://arxiv.org/abs/1907.07034).

    L = w_d * L_dice(p, y) + w_c * CE(p, y)                           supervised
      + w_u(t) * sum_v m_v sum_k (p_vk - q_vk)^2 / (K sum_v m_v)      consistency where it is certain
    m_v = [H_v < h(t)],   h(t) = (h_0 + (1 - h_0) ramp(t)) * ln K
    H_v = -sum_k r_vk ln r_vk,   r = mean_i teacher_i(x + n_i)

p are the student's probabilities and q the teacher's, as in Mean Teacher. r is the mean of T passes of
the teacher, each with its own noise and dropout, and H its entropy in nats: the student follows the
teacher only where H is low, and ever more voxels count.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vclipseg.losses import sigmoid_rampup
from vclipseg.methods.base import Task
from vclipseg.methods.mean_teacher import SGD, Facts, MeanTeacher, MeanTeacherSettings
from vclipseg.ranks import across


class UAMTSettings(MeanTeacherSettings):
    """Settings of UA-MT; steps are those of a run of 6,000 and scale with the run's length."""

    name: Literal["ua_mt"] = "ua_mt"  # type: ignore[assignment]
    passes: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    """Passes T of the teacher that its uncertainty is measured with; an even number."""
    teacher_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """`dropout` of the teacher, where it is another than the student's."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share h_0 of the highest possible entropy below which a voxel counts at the first step."""
    threshold_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until every voxel counts."""


class UAMT(MeanTeacher):
    """A Mean Teacher that is followed where it is certain."""

    Settings = UAMTSettings
    settings: UAMTSettings

    def __init__(self, settings: UAMTSettings, task: Task) -> None:
        super().__init__(settings, task)
        if settings.teacher_dropout is not None:
            for module in self.teacher.modules():
                if isinstance(module, nn.Dropout3d):
                    module.p = settings.teacher_dropout

    def inconsistency(self, probs: Tensor, images: Tensor, step: int) -> tuple[Tensor, Facts]:
        """Mean squared difference over the certain voxels, 0 where none is; and their share."""
        target = self.teach(images)
        certain = (self.entropy(images) < self.limit(step, probs.shape[1])).float()
        gap = across((certain[:, None] * (probs - target).square()).sum())
        counted = probs.shape[1] * across(certain.sum())
        return gap / (counted + 1e-16), {"certain_share": certain.mean()}

    def entropy(self, images: Tensor) -> Tensor:
        """H (U, X, Y, Z) of the teacher's mean over all passes, two of them at a time."""
        pairs = images.repeat(2, 1, 1, 1, 1)
        mean = torch.zeros(())
        for _ in range(self.settings.passes // 2):
            mean = mean + self.teach(pairs).unflatten(0, (2, -1)).sum(0) / self.settings.passes
        return -(mean * (mean + 1e-6).log()).sum(1)

    def limit(self, step: int, num_classes: int) -> float:
        """The entropy h(t) below which a voxel counts."""
        s = self.settings
        ramp = sigmoid_rampup(step, s.threshold_steps * self.scale)
        return (s.threshold + (1 - s.threshold) * ramp) * math.log(num_classes)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0, "teacher_dropout": 0.1, "warmup": 0.4}, "train": {}},
    "faithful": {"method": {"dice": "squared"}, "train": SGD},
}
