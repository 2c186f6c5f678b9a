"""CPS, cross pseudo supervision (Chen et al., CVPR 2021; https://arxiv.org/abs/2106.01226).

    L = sum_i [w_d * L_dice(p_i, y) + w_c * CE(p_i, y)] + w_u(t) * U
    U = sum_{i != j} CE(p_i, argmax p_j)            cross pseudo-labels, or
    U = sum_i [CE(p_i, Y) + L_dice(p_i, Y)]         dynamic labeling (DLB) with
        Y = argmax sum_i w_i p_i,  w = softmax(1 - sigmoid(L_dice(p_i, y)))

p_1 and p_2 are the probabilities of two networks of one architecture that share nothing but the data.
DLB is VCLIPSeg's (Li et al., MICCAI 2024); its paper adds it to CPS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vclipseg.data.batch import Batch
from vclipseg.labeling import fuse
from vclipseg.losses import (
    IGNORE,
    DiceForm,
    add,
    cross_entropy,
    dice_loss,
    most_likely,
    sigmoid_rampup,
)
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.vnet import VNet


class CPSSettings(MethodSettings):
    """Settings of CPS; steps are those of a run of 15,000 and scale with the run's length."""

    name: Literal["cps"] = "cps"
    initialization: Literal["default", "kaiming_xavier"] = "default"
    """Both networks as PyTorch has it, or the first Kaiming-normal and the second Xavier-normal."""
    dice: DiceForm = "linear"
    """Form of every Dice loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_d of the supervised Dice losses."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight w_c of the supervised cross-entropies."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight w_u of the pseudo-labels once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until pseudo-labels have their full weight; 0: from the start."""
    apply_to: Literal["all", "unlabeled"] = "all"
    """Patches that pseudo-labels supervise."""
    dlb: bool = False
    """Dynamic labeling: one pseudo-label of both networks for both."""
    dlb_weighting: Literal["dynamic", "equal", "voxel_entropy"] = "dynamic"
    """How networks count in that pseudo-label: by their Dice loss, alike, or voxel by voxel."""
    predict_with: Literal["first", "mean"] = "first"
    """The first network, as published, or the mean of both."""


class CPS(Method):
    """Two V-Nets that label for each other."""

    Settings = CPSSettings
    settings: CPSSettings

    def __init__(self, settings: CPSSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.first = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)
        self.second = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)
        if s.initialization == "kaiming_xavier":
            initialize(self.first, nn.init.kaiming_normal_)
            initialize(self.second, nn.init.xavier_normal_)

    @property
    def training_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The second network, unless it predicts too."""
        return ("second.",) if self.settings.predict_with == "first" else ()

    def loss(self, batch: Batch, step: int) -> Loss:
        """Supervision of both networks, and what they learn from pseudo-labels."""
        s = self.settings
        logits = [self.first(batch.images), self.second(batch.images)]
        probs = [z.softmax(1) for z in logits]
        labeled, labels = slice(batch.num_labeled), batch.labels
        dices = torch.stack([dice_loss(p[labeled], labels, s.dice) for p in probs])
        ce = add(cross_entropy(z[labeled], labels) for z in logits)
        loss = Loss(dice=Term(s.dice_weight, dices.sum()), ce=Term(s.ce_weight, ce))
        followed = self.follow(logits, probs, self.pseudo_labels(probs, dices, batch.num_labeled))
        weight = s.unlabeled_weight * sigmoid_rampup(step, s.rampup_steps * self.scale)
        loss["dlb" if s.dlb else "cross"] = Term(weight, followed)
        return loss

    @torch.no_grad()
    def pseudo_labels(self, probs: list[Tensor], dices: Tensor, num_labeled: int) -> list[Tensor]:
        """What the first and the second network learn from, (B, X, Y, Z) each."""
        s = self.settings
        first, second = (most_likely(p) for p in probs)
        found = [second, first]
        if s.dlb:
            found = [most_likely(fuse(probs, dices, s.dlb_weighting))] * 2
        if s.apply_to == "unlabeled":
            for labels in found:
                labels[:num_labeled] = IGNORE
        return found

    def follow(
        self, logits: list[Tensor], probs: list[Tensor], pseudo_labels: list[Tensor]
    ) -> Tensor:
        """Cross-entropy, and with dynamic labeling Dice, of each network against its pseudo-label."""
        value = add(cross_entropy(z, y) for z, y in zip(logits, pseudo_labels, strict=True))
        if not self.settings.dlb:
            return value
        pairs = zip(probs, pseudo_labels, strict=True)
        return value + add(dice_loss(p, y, self.settings.dice) for p, y in pairs)

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        probs = self.first(images).softmax(1)
        if self.settings.predict_with == "first":
            return probs
        return (probs + self.second(images).softmax(1)) / 2

    def opinions(self, images: Tensor) -> list[Tensor]:
        """Of both networks, where the model has both."""
        if self.settings.predict_with == "first":
            return [self.predict(images)]
        return [self.first(images).softmax(1), self.second(images).softmax(1)]


def initialize(network: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Draw the weights of all convolutions anew; transposed ones and biases stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            draw(module.weight)


SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}
ROBUST: dict[str, Any] = {
    "dropout": 0.0,
    "ce_weight": 0.5,
    "unlabeled_weight": 0.5,
    "apply_to": "unlabeled",
    "warmup": 0.4,
    "predict_with": "mean",
}
SSL4MIS: dict[str, Any] = {
    "initialization": "kaiming_xavier",
    "dice": "multiclass",
    "ce_weight": 0.5,
    "unlabeled_weight": 0.1,
    "rampup_steps": 15_000,  # 30,000 of 30,000
    "apply_to": "unlabeled",
}
ORIGINAL: dict[str, Any] = {
    "dice_weight": 0.0,
    "ce_weight": 1.0,
    "unlabeled_weight": 1.5,
    "rampup_steps": 0,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": ROBUST, "train": {}},
    "faithful": {"method": {}, "train": SGD},
    "ssl4mis": {"method": SSL4MIS, "train": {**SGD, "lr_power": 0.9}},
    "original": {"method": ORIGINAL, "train": {**SGD, "lr": 0.005, "lr_power": 0.9}},
    "cps_dlb": {"method": {"dlb": True}, "train": SGD},
    "cps_dlb_robust": {"method": {**ROBUST, "dlb": True}, "train": {}},
}
