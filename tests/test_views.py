from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from vclipseg.views import blur_slices, either, jitter, jittered_and_blurred


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(rows=4):
    return torch.randn(rows, 2, 7, 6, 5, generator=generator())


def test_jitter_is_one_affine_change_an_image():
    images = made()
    drawn = torch.rand(2, 4, 1, 1, 1, 1, generator=generator(3)).flatten(1).numpy()
    for row, found in enumerate(jitter(images, 0.2, generator(3))):
        brightness, contrast = 1 + 0.2 * (2 * drawn[:, row] - 1)
        x = images[row].numpy() * brightness
        np.testing.assert_allclose(found, x.mean() + (x - x.mean()) * contrast, atol=1e-6)
    assert torch.equal(jitter(images, 0.0, generator()).round(decimals=4), images.round(decimals=4))


def test_blur_is_gaussian_along_x_and_y():
    images, sigmas = made(3), torch.tensor([0.15, 0.7, 1.15])
    for image, found, sigma in zip(images, blur_slices(images, sigmas), sigmas, strict=True):
        expected = image.numpy()
        for axis in (1, 2):
            expected = gaussian_filter1d(expected, float(sigma), axis, mode="nearest", radius=4)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_either_takes_whole_rows_half_of_the_time():
    first, second = torch.zeros(1000, 2, 3), torch.ones(1000, 2, 3)
    found = either(first, second, generator())
    assert torch.equal(found.amin((1, 2)), found.amax((1, 2)))
    assert float(found.mean()) == pytest.approx(0.5, abs=0.06)


def test_other_view_differs_a_little_and_leaves_the_images_alone():
    images, untouched = made(8), made(8)
    view = jittered_and_blurred(images, generator())
    assert torch.equal(images, untouched)
    same = [torch.equal(a, b) for a, b in zip(view, images, strict=True)]
    assert any(same)
    assert not all(same)
    assert torch.equal(view, jittered_and_blurred(images, generator()))
    assert torch.isfinite(view).all()
