"""Turning arrays and affines by whole axes, which loses nothing and can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np


def axes_and_flips(
    affine: np.ndarray, orientation: str
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """How to turn a volume to an orientation: the axis to take for each axis, and whether flipped.

    Args:
        affine: `(4, 4)`, voxel to RAS+ mm.
        orientation: Three letters, such as `"RAS"`.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    start, end = io_orientation(affine), axcodes2ornt(tuple(orientation))
    change = ornt_transform(start, end)  # row: old axis; columns: new axis, flip
    axes = tuple(int(a) for a in np.argsort(change[:, 0]))
    return axes, tuple(bool(change[a, 1] < 0) for a in axes)


def turn(array: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """Take the last three axes in another order, then flip those asked for; a view."""
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *[lead + a for a in axes])
    return array[_reversed(flips)]


def turn_back(array: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """Undo `turn`; a view."""
    lead = array.ndim - 3
    return array[_reversed(flips)].transpose(
        *range(lead), *[lead + int(a) for a in np.argsort(axes)]
    )


def _reversed(flips: Sequence[bool]) -> tuple[Any, ...]:
    return (..., *[slice(None, None, -1 if flip else 1) for flip in flips])


def turn_affine(
    affine: np.ndarray, shape: Sequence[int], axes: Sequence[int], flips: Sequence[bool]
) -> np.ndarray:
    """The affine of a turned volume, given the shape before."""
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        to_old[old, new] = -1 if flip else 1
        to_old[old, 3] = shape[old] - 1 if flip else 0
    return affine @ to_old


def corners(shape: Sequence[int], affine: np.ndarray, margin: float = 0.5) -> np.ndarray:
    """World positions `(8, 3)` in mm of a grid's corners, `margin` voxels outside the centers."""
    ends = [(-margin, n - 1 + margin) for n in shape]
    return transform(affine, np.array(list(product(*ends))))


def transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points `(N, 3)` as an affine maps them."""
    return points @ affine[:3, :3].T + affine[:3, 3]
