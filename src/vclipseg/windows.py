"""How a volume is covered by windows, and whether it fits into memory at once; numpy alone."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence

import numpy as np

from vclipseg.errors import UsageError

Box = tuple[slice, ...]


def cover(
    shape: Sequence[int], window: Sequence[int], stride: Sequence[int] | None
) -> tuple[tuple[int, ...], list[Box]]:
    """The size of the windows over a volume `(x, y, z)`, and where they are.

    Args:
        shape: of the volume; no window is larger.
        window: the size wanted.
        stride: steps between windows; half a window for None.

    Raises:
        UsageError: the stride leaves gaps.
    """
    size = tuple(min(w, s) for w, s in zip(window, shape, strict=True))
    stride = stride or tuple(max(1, w // 2) for w in size)
    if any(step > w for step, w in zip(stride, window, strict=True)):
        raise UsageError(
            f"predict.stride {tuple(stride)} is larger than the window {tuple(window)}: voxels "
            "between two windows would get no prediction"
        )
    starts = itertools.product(*map(window_starts, shape, size, stride))
    boxes = [tuple(slice(a, a + w) for a, w in zip(start, size, strict=True)) for start in starts]
    return size, boxes


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Starts along an axis: ceil((size - window) / stride) + 1 of them, the last at the border."""
    last = size - window
    return sorted({min(i * stride, last) for i in range(-(-last // stride) + 1)})


def blend_weights(window: Sequence[int], blend: str) -> np.ndarray:
    """(x, y, z) float32 weights of a window's voxels: ones, or a Gaussian of 1/8 of each side."""
    weight = np.ones((), np.float32)
    for size in window:
        position = (np.arange(size) - (size - 1) / 2) / (size / 8)
        if blend == "uniform":
            position[:] = 0
        weight = weight[..., None] * np.exp(-0.5 * position**2).astype(np.float32)
    return weight.clip(min=1e-3)


def whole_bytes(shape: Sequence[int], filters: int) -> int:
    """Memory that a volume `(x, y, z)` needs at once: about ten float32 maps at full size."""
    return math.prod(shape) * filters * 4 * 10


def free_memory() -> int:
    """Bytes of memory that are free; a guess where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # no os.sysconf on Windows
        return 4 * 2**30
