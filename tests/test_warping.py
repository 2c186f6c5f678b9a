"""Deformed patches, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from vclipseg.warping import random_warp, warp

SHAPE = (12, 10, 7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_strength_is_no_deformation():
    x = torch.randn(2, 3, *SHAPE, generator=generator())
    torch.testing.assert_close(warp(x, random_warp(2, SHAPE, 0.0, generator())), x)


def voxels(places):
    """Where `places` (X, Y, Z, 3) lead, by index (3, X, Y, Z), within the patch."""
    sizes = np.array(SHAPE) - 1
    found = (places.numpy()[..., ::-1] + 1) / 2 * sizes  # grid_sample names the last axis first
    return np.moveaxis(np.clip(found, 0, sizes), -1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_sampled(seed):
    x = torch.randn(2, 1, *SHAPE, generator=generator(seed))
    places = random_warp(2, SHAPE, 0.1, generator(seed))
    for row, where, found in zip(x, places, warp(x, places), strict=True):
        expected = ndimage.map_coordinates(row[0].numpy(), voxels(where), order=1, mode="nearest")
        np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_labels_stay_labels():
    labels = torch.randint(-1, 3, (2, *SHAPE), generator=generator())
    found = warp(labels, random_warp(2, SHAPE, 0.2, generator()))
    assert found.dtype == torch.int64
    assert set(found.unique().tolist()) == {-1, 0, 1, 2}


def test_labels_follow_their_image():
    """The image is the label itself."""
    smooth = torch.zeros(1, 24, 24, 24)
    smooth[:, :, 12:] = 1
    places = random_warp(1, (24, 24, 24), 0.08, generator())
    image, label = warp(smooth[:, None], places)[:, 0], warp(smooth.long(), places)
    assert not torch.equal(label, smooth.long())
    clear = (image - 0.5).abs() > 0.01
    assert torch.equal((image > 0.5)[clear], (label == 1)[clear])


@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_nothing_moves_farther_than_the_strength(strength):
    still = random_warp(3, SHAPE, 0.0, generator())
    moved = (random_warp(3, SHAPE, strength, generator()) - still).abs() / 2  # a side is 2
    assert 0.5 * strength < moved.max() <= strength + 1e-6


def test_each_patch_has_its_own():
    places = random_warp(2, SHAPE, 0.1, generator())
    assert not torch.allclose(places[0], places[1])
    assert torch.equal(places, random_warp(2, SHAPE, 0.1, generator()))


def test_a_share_of_the_patches_is_deformed():
    still = random_warp(1, SHAPE, 0.0, generator())
    places = random_warp(40, SHAPE, 0.1, generator(), share=0.5)
    deformed = [not torch.allclose(row, still[0], atol=1e-6) for row in places]
    assert 10 < sum(deformed) < 30
