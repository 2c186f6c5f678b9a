"""Sliding windows over a volume, averaged where they overlap.

The volume is gone through along its first axis, and each slab is given as soon as no further window
reaches it: what is held is as thick as a window, however large the volume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Size = tuple[int, int, int]


def slabs(
    image: Tensor,
    run: Callable[[Tensor], Tensor],
    window: Size,
    stride: Size,
    blend: str,
    batch: int,
) -> Iterator[Tensor]:
    """The averaged outputs of a volume, slab by slab along X.

    Args:
        image: (C, X, Y, Z), at least as large as the window.
        run: (B, C, *window) -> (B, K, *window), on the CPU.
        window: size in voxels.
        stride: steps between windows, at most the window.
        blend: as `blend_weights` has it.
        batch: windows run at once.

    Yields:
        (K, x, Y, Z); joined along X they are (K, X, Y, Z).
    """
    along, *across = map(window_starts, image.shape[1:], window, stride)
    weight = blend_weights(window, blend)
    visits = torch.zeros(window[0], *image.shape[2:])
    total: Tensor | None = None
    for start, following in zip(along, [*along[1:], image.shape[1]], strict=True):
        slab = image[:, start : start + window[0]]
        for corners in batched(list(itertools.product(*across)), batch):
            boxes = [(slice(y, y + window[1]), slice(z, z + window[2])) for y, z in corners]
            outputs = run(torch.stack([slab[:, :, y, z] for y, z in boxes]))
            if total is None:
                total = torch.zeros(outputs.shape[1], *visits.shape)
            for (y, z), output in zip(boxes, outputs, strict=True):
                total[:, :, y, z] += weight * output
                visits[:, y, z] += weight
        assert total is not None
        done = following - start
        yield total[:, :done] / visits[:done]
        advance(total, done, axis=1)
        advance(visits, done, axis=0)


def advance(held: Tensor, steps: int, axis: int) -> None:
    """Move what is held towards the start of an axis, in place; zeros follow."""
    kept = held.shape[axis] - steps
    held.narrow(axis, 0, kept).copy_(held.narrow(axis, steps, kept).clone())
    held.narrow(axis, kept, steps).zero_()


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Starts along an axis: ceil((size - window) / stride) + 1 of them, the last at the border."""
    last = size - window
    return sorted({min(i * stride, last) for i in range(-(-last // stride) + 1)})


def blend_weights(window: Size, blend: str) -> Tensor:
    """(x, y, z) weights of a window's voxels: ones, or a Gaussian of 1/8 of each side."""
    if blend == "uniform":
        return torch.ones(window)
    weight = torch.ones(())
    for size in window:
        position = (torch.arange(size) - (size - 1) / 2) / (size / 8)
        weight = weight[..., None] * torch.exp(-0.5 * position.square())
    return weight.clamp(min=1e-3)


def batched(items: list, size: int) -> list[list]:
    """`items` in lists of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]
