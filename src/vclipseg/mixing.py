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


def change_intensity(images: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    """Another contrast for each image: gamma, scale and shift at random, noise now and then.

    With v in [0, 1] between an image's extremes, v becomes a * v^g + b, g = 2^U(-s, s),
    a = U(1 - s/2, 1 + s/2), b = U(-s/4, s/4); in one of two images noise of up to s/10 is added.

    Args:
        images: (B, C, X, Y, Z).
        strength: s.
        generator: source of the draws, on the CPU.
    """

    def uniform(low: float, high: float) -> Tensor:
        draws = torch.rand(len(images), 1, 1, 1, 1, generator=generator)
        return (low + (high - low) * draws).to(images)

    low, high = images.amin((2, 3, 4), keepdim=True), images.amax((2, 3, 4), keepdim=True)
    extent = (high - low).clamp(min=1e-6)
    values = ((images - low) / extent).pow(2 ** uniform(-strength, strength))
    values = values * uniform(1 - strength / 2, 1 + strength / 2)
    values = values + uniform(-strength / 4, strength / 4)
    deviation = uniform(-strength / 10, strength / 10).clamp(min=0)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return low + extent * (values + deviation * noise)
