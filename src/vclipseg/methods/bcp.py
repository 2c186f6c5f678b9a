"""BCP, Bidirectional Copy-Paste (Bai et al., CVPR 2023; https://arxiv.org/abs/2305.00673).

    L = l(z_in, y_a; M) + l(z_out, y_b; 1-M)              labels
      + w_u * [l(z_in, q_a; 1-M) + l(z_out, q_b; M)]      pseudo-labels
    l = [CE + Dice] / 2 over the voxels of the mask

z_in and z_out are the network's outputs for a labeled patch with a box of an unlabeled one in it and for
an unlabeled patch with a box of a labeled one: M x_a + (1-M) u_a and M u_b + (1-M) x_b, where M is 0 in
the box. An averaged teacher makes q, of which each class keeps its largest connected component. While
the run warms up both patches are labeled: stage 1, L = l(z, y; 1) with M x_a + (1-M) x_b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.labeling import largest_components
from vclipseg.losses import IGNORE, cross_entropy, most_likely, patch_dice_loss
from vclipseg.methods.base import Ema, Loss, Method, MethodSettings, Task, Term
from vclipseg.mixing import random_box
from vclipseg.networks.vnet import VNet


class BCPSettings(MethodSettings):
    """Settings of BCP; its first stage is the warm-up."""

    name: Literal["bcp"] = "bcp"
    box: Annotated[float, Field(gt=0, lt=1)] = 2 / 3
    """Side of the pasted box, as a share of the patch."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_u of pseudo-labels; that of labels is 1."""
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the teacher keeps each step of the second stage."""
    largest_component: bool = True
    """Keep the largest connected component of each class of a pseudo-label, over 26 neighbors."""
    passes: Literal["apart", "joint"] = "apart"
    """Each direction is a forward pass of its own, as published, which with two patches of a kind leaves
    one to normalize by; or both are one."""

    @field_validator("patches")
    @classmethod
    def _pairs(cls, patches: tuple[int, int]) -> tuple[int, int]:
        if patches[0] != patches[1] or patches[0] % 2:
            raise ValueError(
                "BCP mixes as many labeled as unlabeled patches, an even number of each"
            )
        return patches


class BCP(Method):
    """A V-Net on mixed patches, and its averaged teacher."""

    Settings = BCPSettings
    settings: BCPSettings
    published_steps: ClassVar[int] = 17_000
    training_only: ClassVar[tuple[str, ...]] = ("teacher.",)

    def __init__(self, settings: BCPSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.network = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)
        self.teacher = Ema(self.network, s.teacher_decay)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Labels and pseudo-labels; `facts` say which share of voxels the latter call foreground."""
        shape = batch.labels.shape[1:]
        box = random_box(tuple(shape), self.settings.box, batch.common, batch.labels.device)
        images_a, images_b = batch.labeled_images.chunk(2)
        labels_a, labels_b = batch.labels.chunk(2)
        if batch.num_labeled == len(batch.images):
            logits = self.network(images_a.where(~box, images_b))
            return Loss(supervised=Term(1.0, compare(logits, labels_a.where(~box, labels_b))))
        unlabeled_a, unlabeled_b = batch.unlabeled_images.chunk(2)
        pseudo_a, pseudo_b = self.halves(self.pseudo_labels, *batch.split(batch.plain)[1].chunk(2))
        mixed = images_a.where(~box, unlabeled_a), unlabeled_b.where(~box, images_b)
        inward, outward = self.halves(self.network, *mixed)
        known = within(inward, labels_a, ~box) + within(outward, labels_b, box)
        guessed = within(inward, pseudo_a, box) + within(outward, pseudo_b, ~box)
        return Loss(
            facts={"pseudo_foreground": (torch.cat([pseudo_a, pseudo_b]) > 0).float().mean()},
            supervised=Term(1.0, known),
            unlabeled=Term(self.settings.unlabeled_weight, guessed),
        )

    def halves(
        self, function: Callable[[Tensor], Tensor], first: Tensor, second: Tensor
    ) -> Sequence[Tensor]:
        """`function` of two halves of a step's patches, each for itself or both at once."""
        if self.settings.passes == "joint":
            return function(torch.cat([first, second])).chunk(2)
        return function(first), function(second)

    def pseudo_labels(self, images: Tensor) -> Tensor:
        """The teacher's labels (N, X, Y, Z) of images (N, C, X, Y, Z)."""
        labels = most_likely(self.teacher(images))
        return largest_components(labels) if self.settings.largest_component else labels

    def before_step(self, step: int) -> None:
        """At the start of the second stage the teacher is the student."""
        if step == self.warmup_steps:
            self.teacher.copy_from(self.network)

    def after_step(self, step: int) -> None:
        """The teacher follows, always at the same rate."""
        if step >= self.warmup_steps:
            self.teacher.update(self.network, ALWAYS)

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The teacher begins as the network."""
        taken = super().start_from(weights)
        self.teacher.copy_from(self.network)
        return taken

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network(images).softmax(1)


ALWAYS = 10**9  # a step at which an average no longer warms up


def compare(logits: Tensor, labels: Tensor) -> Tensor:
    """Half cross-entropy, half Dice of each patch and class, over the voxels that have a label."""
    return 0.5 * (cross_entropy(logits, labels) + patch_dice_loss(logits.softmax(1), labels))


def within(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """`compare` inside a mask (X, Y, Z)."""
    return compare(logits, labels.where(mask, IGNORE))


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {
        "method": {"dropout": 0.0, "patches": (4, 4), "warmup": 0.4, "passes": "joint"},
        "train": {},
    },
    "faithful": {
        "method": {"patches": (4, 4), "warmup": 2_000 / 17_000},
        "train": {
            "optimizer": "sgd",
            "lr": 0.01,
            "lr_power": 0.0,
            "lr_drop_every": 4_500 / 17_000,
            "weights": "last",
        },
    },
}
