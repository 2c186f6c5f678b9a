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


def cutmix_box(shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
    """A boolean (X, Y, Z) mask, true in a flat box that takes half of the plane X Y.

    Between half and all of Y, as much of X as the area asks, an eighth of Z within its first seven
    eighths: ARCO's box of 57..111 by 6272/57..111 by 10 voxels, for patches of any size.
    """
    x, y, z = shape
    width = int(torch.randint(y // 2 + 1, max(y, y // 2 + 2), (), generator=generator))
    sides = (round(x * y / 2 / width), width, max(1, round(z / 8)))
    rooms = (x - sides[0], y - width, min(z - sides[2], 3 * z // 4))
    mask = torch.zeros(shape, dtype=torch.bool)
    starts = [int(torch.randint(room + 1, (), generator=generator)) for room in rooms]
    mask[tuple(slice(a, a + n) for a, n in zip(starts, sides, strict=True))] = True
    return mask
