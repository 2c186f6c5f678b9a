"""How far the decoders of a model differ about a scan: where to look, and at which scan first.

    d = 1 - sum_k min_i p_ik   in each voxel: 0 where all say the same, 1 where they share no class

which for two opinions is the total variation distance. A model with one opinion has its entropy
instead, as a share of ln K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vclipseg.data.preprocess import restore_mask
from vclipseg.data.resample import linear
from vclipseg.data.volume import Volume, turn
from vclipseg.inference import Predictor
from vclipseg.methods.base import Method
from vclipseg.networks.vnet import Encoder

EMPTY = 1e-4
"""A mask of less than this share of the volume is called empty."""


@dataclass(frozen=True, eq=False)
class Look:
    """A scan as a model sees it.

    Attributes:
        mask: class indices uint8 (X, Y, Z) on the scan's grid.
        disagreement: float32 (X, Y, Z) in [0, 1] on the scan's grid.
        uncertainty: disagreement as a share of what was found, in [0, 1]; 1 if nothing was.
        class_shares: share of the volume for each class but the background, (K - 1,).
        features: mean of the encoder's deepest map, (F,); empty if the network has no such encoder.
    """

    mask: Volume
    disagreement: Volume
    uncertainty: float
    class_shares: tuple[float, ...]
    features: tuple[float, ...]


def disagreement(opinions: Tensor) -> Tensor:
    """Probabilities (D, K, X, Y, Z) of D opinions -> (X, Y, Z) in [0, 1]."""
    if len(opinions) == 1:
        probs = opinions[0]
        return (torch.special.entr(probs).sum(0) / math.log(len(probs))).clamp(0, 1)
    return (1 - opinions.amin(0).sum(0)).clamp(0, 1)


def uncertainty(opinions: Tensor) -> float:
    """Disagreement summed, as a share of it and of the foreground found; 1 if nothing was found.

    Large organs have longer borders, so that a plain mean would rank cases by size.
    """
    found = float(1 - opinions[:, 0].mean())
    differ = float(disagreement(opinions).mean())
    return 1.0 if found < EMPTY else differ / (differ + found)


class _Opinions(nn.Module):
    """Predicts (B, K + D K, X, Y, Z): what the method predicts, then each opinion."""

    def __init__(self, method: Method, on_windows: Callable[[int], None]) -> None:
        super().__init__()
        self.method = method
        self.on_windows = on_windows
        self.features: list[Tensor] = []
        encoder = next((m for m in method.modules() if isinstance(m, Encoder)), None)
        self.hook = encoder.register_forward_hook(self._remember) if encoder else None

    def _remember(self, module: nn.Module, inputs: object, maps: list[Tensor]) -> None:
        self.features.append(maps[-1].float().mean((0, 2, 3, 4)).cpu())

    def predict(self, images: Tensor) -> Tensor:
        """One after the other, so that the mask is that of `vclipseg predict`."""
        self.on_windows(len(images))
        return torch.cat([self.method.predict(images), *self.method.opinions(images)], dim=1)


def look(
    predictor: Predictor, image: Volume, on_windows: Callable[[int], None] = lambda count: None
) -> Look:
    """The mask of an image (C, X, Y, Z) and how sure the model is of it.

    Args:
        predictor: the model.
        image: as for `Predictor.predict`.
        on_windows: called with the number of windows about to be run.
    """
    opinions = _Opinions(predictor.method, on_windows)
    several = Predictor(opinions, predictor.description, predictor.settings)  # type: ignore[arg-type]
    try:
        both, trace = several.prepared_probs(image)
    finally:
        if opinions.hook:
            opinions.hook.remove()
    classes = len(predictor.class_names)
    probs = torch.from_numpy(both[:classes])
    views = torch.from_numpy(both[classes:]).unflatten(0, (-1, classes))  # (D, K, x, y, z)
    mask = restore_mask(probs, trace)
    restored = np.zeros(trace.shape, dtype=np.float32)
    inside = linear(disagreement(views), trace.cropped_shape).numpy()
    turn(restored, trace.axes, trace.flips)[trace.slices] = inside
    sizes = np.bincount(mask.array.ravel(), minlength=classes) / mask.array.size
    features = torch.stack(opinions.features).mean(0) if opinions.features else torch.empty(0)
    return Look(
        mask=mask,
        disagreement=Volume(restored, image.affine),
        uncertainty=uncertainty(views),
        class_shares=tuple(sizes[1:].tolist()),
        features=tuple(features.tolist()),
    )
