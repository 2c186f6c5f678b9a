"""CrossMatch (Zhao, Wang & Ding, IEEE JBHI 2024; https://arxiv.org/abs/2405.00354).

    L = [L_x + w_s (L_1 + L_2) + (1-eta) L_T + eta L_S] / 2
    L_x = [CE(z_x, y) + Dice(z_x, y)] / 2                                  labeled patches
    L_1 = D(z_1, Y_1),  L_2 = D(z_2, Y_2)                                  two strong views
    L_T = mean of D(z_w^-, Y), D(z_w^+, Y), D(z_2^-, Y_2), D(z_2^+, Y_2)   perturbed by clean
    L_S = mean of D(z_2^-, Y_2^-), D(z_2^+, Y_2^+)                         perturbed by perturbed

z_w, z_1 and z_2 are the network's outputs for the weak view and two strong ones of an unlabeled patch;
z^- and z^+ are decoded from feature maps of which whole channels are dropped, few and many. Y, Y^- and
Y^+ are the labels that z_w, z_w^- and z_w^+ give. D is the Dice loss over the voxels whose label is at
least tau(t) probable. A strong view holds, half of the time, a box of a donor, another unlabeled patch;
Y_1 and Y_2 hold the donor's labels there.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.losses import IGNORE, cross_entropy, dice_loss, sigmoid_rampup
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.mixing import maybe_boxes, paste
from vclipseg.networks.vnet import Decoder, VNet, pad_to_stride, unpad
from vclipseg.views import bias_field, gamma, gaussian_blur, sometimes

Share = Annotated[float, Field(ge=0, lt=1)]


class CrossMatchSettings(MethodSettings):
    """Settings of CrossMatch; steps are those of a run of 14,000 and scale with the run's length."""

    name: Literal["crossmatch"] = "crossmatch"
    donors: Literal["neighbor", "further"] = "neighbor"
    """What a box is cut from: the unlabeled patch before it in the step, or, as published, further ones:
    the second half of the unlabeled patches, which give boxes only."""
    strong_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight w_s of each strong view."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of L_S in the distillation; the rest is L_T."""
    feature_dropout: tuple[Share, Share] = (0.25, 0.75)
    """Share of the channels that the two perturbed outputs do without."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Confidence from which a label counts, at the start; it rises by up to 0.25."""
    threshold_rampup_steps: Annotated[int, Field(ge=0)] = 17_000
    """Steps until the threshold has risen."""
    tau: Literal["as_released", "no_ln2"] = "as_released"
    """The authors' code multiplies the threshold by ln 2 after the first step; or not."""
    box: Literal["fixed", "as_released"] = "fixed"
    """The authors' code exchanges the first and the third axis of a box when it is cut; or not."""

    @model_validator(mode="after")
    def _donors(self) -> CrossMatchSettings:
        if self.donors == "further" and self.patches[1] % 2:
            raise ValueError("with further donors the number of unlabeled patches must be even")
        return self


