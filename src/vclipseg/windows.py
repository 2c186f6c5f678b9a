"""How a volume is covered by windows, and whether it fits into memory at once; needs numpy alone.

The volume is gone through along its first axis, and each slab is given as soon as no further window
reaches it: what is held is as thick as a window, however large the volume.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vclipseg.errors import UsageError


def fitted(
    shape: Sequence[int], window: Sequence[int], stride: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The size of the windows over a volume `(x, y, z)`, and the steps between them.

    Args:
        shape: of the volume; no window is larger.
        window: the size wanted.
        stride: steps between windows; half a window for None.

    Raises:
        UsageError: the stride leaves gaps.
    """
    size = tuple(min(w, s) for w, s in zip(window, shape, strict=True))
    stride = tuple(stride or (max(1, w // 2) for w in size))
    if any(step > w for step, w in zip(stride, window, strict=True)):
        raise UsageError(
            f"predict.stride {stride} is larger than the window {tuple(window)}: voxels "
            "between two windows would get no prediction"
        )
    return size, stride


def slabs(
    image: Any,
    run: Callable[[Any], Any],
    window: Sequence[int],
    stride: Sequence[int],
    blend: str,
    batch: int,
    put: Callable[[np.ndarray], Any] = np.asarray,
    stack: Callable[[list], Any] = np.stack,
) -> Iterator[Any]:
    """The averaged outputs of a volume, slab by slab along X.

    Args:
        image: (C, X, Y, Z), at least as large as the window.
        run: (B, C, *window) -> (B, K, *window).
        window: size in voxels.
        stride: steps between windows, at most the window.
        blend: as `blend_weights` has it.
        batch: windows run at once.
        put: makes of an array what `image` is, where that is a tensor on a device; all stays there then.
        stack: joins windows along a new first axis.

    Yields:
        (K, x, Y, Z); joined along X they are (K, X, Y, Z).
    """
    along, *across = map(window_starts, image.shape[1:], window, stride)
    weight = put(blend_weights(window, blend))
    visits = put(np.zeros((window[0], *image.shape[2:]), np.float32))
    total: Any = None
    for start, following in zip(along, [*along[1:], image.shape[1]], strict=True):
        slab = image[:, start : start + window[0]]
        for corners in batched(list(itertools.product(*across)), batch):
            boxes = [(slice(y, y + window[1]), slice(z, z + window[2])) for y, z in corners]
            outputs = run(stack([slab[:, :, y, z] for y, z in boxes]))
            if total is None:
                total = put(np.zeros((outputs.shape[1], *visits.shape), np.float32))
            for (y, z), output in zip(boxes, outputs, strict=True):
                total[:, :, y, z] += weight * output
                visits[:, y, z] += weight
        done = following - start
        yield total[:, :done] / visits[:done]
        advance(total, done, axis=1)
        advance(visits, done, axis=0)


def advance(held: Any, steps: int, axis: int) -> None:
    """Move what is held towards the start of an axis, in place; zeros follow."""
    moved = held.swapaxes(0, axis)
    kept = len(moved) - steps
    for index in range(kept):  # what is read lies ahead of what is written
        moved[index] = moved[index + steps]
    moved[kept:] = 0


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


def batched(items: list, size: int) -> list[list]:
    """`items` in lists of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def whole_bytes(shape: Sequence[int], filters: int) -> int:
    """Memory that a volume `(x, y, z)` needs at once: about ten float32 maps at full size."""
    return math.prod(shape) * filters * 4 * 10


def free_memory() -> int:
    """Bytes of memory that are free; a guess where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # no os.sysconf on Windows
        return 4 * 2**30
