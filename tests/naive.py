"""What the methods' formulas are made of, written once more in numpy. Arrays are (B, K, X, Y, Z)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from vclipseg.methods.base import Loss


def softmax(logits: torch.Tensor) -> np.ndarray:
    """In double precision."""
    powers = np.exp(logits.detach().double().numpy())
    return powers / powers.sum(1, keepdims=True)


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.stack([labels == k for k in range(num_classes)], 1).astype(float)


def dice(p: np.ndarray, labels: np.ndarray, form: str = "linear") -> float:
    """Dice loss, mean over the foreground classes that the labels hold, or over all classes."""
    g = one_hot(labels, p.shape[1])
    everywhere = form == "multiclass"
    classes = [k for k in range(p.shape[1]) if everywhere or (k > 0 and g[:, k].any())]
    values = []
    for k in classes or range(1, p.shape[1]):
        a, b = p[:, k], g[:, k]
        if form == "linear":
            values.append(1 - (2 * (a * b).sum() + 1e-8) / (a.sum() + b.sum() + 1e-8))
        else:
            values.append(1 - (2 * (a * b).sum() + 1e-5) / ((a**2).sum() + (b**2).sum() + 1e-5))
    return float(np.mean(values))


def cross_entropy(p: np.ndarray, labels: np.ndarray) -> float:
    """Mean over voxels of -ln p of the label's class."""
    return float(-np.log(np.take_along_axis(p, labels[:, None], 1)).mean())


def ramp(step: float, full_at: float) -> float:
    return math.exp(-5 * (1 - min(step / full_at, 1)) ** 2) if full_at else 1.0


def numbers(loss: Loss) -> dict[str, tuple[float, float]]:
    """Name -> (weight, value)."""
    return {name: (weight, float(value.detach())) for name, (weight, value) in loss.items()}


def changed(found: dict, plain: dict) -> Sequence[set[str]]:
    """Names of the terms whose value, and of those whose weight is another one."""
    names, nothing = {*found, *plain}, (None, None)
    return [
        {n for n in names if found.get(n, nothing)[i] != plain.get(n, nothing)[i]} for i in (1, 0)
    ]