class CrossMatch(Method):
    """One V-Net that teaches its perturbed self."""

    Settings = CrossMatchSettings
    settings: CrossMatchSettings
    published_steps: ClassVar[int] = 14_000

    def __init__(self, settings: CrossMatchSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.network = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)

    def loss(self, batch: Batch, step: int) -> Loss:
        """The four terms; `facts` give tau and the share of voxels whose label counts."""
        s, images = self.settings, batch.labeled_images
        _, weak = batch.split(batch.plain)
        if not len(weak):
            logits, *_ = self.perturbed(images, images[:0])
            return Loss(supervised=Term(0.5, supervised(logits, batch.labels)))
        tau = self.threshold(step)
        u = weak.chunk(2)[0] if s.donors == "further" else weak
        z_x, z_w, *perturbed_w = self.perturbed(images, u)
        targets = [trusted(z, tau) for z in (z_w, *perturbed_w)]  # Y, Y^-, Y^+
        views = [strong_view(u, batch.generator) for _ in range(2)]
        donated, donors = self.donate(images, weak, views, targets, tau, batch.generator)
        boxes = [self.boxes(u, batch.generator) for _ in range(2)]
        z_1, z_2, *perturbed_2 = self.perturbed(*map(paste, views, donated, boxes))
        mixed_1 = paste(targets[0], donors[0], boxes[0])  # Y_1
        mixed_2 = [paste(y, d, boxes[1]) for y, d in zip(targets, donors, strict=True)]
        strong = follow([z_1, z_2], [mixed_1, mixed_2[0]])
        by_clean = follow([*perturbed_w, *perturbed_2], [targets[0]] * 2 + [mixed_2[0]] * 2)
        by_perturbed = follow(perturbed_2, mixed_2[1:])
        return Loss(
            facts={"tau": tau, "pseudo_share": (targets[0] != IGNORE).float().mean()},
            supervised=Term(0.5, supervised(z_x, batch.labels)),
            strong=Term(0.5 * s.strong_weight, strong.sum()),
            by_clean=Term(0.5 * (1 - s.eta), by_clean.mean()),
            by_perturbed=Term(0.5 * s.eta, by_perturbed.mean()),
        )

    def threshold(self, step: int) -> float:
        """The confidence tau from which a label counts."""
        s = self.settings
        ramp = sigmoid_rampup(step, s.threshold_rampup_steps * self.scale)
        if s.tau == "no_ln2":
            return s.threshold + 0.25 * ramp
        return (s.threshold + 0.25 * ramp) * math.log(2) if step else s.threshold

    def perturbed(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Logits of `first`, of `second`, and of `second` with few and with many channels dropped.

        Images are (N, C, X, Y, Z). The last convolution has no dropout of its own here.
        """
        both = torch.cat([first, second])
        maps = self.network.encoder(pad_to_stride(both))
        levels = [
            torch.cat(
                [m, *(F.dropout3d(m[len(first) :], p) for p in self.settings.feature_dropout)]
            )
            for m in maps
        ]
        decoder = self.network.decoders[0]
        assert isinstance(decoder, Decoder)
        logits = unpad(decoder.head(decoder.maps(levels)[-1]), both).float()
        return logits.split([len(first), *[len(second)] * 3])

    @torch.no_grad()
    def donate(
        self,
        labeled: Tensor,
        weak: Tensor,
        views: list[Tensor],
        targets: list[Tensor],
        tau: float,
        generator: torch.Generator | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What fills the boxes: two strong views of the donors, and their Y, Y^- and Y^+."""
        if self.settings.donors == "neighbor":
            return [v.roll(1, 0) for v in views], [y.roll(1, 0) for y in targets]
        v = weak.chunk(2)[1]
        _, _, *perturbed = self.perturbed(labeled, v)
        labels = [trusted(z, tau) for z in (self.network(v), *perturbed)]
        return [strong_view(v, generator) for _ in range(2)], labels

    def boxes(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Where the donors go, (N, X, Y, Z)."""
        reverse = self.settings.box == "as_released"
        boxes = maybe_boxes(len(images), images.shape[2:], generator, reverse)
        return boxes.to(images.device, non_blocking=True)

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network(images).softmax(1)


def strong_view(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Another bias field and gamma in 80% of the patches, blurred in 50%."""
    changed = gamma(bias_field(images, generator), generator)
    changed = sometimes(changed, images, 0.8, generator)
    return sometimes(gaussian_blur(changed, generator), changed, 0.5, generator)


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    """L_x."""
    return 0.5 * (cross_entropy(logits, labels) + dice_loss(logits.softmax(1), labels, "squared"))


def trusted(logits: Tensor, tau: float) -> Tensor:
    """The labels (N, X, Y, Z) that logits give, `IGNORE` where they are less than tau probable."""
    confidence, labels = logits.detach().softmax(1).max(1)
    return labels.where(confidence >= tau, IGNORE)


def follow(logits: list[Tensor], labels: list[Tensor]) -> Tensor:
    """D of each pair, (N,)."""
    pairs = zip(logits, labels, strict=True)
    return torch.stack([dice_loss(z.softmax(1), y, "squared") for z, y in pairs])


PUBLISHED: dict[str, Any] = {"donors": "further", "patches": (2, 4)}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "lr_horizon": 17_000 / 14_000, "weights": "last"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0, "warmup": 0.4}, "train": {}},
    "faithful": {"method": PUBLISHED, "train": ADAMW},
    "code": {"method": {**PUBLISHED, "box": "as_released"}, "train": ADAMW},
}
