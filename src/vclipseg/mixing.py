"""Mixing of two batches of patches inside a box, as copy-paste methods do."""

from __future__ import annotations

import torch
from torch import Tensor


def random_box(shape: tuple[int, ...], share: float, generator: torch.Generator | None) -> Tensor:
    """A boolean (X, Y, Z) mask, true in a box of `share` of each side at a random place."""
    mask = torch.zeros(shape, dtype=torch.bool)
    slices = []
    for size in shape:
        side = int(share * size)
        start = int(torch.randint(size - side + 1, (), generator=generator))
        slices.append(slice(start, start + side))
    mask[tuple(slices)] = True
    return mask


def swap(first: Tensor, second: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange what is inside the mask: rows (N, ..., X, Y, Z) of one kind with those of the other."""
    return torch.where(mask, second, first), torch.where(mask, first, second)
