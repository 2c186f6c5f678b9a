"""Deformed patches, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from vclipseg.warping import random_warp

SHAPE = (12, 10, 7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_strength_is_no_deformation():
    x = torch.randn(2, 3, *SHAPE, generator=generator())
    torch.testing.assert_close(random_warp(2, SHAPE, 0.0, generator())(x), x)


def voxels(places):
    """Where `places` (X, Y, Z, 3) lead, by index (3, X, Y, Z), within the patch."""
    sizes = np.array(SHAPE) - 1
    found = (places.numpy()[..., ::-1] + 1) / 2 * sizes  # grid_sample names the last axis first
    return np.moveaxis(np.clip(found, 0, sizes), -1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_sampled(seed):
    x = torch.randn(2, 1, *SHAPE, generator=generator(seed))
    warp = random_warp(2, SHAPE, 0.1, generator(seed))
    for row, where, found in zip(x, warp.places, warp(x), strict=True):
        expected = ndimage.map_coordinates(row[0].numpy(), voxels(where), order=1, mode="nearest")
        np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4, 2), (112, 112, 80)])
def test_places_are_exact_in_mixed_precision(shape):
    """Half a thousandth of a voxel; bfloat16 would be off by a tenth."""
    expected = F.affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = random_warp(1, shape, 0.0, generator()).places[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_labels_stay_labels():
    labels = torch.randint(-1, 3, (2, *SHAPE), generator=generator())
    found = random_warp(2, SHAPE, 0.2, generator())(labels)
    assert found.dtype == torch.int64
    assert set(found.unique().tolist()) == {-1, 0, 1, 2}


def test_labels_follow_their_image():
    """The image is the label itself."""
    smooth = torch.zeros(1, 24, 24, 24)
    smooth[:, :, 12:] = 1
    warp = random_warp(1, (24, 24, 24), 0.08, generator())
    image, label = warp(smooth[:, None])[:, 0], warp(smooth.long())
    assert not torch.equal(label, smooth.long())
    clear = (image - 0.5).abs() > 0.01
    assert torch.equal((image > 0.5)[clear], (label == 1)[clear])


@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_nothing_moves_farther_than_the_strength(strength):
    still = random_warp(3, SHAPE, 0.0, generator()).places
    moved = (random_warp(3, SHAPE, strength, generator()).places - still).abs() / 2  # a side is 2
    assert 0.5 * strength < moved.max() <= strength + 1e-6


def test_each_patch_has_its_own():
    places = random_warp(2, SHAPE, 0.1, generator()).places
    assert not torch.allclose(places[0], places[1])
    assert torch.equal(places, random_warp(2, SHAPE, 0.1, generator()).places)


def test_a_share_of_the_patches_is_deformed_and_the_others_lie_as_they_are():
    x = torch.randn(40, 1, *SHAPE, generator=generator())
    warp, every = (random_warp(40, SHAPE, 0.1, generator(), share=s) for s in (0.5, 1.0))
    assert 10 < len(warp.moved) < 30
    for row, (plain, found, moved) in enumerate(zip(x, warp(x), every(x), strict=True)):
        torch.testing.assert_close(found, moved if row in warp.moved else plain)
        assert row in warp.moved or torch.equal(found, plain)


def test_where_none_is_deformed():
    x = torch.randn(2, 1, *SHAPE, generator=generator())
    assert random_warp(2, SHAPE, 0.1, generator(), share=0.0)(x) is x


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 8), (8, 8)])
def test_a_part_of_the_batch_has_its_own_deformations(first, last):
    x = torch.randn(8, 1, *SHAPE, generator=generator())
    warp = random_warp(8, SHAPE, 0.1, generator(), share=0.5)
    assert torch.equal(warp.rows(first, last)(x[first:last]), warp(x)[first:last])
