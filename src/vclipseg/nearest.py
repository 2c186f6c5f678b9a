"""Exact distances between sets of voxels, nearest first."""

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


def nearest(
    points: Points, others: Points, spacing: Sequence[float], limit: float = np.inf
) -> NDArray[np.float64]:
    """How far each voxel is from the nearest other one.

    Surfaces that nearly agree lie within a few voxels: there each step to a neighbor, the shortest first,
    is tried for all voxels at once. A tree is asked for what is left.

    Args:
        points: (N, 3) indices.
        others: (M, 3) indices, at least one.
        spacing: voxel size.
        limit: farther ones need not be told apart.

    Returns:
        (N,) in the unit of `spacing`; infinite where it is more than `limit`.
    """
    distances = np.full(len(points), np.inf)
    left, reach = _step(points, others, spacing, limit, distances)
    if len(left) and reach < limit:
        tree = KDTree(others * spacing)
        distances[left] = tree.query(points[left] * spacing, distance_upper_bound=limit)[0]
    return distances


def _step(
    points: Points,
    others: Points,
    spacing: Sequence[float],
    limit: float,
    distances: NDArray[np.float64],
) -> tuple[NDArray[np.intp], float]:
    """Fill in the distances of short steps; which voxels are left, and up to which length was tried."""
    shells = _shells(tuple(spacing))
    margin = np.max([steps.max(0) for _, steps in shells], 0)
    low = np.minimum(points.min(0), others.min(0)) - margin
    shape = np.maximum(points.max(0), others.max(0)) + margin + 1 - low
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    taken = np.zeros(np.prod(shape), dtype=bool)
    taken[(others - low) @ strides] = True
    places, left, tried, reach = (points - low) @ strides, np.arange(len(points)), 0, 0.0
    for length, steps in shells:
        pays = len(points) - len(left) >= (tried - FREE) * len(points) / PAYS
        if length > limit or not len(left) or not pays:
            break
        hit = np.zeros(len(left), dtype=bool)
        for step in steps @ strides:
            hit |= taken[places + step]
        distances[left[hit]] = length
        places, left, tried, reach = places[~hit], left[~hit], tried + len(steps), length
    return left, limit if length > limit else reach


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
