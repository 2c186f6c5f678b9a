"""Views against their formulas, written once more in numpy with the same draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.ndimage import gaussian_filter1d

from vclipseg import views
from vclipseg.views import blur_slices, either, jitter, jittered_and_blurred

VIEWS = ["brightness_contrast", "noise", "bias_field", "gamma", "gaussian_blur"]
each_view = pytest.mark.parametrize("view", [getattr(views, name) for name in VIEWS], ids=VIEWS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(seed=0, shape=(3, 2, 7, 5, 6)):
    return 2 * torch.randn(shape, generator=generator(seed)) + 1


def drawn(rng, low=0.0, high=1.0, count=3):
    """What `views.uniform` draws."""
    return (low + (high - low) * torch.rand(count, generator=rng)).double().numpy()


def naive(view):
    """A view's expected result for `images()` and `generator()`."""
    rng, x = generator(), images().double().numpy()
    out = np.empty_like(x)
    n, channels, *shape = x.shape
    if view == "brightness_contrast":
        contrast, brightness = drawn(rng, 0.5, 1.5), drawn(rng, -0.5, 0.5)
        for i, c in np.ndindex(n, channels):
            low, high = x[i, c].min(), x[i, c].max()
            v = contrast[i] * (x[i, c] - low) / (high - low)
            v = np.clip(v + brightness[i] * v.mean(), 0, 1)
            out[i, c] = low + v * (high - low)
    elif view == "noise":
        sigma = drawn(rng, 0.1, 1.0)
        values = torch.randn(x.shape, generator=rng).double().numpy()
        for i in range(n):
            out[i] = x[i] + np.clip(sigma[i] * values[i], -2 * sigma[i], 2 * sigma[i])
    elif view == "gamma":
        g = np.exp(drawn(rng, -0.5, 0.5))
        for i in range(n):
            out[i] = np.sign(x[i]) * np.abs(x[i]) ** g[i]
    elif view == "bias_field":
        values = torch.rand((n, 4, 4, 4), generator=rng).double().numpy() - 0.5
        grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
        for i in range(n):
            field = sum(
                values[i, a, b, c] * grid[0] ** a * grid[1] ** b * grid[2] ** c
                for a, b, c in itertools.product(range(4), repeat=3)
                if a + b + c <= 3
            )
            out[i] = x[i] * np.exp(field)
    else:
        out[:] = x
        for axis, size in enumerate(shape):
            sigma = drawn(rng, 0.1, 2.0)
            for i, target in itertools.product(range(n), range(size)):
                weights = [math.exp(-((j - target) ** 2) / 2 / sigma[i] ** 2) for j in range(size)]
                row = np.tensordot(weights, np.moveaxis(x[i], axis + 1, 0), 1) / sum(weights)
                np.moveaxis(out[i], axis + 1, 0)[target] = row
            x = out.copy()
    return out


@each_view
def test_view_is_its_formula(view):
    found = view(images(), generator())
    np.testing.assert_allclose(found, naive(view.__name__), rtol=2e-4, atol=1e-4)


@each_view
def test_view_is_a_function_of_the_generator(view):
    x = images()
    first, again, other = (view(x, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, images())  # not in place
    torch.manual_seed(0)
    assert view(x, None).shape == x.shape


@each_view
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_view_of_a_constant_patch_is_finite(view, value):
    assert torch.isfinite(view(torch.full((2, 1, 16, 4, 1), value), generator())).all()


@each_view
def test_view_is_computed_in_full_precision(view):
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        low = view(x, generator())
    assert low.dtype == torch.float32
    assert torch.equal(low, view(x, generator()))


@each_view
def test_patches_change_by_themselves(view):
    """Two equal patches differ after it, and a patch does not depend on its neighbors' content."""
    x = images(shape=(1, 1, 6, 6, 6)).repeat(2, 1, 1, 1, 1)
    first = view(x, generator())
    assert not torch.allclose(first[0], first[1])
    x[1] = images(1, (1, 6, 6, 6))
    torch.testing.assert_close(view(x, generator())[0], first[0])


def test_channels_of_a_patch_are_blurred_and_biased_alike():
    x = images(shape=(2, 1, 6, 6, 6)).repeat(1, 2, 1, 1, 1)
    for view in (views.bias_field, views.gaussian_blur, views.gamma, views.brightness_contrast):
        found = view(x, generator())
        torch.testing.assert_close(found[:, 0], found[:, 1])


def test_blur_inside_is_that_of_scipy():
    x = torch.zeros(1, 1, 25, 25, 25)
    x[0, 0, 10:15, 12, 11:14] = 1
    rng = generator()
    sigmas = [float(drawn(rng, 0.1, 2.0, 1)[0]) for _ in range(3)]
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), sigmas, truncate=6)
    found = views.gaussian_blur(x, generator())
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)
    assert float(found.sum()) == pytest.approx(float(x.sum()), rel=1e-4)


def test_blur_keeps_a_constant_up_to_the_border():
    x = torch.full((1, 1, 9, 4, 5), 3.0)
    torch.testing.assert_close(views.gaussian_blur(x, generator()), x)


def test_brightness_and_contrast_stay_between_the_extremes():
    x = images()
    found = views.brightness_contrast(x, generator())
    assert (found.amin((2, 3, 4)) >= x.amin((2, 3, 4)) - 1e-5).all()
    assert (found.amax((2, 3, 4)) <= x.amax((2, 3, 4)) + 1e-5).all()


def test_noise_is_cut_at_two_standard_deviations():
    x = torch.zeros(1, 1, 40, 40, 40)
    sigma = float(drawn(generator(), 0.1, 1.0, 1)[0])
    found = views.noise(x, generator())
    assert float(found.abs().max()) == pytest.approx(2 * sigma)
    assert float(found.std()) == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sometimes(share):
    x = torch.zeros(2000, 1, 1, 1, 1)
    found = views.sometimes(x + 1, x, share, generator())
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(share, abs=0.04)


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
