"""Mixing of two batches of patches inside a box, as copy-paste methods do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def random_box(
    shape: tuple[int, ...],
    share: float,
    generator: torch.Generator | None,
    device: torch.device | None = None,
) -> Tensor:
    """A boolean (X, Y, Z) mask, true in a box of `share` of each side at a random place."""
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
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


def paste(onto: Tensor, source: Tensor, masks: Tensor) -> Tensor:
    """What `source` shows inside the masks (N, X, Y, Z), one a row, and `onto` outside.

    Rows are (N, X, Y, Z) or (N, C, X, Y, Z).
    """
    return torch.where(masks if onto.ndim == 4 else masks[:, None], source, onto)


def box_mask(shape: Sequence[int], start: Sequence[int], stop: Sequence[int]) -> Tensor:
    """A boolean (X, Y, Z) mask, true from `start` to before `stop`; what lies outside is cut off."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask[tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(start, stop, strict=True))] = True
    return mask


def centered_boxes(
    count: int, shape: Sequence[int], generator: torch.Generator | None, concentration: int = 4
) -> Tensor:
    """CutMix boxes (N, X, Y, Z) of one size, each around its own random voxel.

    A side is sqrt(1 - l) of its axis, l ~ Beta(a, a) with a whole `concentration` a. A center lies
    anywhere from an eighth of its axis on; what sticks out is cut off.
    """
    # the median of 2a - 1 uniform numbers is Beta(a, a)
    beta = float(torch.rand(2 * concentration - 1, generator=generator).median())
    halves = [int(math.sqrt(1 - beta) * size) // 2 for size in shape]
    boxes = []
    for _ in range(count):
        center = [int(torch.randint(n // 8, n, (), generator=generator)) for n in shape]
        start = [c - half for c, half in zip(center, halves, strict=True)]
        stop = [c + half for c, half in zip(center, halves, strict=True)]
        boxes.append(box_mask(shape, start, stop))
    return torch.stack(boxes)


def stretched_box(
    shape: Sequence[int],
    generator: torch.Generator | None,
    volumes: tuple[float, float] = (0.02, 0.4),
    most_stretched: float = 0.3,
    reverse: bool = False,
) -> Tensor:
    """A CutMix box (X, Y, Z) of a share U(*volumes) of the patch, longer in Y than in X or the reverse.

    With V its volume and r = U(s, 1/s), s being `most_stretched`, its sides are the cube roots of V/r,
    V r and V, at most those of the patch. `reverse` exchanges what was drawn for X and Z, then cuts off
    what lies outside.
    """
    share, ratio, *places = torch.rand(5, generator=generator).tolist()
    volume = (volumes[0] + (volumes[1] - volumes[0]) * share) * math.prod(shape)
    ratio = most_stretched + (1 / most_stretched - most_stretched) * ratio
    sides = [int(v ** (1 / 3)) for v in (volume / ratio, volume * ratio, volume)]
    sides = [min(side, size) for side, size in zip(sides, shape, strict=True)]
    start = [
        int(place * (n - side + 1)) for place, n, side in zip(places, shape, sides, strict=True)
    ]
    stop = [corner + side for corner, side in zip(start, sides, strict=True)]
    return box_mask(shape, start[::-1], stop[::-1]) if reverse else box_mask(shape, start, stop)


def maybe_boxes(
    count: int, shape: Sequence[int], generator: torch.Generator | None, reverse: bool = False
) -> Tensor:
    """A `stretched_box` for each of `count` rows, (N, X, Y, Z), in half of the cases an empty one."""
    boxes = torch.stack([stretched_box(shape, generator, reverse=reverse) for _ in range(count)])
    return boxes & (torch.rand((count, 1, 1, 1), generator=generator) < 0.5)


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
