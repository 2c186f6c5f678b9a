"""The supervised baseline: V-Net (Milletari et al., 3DV 2016; https://arxiv.org/abs/1606.04797).

    L = w_d * L_dice(p, y) + w_c * CE(p, y)

over labeled patches only: all patches of a step are labeled, so that its budget is that of the
semi-supervised methods beside it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.losses import DiceForm, cross_entropy, dice_loss
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.vnet import VNet


class SupervisedSettings(MethodSettings):
    """Settings of the supervised V-Net."""

    name: Literal["supervised"] = "supervised"
    patches: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = (4, 0)
    """Labeled and unlabeled patches of a step; unlabeled ones would be of no use."""
    dice: DiceForm = "linear"
    """Form of the Dice loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_d of the Dice loss."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_c of the cross-entropy."""


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0}, "train": {}},
    "faithful": {
        "method": {"dropout": 0.5, "dice": "squared"},
        "train": {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"},
    },
}


class Supervised(Method):
    """V-Net on labeled patches."""

    Settings = SupervisedSettings
    settings: SupervisedSettings

    def __init__(self, settings: SupervisedSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.network = VNet(task.in_channels, task.num_classes, s.filters, s.dropout)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Dice and cross-entropy."""
        s = self.settings
        logits = self.network(batch.labeled_images)
        return Loss(
            dice=Term(s.dice_weight, dice_loss(logits.softmax(1), batch.labels, s.dice)),
            ce=Term(s.ce_weight, cross_entropy(logits, batch.labels)),
        )

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network(images).softmax(1)
