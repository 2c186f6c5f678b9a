"""MC-Net (Wu et al., MICCAI 2021; https://arxiv.org/abs/2103.02911) and its successor MC-Net+.

    L = sum_i [w_d * L_dice(p_i, y) + w_c * CE(p_i, y)]         supervised, labeled patches
      + w_u(t) * sum_{i != j} mean_v,k (p_ivk - s(p_jvk))^2     mutual consistency, all patches
    s(p) = p^(1/T) / (p^(1/T) + (1 - p)^(1/T))                  sharpening

p_i are the probabilities of decoder i. All decoders read one encoder and differ in how they upsample:
transposed convolutions and trilinear in MC-Net, nearest neighbours besides in MC-Net+ (Wu et al.,
Medical Image Analysis 81:102530, 2022; https://doi.org/10.1016/j.media.2022.102530).
"""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.losses import (
    DiceForm,
    add,
    cross_entropy,
    dice_loss,
    sharpen,
    sigmoid_rampup,
)
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.vnet import MultiDecoderVNet, Upsampling

UPSAMPLINGS: tuple[Upsampling, ...] = ("transposed", "trilinear", "nearest")


class MCNetSettings(MethodSettings):
    """Settings of MC-Net; steps are those of a run of 15,000 and scale with the run's length."""

    name: Literal["mcnet"] = "mcnet"
    decoders: Literal[2, 3] = 2
    """Two in MC-Net, three in MC-Net+."""
    dice: DiceForm = "linear"
    """Form of the Dice loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_d of the Dice losses."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight w_c of the cross-entropies; the papers have none."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight w_u of the mutual consistency once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until the mutual consistency has its full weight."""
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Temperature T of the sharpening; 1 leaves two classes as they are."""
    detach_target: bool = False
    """Whether a decoder is a fixed target to the others; the authors' code lets gradients through."""
    predict_with: Literal["first", "mean"] = "first"
    """The first decoder, as published, or the mean of all."""


class MCNet(Method):
    """Decoders of one encoder that follow each other's sharpened output."""

    Settings = MCNetSettings
    settings: MCNetSettings

    def __init__(self, settings: MCNetSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        upsamplings = UPSAMPLINGS[: s.decoders]
        self.network = MultiDecoderVNet(
            task.in_channels, task.num_classes, upsamplings, s.filters, s.dropout
        )

    def loss(self, batch: Batch, step: int) -> Loss:
        """Supervision of every decoder, and their mutual consistency."""
        s = self.settings
        logits = self.network(batch.images)
        probs = [z.softmax(1) for z in logits]
        labeled, labels = slice(batch.num_labeled), batch.labels
        weight = s.unlabeled_weight * sigmoid_rampup(step, s.rampup_steps * self.scale)
        return Loss(
            dice=Term(s.dice_weight, add(dice_loss(p[labeled], labels, s.dice) for p in probs)),
            ce=Term(s.ce_weight, add(cross_entropy(z[labeled], labels) for z in logits)),
            mutual=Term(weight, self.disagreement(probs)),
        )

    def disagreement(self, probs: list[Tensor]) -> Tensor:
        """How far each decoder's (B, K, X, Y, Z) are from the sharpened ones of every other."""
        s = self.settings
        targets = [sharpen(p.detach() if s.detach_target else p, s.temperature) for p in probs]
        pairs = permutations(range(len(probs)), 2)
        return add(F.mse_loss(probs[i], targets[j]) for i, j in pairs)

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        s = self.settings
        return self.network.predict(images, s.decoders if s.predict_with == "mean" else 1)

    def opinions(self, images: Tensor) -> list[Tensor]:
        """Of every decoder."""
        return [z.softmax(1) for z in self.network(images)]


SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}
ROBUST: dict[str, Any] = {
    "dropout": 0.0,
    "ce_weight": 0.5,
    "warmup": 0.4,
    "predict_with": "mean",
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": ROBUST, "train": {}},
    "faithful": {"method": {}, "train": SGD},
    "plus": {"method": {"decoders": 3}, "train": SGD},
    "plus_robust": {"method": {**ROBUST, "decoders": 3}, "train": {}},
}
