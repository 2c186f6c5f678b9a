"""Distances by steps and by trees are the same, and dilated masks what distances say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import KDTree

from vclipseg import nearest as module
from vclipseg.nearest import dilate, nearest

SPACINGS = [(1, 1, 1), (0.625, 0.625, 0.625), (0.8, 0.8, 3.0), (0.3, 1.1, 9.0)]


def naive(points, others, spacing):
    return KDTree(others * np.asarray(spacing)).query(points * np.asarray(spacing))[0]


def some(seed, count, size):
    return np.unique(np.random.default_rng(seed).integers(0, size, (count, 3)), axis=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("size", [4, 12, 40, 300], ids=["dense", "near", "mixed", "far"])
def test_steps_and_trees_agree(spacing, size):
    points, others = some(0, 400, size), some(1, 300, size)
    np.testing.assert_allclose(
        nearest(points, others, spacing), naive(points, others, spacing), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("radius", [0.0, 1.0, 2.0, 25.0])
@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 20, 64), (12, 1, 130), (5, 6, 1)])
def test_dilated_is_what_lies_within_the_radius(spacing, radius, shape):
    mask = np.random.default_rng(8).random(shape) < 0.02
    mask[0, 0, 0] = mask[-1, -1, -1] = True
    distances = ndimage.distance_transform_edt(~mask, sampling=spacing)
    assert np.array_equal(dilate(mask, spacing, radius + 1e-6), distances <= radius + 1e-6)


def test_nothing_dilated_is_nothing():
    assert not dilate(np.zeros((3, 4, 5), bool), (1, 1, 1), 2).any()


@pytest.mark.parametrize("apart", [0, 1, 5, 6, 200])
def test_single_voxels(apart):
    distance = nearest(np.array([[3, 3, 3]]), np.array([[3, 3 + apart, 3]]), (1, 0.5, 2))
    assert distance == pytest.approx([0.5 * apart])


def test_indices_may_be_anywhere():
    points, others = some(4, 50, 9), some(5, 50, 9)
    moved = nearest(points - 1000, others - 1000, (1, 1, 1))
    assert np.array_equal(moved, nearest(points, others, (1, 1, 1)))


def test_steps_stop_when_they_do_not_pay(monkeypatch):
    """Two far clouds: a few shells without a voxel found, then one tree."""
    trees = []
    monkeypatch.setattr(
        module, "KDTree", lambda points: trees.append(len(points)) or KDTree(points)
    )
    points, others = some(6, 200, 10), some(7, 200, 10) + 500
    assert nearest(points, others, (1, 1, 1)).min() > 400
    assert trees == [len(others)]


@pytest.mark.parametrize("apart", [1, 2])
def test_surfaces_that_share_no_voxel_need_no_tree(monkeypatch, apart):
    """No voxel is found at first, and then all of them."""
    monkeypatch.setattr(module, "KDTree", None)
    plane = np.argwhere(np.ones((30, 30, 1)))
    assert (nearest(plane, plane + np.array([0, 0, apart]), (1, 1, 1)) == apart).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_shells_hold_every_step_up_to_their_last(spacing):
    shells = module._shells(spacing)
    sides = [np.arange(-40, 41)] * 3
    steps = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
    lengths = np.sqrt(((steps * spacing) ** 2).sum(1))
    assert sum(len(s) for _, s in shells) == (lengths <= shells[-1][0] + 1e-9).sum()
    assert [length for length, _ in shells] == sorted({length for length, _ in shells})
    assert len(shells[0][1]) == 1
