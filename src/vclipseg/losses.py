"""Losses as pure functions of tensors.

Shapes: logits and probs (B, K, X, Y, Z); labels (B, X, Y, Z) of class indices, where `IGNORE` marks
voxels that a loss leaves out; targets are one-hot or soft labels (B, K, X, Y, Z), and kept (B, X, Y, Z)
weighs voxels.

What is no mean over patches is made of sums over the patches of all ranks (`vclipseg.ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vclipseg.data.batch import IGNORE
from vclipseg.ranks import across

DiceForm = Literal["linear", "squared", "multiclass"]


def sigmoid_rampup(step: int, rampup_steps: float) -> float:
    """exp(-5 (1 - step/rampup_steps)^2), from 0.0067 to 1 (Laine & Aila, ICLR 2017)."""
    if rampup_steps <= 0:
        return 1.0
    return math.exp(-5 * (1 - min(step / rampup_steps, 1.0)) ** 2)


def add(terms: Iterable[Tensor]) -> Tensor:
    """Sum of scalars that `torch.stack` can differentiate."""
    return torch.stack(list(terms)).sum()


def most_likely(scores: Tensor) -> Tensor:
    """The class of each voxel, (B, K, X, Y, Z) -> (B, X, Y, Z); the first of equal ones.

    It is `argmax(1)`, whose kernel takes many times as long on a CPU.
    """
    return scores.max(1).indices


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(B, X, Y, Z) -> (B, K, X, Y, Z) float; all zero where the label is `IGNORE`."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1, 1)
    return (labels[:, None] == classes).float()


def class_dice_losses(
    probs: Tensor, targets: Tensor, form: DiceForm = "linear", kept: Tensor | None = None
) -> Tensor:
    """1 - Dice of each class over the whole batch, (K,).

    Args:
        probs: (B, K, X, Y, Z).
        targets: (B, K, X, Y, Z), one-hot or soft.
        form: denominator sum(p) + sum(g) with epsilon 1e-8 ("linear"), or sum(p^2) + sum(g^2) with
            epsilon 1e-5 ("squared", "multiclass").
        kept: (B, X, Y, Z) voxels that count (bool or weights); all when left out.
    """
    if kept is not None:
        probs = probs * kept[:, None]
        targets = targets * kept[:, None]
    dims = (0, 2, 3, 4)
    overlap = across((probs * targets).sum(dims))
    if form == "linear":
        return 1 - (2 * overlap + 1e-8) / (across(probs.sum(dims) + targets.sum(dims)) + 1e-8)
    squares = across(probs.square().sum(dims) + targets.square().sum(dims))
    return 1 - (2 * overlap + 1e-5) / (squares + 1e-5)


def dice_loss(probs: Tensor, labels: Tensor, form: DiceForm = "linear") -> Tensor:
    """Dice loss against labels; voxels labeled `IGNORE` are left out. See `soft_dice_loss`."""
    return soft_dice_loss(probs, one_hot(labels, probs.shape[1]), (labels != IGNORE).float(), form)


def soft_dice_loss(
    probs: Tensor, targets: Tensor, kept: Tensor | None = None, form: DiceForm = "linear"
) -> Tensor:
    """Dice loss over the batch, averaged over the foreground classes that the targets hold.

    "linear" and "squared" are the two binary forms of the literature, carried over to K classes;
    "multiclass" counts the background and absent classes too. Where the targets hold no foreground
    at all, every foreground class counts, as in the binary form.
    """
    losses = class_dice_losses(probs, targets, form, kept)
    if form == "multiclass":
        return losses.mean()
    held = targets if kept is None else targets * kept[:, None]
    present = (across((held[:, 1:].amax((0, 2, 3, 4)) > 0).float()) > 0).float()
    counted = present.where(present.any(), torch.ones_like(present))
    return (losses[1:] * counted).sum() / counted.sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the voxels that have a label; 0 where none has."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return across(total) / across((labels != IGNORE).sum()).clamp(min=1)


def soft_cross_entropy(logits: Tensor, targets: Tensor, kept: Tensor | None = None) -> Tensor:
    """-mean_v sum_c P_c log p_c against class probabilities P, over the kept voxels."""
    entropy = -(targets * logits.log_softmax(1)).sum(1)
    if kept is None:
        return entropy.mean()
    return across((entropy * kept).sum()) / across(kept.sum()).clamp(min=1)


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1-p)^(1/T)) for each class by itself."""
    powered = probs ** (1 / temperature)
    return powered / (powered + (1 - probs) ** (1 / temperature))


def patch_dice_loss(probs: Tensor, labels: Tensor) -> Tensor:
    """1 - mean over patches and classes of Dice, each patch and class by itself.

    The background counts as a class. The denominator is linear, with epsilon 1e-5; voxels labeled
    `IGNORE` are left out.
    """
    targets = one_hot(labels, probs.shape[1])
    probs = probs * (labels != IGNORE)[:, None]
    dims = (2, 3, 4)
    overlap = (probs * targets).sum(dims)
    dice = (2 * overlap + 1e-5) / (probs.sum(dims) + targets.sum(dims) + 1e-5)
    return 1 - dice.mean()


def cross_entropy_by_image(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy times a weight an image (B,), mean over the voxels where that is above 0.

    Voxels labeled `IGNORE` are left out; 0 where no voxel counts.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    losses = losses * weights[:, None, None, None]
    return across(losses.sum()) / across((losses.detach() > 0).sum()).clamp(min=1)


def info_nce(anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log of the share of exp(cos / T) that each anchor's positive has among all, mean over anchors.

    Args:
        anchors: (N, E).
        positive: (E,), one for all of them.
        negatives: (N, M, E), M for each.
        temperature: T.
    """
    near = F.cosine_similarity(anchors, positive[None], dim=1)
    far = F.cosine_similarity(anchors[:, None], negatives, dim=2)
    logits = torch.cat([near[:, None], far], 1) / temperature
    return -logits.log_softmax(1)[:, 0].mean()
