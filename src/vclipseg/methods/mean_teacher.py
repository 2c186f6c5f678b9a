"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017; https://arxiv.org/abs/1703.01780).

    L = w_d * L_dice(p, y) + w_c * CE(p, y)      supervised, labeled patches
      + w_u(t) * mean_v,k (p_vk - q_vk)^2        consistency, unlabeled patches
    q = teacher(x + n),   n = clamp(N(0, s^2), -c, c)
    teacher <- a * teacher + (1 - a) * student,  a = min(1 - 1/(t + 1), decay)

p are the student's probabilities and q the teacher's, both of the same patch x. The teacher is never
trained: it is the running average of the student, with batch statistics and dropout as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.losses import DiceForm, cross_entropy, dice_loss, sigmoid_rampup
from vclipseg.methods.base import Ema, Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.vnet import VNet

Facts = dict[str, float | Tensor]


class MeanTeacherSettings(MethodSettings):
    """Settings of Mean Teacher; steps are those of a run of 6,000 and scale with the run's length."""

    name: Literal["mean_teacher"] = "mean_teacher"
    dice: DiceForm = "linear"
    """Form of the Dice loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_d of the Dice loss."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_c of the cross-entropy."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight w_u of the consistency once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until the consistency has its full weight."""
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the teacher keeps of itself each step."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation s of the noise on what the teacher sees."""
    noise_limit: Annotated[float, Field(ge=0)] = 0.2
    """The noise is clamped to +-c."""
    predict_with: Literal["student", "teacher"] = "student"
    """The trained network, as published, or its average."""


class MeanTeacher(Method):
    """A student V-Net that agrees with its own running average."""

    Settings: ClassVar[type[MeanTeacherSettings]] = MeanTeacherSettings
    settings: MeanTeacherSettings
    published_steps: ClassVar[int] = 6_000

    def __init__(self, settings: MeanTeacherSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.network = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)
        self.teacher = Ema(self.network, s.teacher_decay)

    @property
    def training_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """Whichever network does not predict."""
        return ("teacher.",) if self.settings.predict_with == "student" else ("network.",)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Supervision of the labeled patches, consistency on the unlabeled ones."""
        s = self.settings
        logits, unlabeled_logits = batch.split(self.network(batch.images))
        _, unlabeled_images = batch.split(batch.plain)
        probs = unlabeled_logits.softmax(1)
        gap, facts = probs.sum(), Facts()  # of no patch: 0, with a gradient
        if len(probs):
            gap, facts = self.inconsistency(probs, unlabeled_images, step)
        weight = s.unlabeled_weight * sigmoid_rampup(step, s.rampup_steps * self.scale)
        return Loss(
            facts,
            dice=Term(s.dice_weight, dice_loss(logits.softmax(1), batch.labels, s.dice)),
            ce=Term(s.ce_weight, cross_entropy(logits, batch.labels)),
            consistency=Term(weight, gap),
        )

    def inconsistency(self, probs: Tensor, images: Tensor, step: int) -> tuple[Tensor, Facts]:
        """How far the student's probs (U, K, X, Y, Z) are from the teacher's of the same images."""
        return F.mse_loss(probs, self.teach(images)), {}

    def teach(self, images: Tensor) -> Tensor:
        """The teacher's probabilities (B, K, X, Y, Z) of images (B, C, X, Y, Z) with fresh noise."""
        s = self.settings
        noise = (s.noise * torch.randn_like(images)).clamp(-s.noise_limit, s.noise_limit)
        return self.teacher(images + noise).softmax(1)

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The teacher begins as the student."""
        taken = super().start_from(weights)
        self.teacher.copy_from(self.network)
        return taken

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        network = self.network if self.settings.predict_with == "student" else self.teacher
        return network(images).softmax(1)

    def after_step(self, step: int) -> None:
        """The teacher follows."""
        self.teacher.update(self.network, step)


SGD = {
    "optimizer": "sgd",
    "lr": 0.01,
    "lr_power": 0.0,
    "lr_drop_every": 2_500 / 6_000,
    "weights": "last",
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0, "warmup": 0.4}, "train": {}},
    "faithful": {"method": {"dice": "squared"}, "train": SGD},
}
