"""Exact distances between sets of voxels, and which lie within a distance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Points = NDArray[np.number]

STEPS = 500  # of the nearest ones, about as many as cost what a tree does
PAYS = 4 * STEPS  # one more step should find one voxel of so many
FREE = 33  # steps, up to two voxels, tried in any case: near surfaces may share no voxel


def nearest(points: Points, others: Points, spacing: Sequence[float]) -> NDArray[np.float64]:
    """How far each voxel is from the nearest other one.

    Surfaces that nearly agree lie within a few voxels: there each step to a neighbor, the shortest first,
    is tried for all voxels at once. A tree is asked for what is left.

    Args:
        points: (N, 3) indices.
        others: (M, 3) indices, at least one.
        spacing: voxel size.

    Returns:
        (N,) in the unit of `spacing`.
    """
    distances = np.empty(len(points))
    left = _step(points, others, spacing, distances)
    if len(left):
        distances[left] = KDTree(others * spacing).query(points[left] * spacing)[0]
    return distances


def dilate(mask: NDArray[np.bool_], spacing: Sequence[float], radius: float) -> NDArray[np.bool_]:
    """Which voxels are within a radius of a true one.

    The mask is bits, 64 along the last axis a word, so that a word is combined with another at once.

    Args:
        mask: (X, Y, Z).
        spacing: voxel size.
        radius: in the unit of `spacing`.

    Returns:
        (X, Y, Z), boolean.
    """
    reach = np.minimum(radius // np.asarray(spacing), np.array(mask.shape) - 1)
    x, y, z = reach.astype(int).tolist()
    width = mask.shape[1] + 2 * y
    depth = -(-(mask.shape[2] + z) // 64)  # words, with z empty bits at the end
    padded = np.zeros((mask.shape[0] + 2 * x, width, 64 * depth), dtype=bool)
    inside = np.s_[x : x + mask.shape[0], y : y + mask.shape[1], : mask.shape[2]]
    padded[inside] = mask
    rods = np.packbits(padded, bitorder="little").view("<u8")
    margin = (x * width + y) * depth
    near = np.zeros_like(rods)
    center = near[margin : len(near) - margin]
    for height, columns in enumerate(_columns((x, y, z), tuple(spacing), radius)):
        rods = _lengthen(rods) if height else rods
        for step in (columns @ [width * depth, depth] + margin).tolist():
            center |= rods[step : step + len(center)]
    bits = np.unpackbits(near.view(np.uint8), bitorder="little")
    return bits.view(bool).reshape(padded.shape)[inside]


def _lengthen(rods: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each true bit and the one before and after it, over the ends of the words."""
    one, last = np.uint64(1), np.uint64(63)
    longer = rods | rods << one | rods >> one
    longer[1:] |= rods[:-1] >> last
    longer[:-1] |= rods[1:] << last
    return longer


@lru_cache
def _columns(
    reach: tuple[int, int, int], spacing: tuple[float, ...], radius: float
) -> list[NDArray[np.intp]]:
    """The columns (n, 2) of a ball's voxels, those first that reach 0 voxels up and down, then 1, ..."""
    steps = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach[:2]], indexing="ij"), -1)
    steps = steps.reshape(-1, 2)
    left = radius**2 - ((steps * spacing[:2]) ** 2).sum(1)
    heights = np.minimum(np.sqrt(np.maximum(left, 0)) // spacing[2], reach[2])
    return [steps[(left >= 0) & (heights == height)] for height in range(reach[2] + 1)]


def _step(
    points: Points,
    others: Points,
    spacing: Sequence[float],
    distances: NDArray[np.float64],
) -> NDArray[np.intp]:
    """Fill in the distances of short steps; which voxels are left."""
    shells = _shells(tuple(spacing))
    margin = np.max([steps.max(0) for _, steps in shells], 0)
    low = np.minimum(points.min(0), others.min(0)) - margin
    shape = np.maximum(points.max(0), others.max(0)) + margin + 1 - low
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    taken = np.zeros(np.prod(shape), dtype=bool)
    taken[(others - low) @ strides] = True
    places, left, tried = (points - low) @ strides, np.arange(len(points)), 0
    for length, steps in shells:
        pays = len(points) - len(left) >= (tried - FREE) * len(points) / PAYS
        if not len(left) or not pays:
            break
        hit = np.zeros(len(left), dtype=bool)
        for step in steps @ strides:
            hit |= taken[places + step]
        distances[left[hit]] = length
        places, left, tried = places[~hit], left[~hit], tried + len(steps)
    return left


@lru_cache
def _shells(spacing: tuple[float, ...]) -> list[tuple[float, NDArray[np.intp]]]:
    """The shortest steps (n, 3), about `STEPS` of them, by their length."""
    reach = (STEPS * np.prod(spacing) * 3 / (4 * np.pi)) ** (1 / 3)
    sides = np.maximum(reach / np.asarray(spacing), 1).astype(int)
    steps = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in sides], indexing="ij"), -1)
    steps = steps.reshape(-1, 3)
    lengths = np.round(np.sqrt(((steps * spacing) ** 2).sum(1)), 12)
    known = min(reach, *((sides + 1) * spacing - 1e-9))  # beyond it some steps are missing
    return [
        (float(length), steps[lengths == length]) for length in np.unique(lengths[lengths <= known])
    ]
