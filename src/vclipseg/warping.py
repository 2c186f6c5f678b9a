"""Smooth random deformation of patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL_POINTS = 4  # a side; between them a displacement is interpolated


def random_warp(
    count: int,
    shape: Sequence[int],
    strength: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    share: float = 1.0,
) -> Tensor:
    """Where each voxel of a deformed patch lies in the plain one, (N, X, Y, Z, 3), for `warp`.

    Args:
        count: N, each patch with its own deformation.
        shape: (X, Y, Z).
        strength: the largest displacement of a control point, as a share of the side of the patch.
        generator: on the CPU.
        device: of the result.
        share: of the patches that are deformed; the others lie as they are.
    """
    points = (count, 3, *(CONTROL_POINTS,) * 3)
    moved = 2 * strength * (2 * torch.rand(points, generator=generator) - 1)  # a side is -1 to 1
    moved *= torch.rand((count, 1, 1, 1, 1), generator=generator) < share
    moved = F.interpolate(moved.to(device), tuple(shape), mode="trilinear", align_corners=True)
    still = torch.eye(3, 4, device=device).expand(count, -1, -1)
    return F.affine_grid(still, [count, 1, *shape], align_corners=True) + moved.movedim(1, -1)


def warp(x: Tensor, places: Tensor) -> Tensor:
    """Images or probabilities (N, C, X, Y, Z), or labels (N, X, Y, Z), deformed.

    What comes from beyond the edge is as at the edge.
    """
    if x.ndim == 4:  # labels
        return _sample(x[:, None].float(), places, "nearest")[:, 0].to(x.dtype)
    return _sample(x, places, "bilinear")


def _sample(x: Tensor, places: Tensor, mode: str) -> Tensor:
    return F.grid_sample(x, places, mode, padding_mode="border", align_corners=True)
