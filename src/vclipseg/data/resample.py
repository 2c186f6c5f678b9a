"""Resampling to another number of voxels over the same field of view.

The corners of the volume stay where they are, as in `torch.nn.functional.interpolate`
with `align_corners=False`; so voxel centres move by a part of a voxel, and the affine says so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.functional import interpolate

from vclipseg.data.trace import Shape

SMOOTH_ABOVE = 2.0
"""Images that shrink by more than this along an axis are smoothed along it first."""


def resample_image(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Resample an image linearly, smoothed where it shrinks a lot.

    Args:
        array: float32 `(C, X, Y, Z)`.
        shape: The new `(X, Y, Z)`.
    """
    if array.shape[1:] == tuple(shape):
        return array
    return np.stack([linear(_smoothed(channel, shape), shape).numpy() for channel in array])


def resample_labels(labels: np.ndarray, shape: Shape) -> np.ndarray:
    """Resample class indices `(X, Y, Z)`: linear on each class, then the largest."""
    if labels.shape == tuple(shape):
        return labels
    found = np.unique(labels)
    shares = (linear(labels == index, shape) for index in found)
    return found[running_argmax(shares)]


def linear(array: np.ndarray | torch.Tensor, shape: Shape) -> torch.Tensor:
    """One array `(X, Y, Z)` resampled to `shape` as float32, on the device it is on."""
    values = torch.as_tensor(array).float()
    if values.shape == tuple(shape):
        return values
    return interpolate(values[None, None], size=tuple(shape), mode="trilinear")[0, 0]


def running_argmax(values: Iterable[torch.Tensor]) -> np.ndarray:
    """Which of some arrays `(X, Y, Z)` is largest in each voxel, holding two at a time.

    Returns:
        uint8 `(X, Y, Z)`; the first of equals.
    """
    best, mask = None, None
    for index, value in enumerate(values):
        if best is None or mask is None:
            best, mask = value.clone(), torch.zeros_like(value, dtype=torch.uint8)
            continue
        larger = value > best
        best[larger] = value[larger]
        mask[larger] = index
    if mask is None:
        raise ValueError("no arrays to compare")
    return mask.cpu().numpy()


def _smoothed(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Smooth along axes that shrink by more than `SMOOTH_ABOVE`, against aliasing."""
    from scipy.ndimage import gaussian_filter1d

    for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)):
        if old / new > SMOOTH_ABOVE:
            array = gaussian_filter1d(array, (old / new - 1) / 2, axis=axis, mode="nearest")
    return array
