"""Smooth random deformation of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL_POINTS = 4  # a side; between them a displacement is interpolated


@dataclass(frozen=True)
class Warp:
    """Deformations of some of a batch's patches; the others lie as they are."""

    moved: tuple[int, ...]
    """Rows of the batch that are deformed."""
    places: Tensor
    """Where each of their voxels lies in the plain patch, (len(moved), X, Y, Z, 3), a side from -1 to 1,
    the last axis named first."""

    def __call__(self, x: Tensor) -> Tensor:
        """Images or probabilities (N, C, X, Y, Z), or labels (N, X, Y, Z), deformed.

        What comes from beyond the edge is as at the edge.
        """
        if not self.moved:
            return x
        seen = list(x.unbind())
        plain = torch.stack([seen[row] for row in self.moved])
        for row, deformed in zip(self.moved, sample(plain, self.places).unbind(), strict=True):
            seen[row] = deformed
        return torch.stack(seen)

    def rows(self, first: int, last: int) -> Warp:
        """The deformations of a part of the batch."""
        inside = [i for i, row in enumerate(self.moved) if first <= row < last]
        at = slice(inside[0], inside[-1] + 1) if inside else slice(0)
        return Warp(tuple(self.moved[i] - first for i in inside), self.places[at])


def random_warp(
    count: int,
    shape: Sequence[int],
    strength: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    share: float = 1.0,
) -> Warp:
    """Deformations of N patches, each with its own.

    Args:
        count: N.
        shape: (X, Y, Z).
        strength: the largest displacement of a control point, as a share of the side of the patch.
        generator: on the CPU.
        device: of the patches.
        share: of the patches that are deformed.
    """
    points = (count, 3, *(CONTROL_POINTS,) * 3)
    moves = 2 * strength * (2 * torch.rand(points, generator=generator) - 1)  # a side is -1 to 1
    is_moved = torch.rand((count, 1, 1, 1, 1), generator=generator).flatten() < share
    moved = tuple(is_moved.nonzero().flatten().tolist())
    if not moved:
        return Warp(moved, moves.new_empty(0, *shape, 3, device=device))
    moves = moves[is_moved].to(device, non_blocking=True)
    moves = F.interpolate(moves, tuple(shape), mode="trilinear", align_corners=True)
    return Warp(moved, own_places(shape, moves.device) + moves.movedim(1, -1))


def own_places(shape: Sequence[int], device: torch.device) -> Tensor:
    """Where the voxels of a patch are, (X, Y, Z, 3), last axis first, from -1 to 1.

    `affine_grid` would multiply matrices, in bfloat16 under autocast, and be off by 0.1 voxel.
    """
    axes = [
        torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device)
        for n in shape
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)


def sample(x: Tensor, places: Tensor) -> Tensor:
    """What lies at `places`, interpolated; labels (N, X, Y, Z) are those of the nearest voxel."""
    mode = "nearest" if x.ndim == 4 else "bilinear"
    maps = x[:, None].float() if x.ndim == 4 else x
    found = F.grid_sample(maps, places, mode, padding_mode="border", align_corners=True)
    return found[:, 0].to(x.dtype) if x.ndim == 4 else found
