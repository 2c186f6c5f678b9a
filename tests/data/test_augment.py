from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vclipseg.data.augment import AugmentSettings, change_intensity, draw, place

TURNS = AugmentSettings(rotate_flip=True)
PLAIN = AugmentSettings()
SHAPE = (9, 7, 6)


def rng(seed=0):
    return np.random.default_rng(seed)


def numbered(shape=SHAPE):
    """Labels in which every voxel has its own value."""
    return np.arange(np.prod(shape)).reshape(shape)


def drawn(augment, seed=0, shape=SHAPE, patch=(4, 5, 3), labels=None):
    return draw(augment, rng(seed), shape, patch, labels)


# Where the patch lies


def test_parameters_are_a_function_of_the_generator():
    assert drawn(TURNS, seed=3) == drawn(TURNS, seed=3)
    assert len({drawn(TURNS, seed=seed) for seed in range(20)}) == 20


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 14)] * 3), st.integers(0, 99)
)
def test_image_and_labels_stay_together(shape, patch, seed):
    parameters = draw(TURNS, rng(seed), shape, patch)
    labels = numbered(shape)
    placed = place(parameters, labels)
    assert placed.shape == patch
    assert np.array_equal(place(parameters, np.stack([labels, -labels])), [placed, -placed])


@pytest.mark.parametrize("seed", range(12))
def test_turn_then_flip_then_cut(seed):
    """k quarter turns in the XY plane, then always a flip of X or Y."""
    p = drawn(TURNS, seed)
    turned = np.flip(np.rot90(numbered(), p.quarter_turns, axes=(0, 1)), p.flip_axis)
    x, y, z = p.start
    assert np.array_equal(place(p, numbered()), turned[x : x + 4, y : y + 5, z : z + 3])


def test_every_turn_and_flip_comes_as_often():
    kinds = Counter((p.quarter_turns, p.flip_axis) for p in (drawn(TURNS, s) for s in range(800)))
    assert set(kinds) == {(k, axis) for k in range(4) for axis in range(2)}
    assert min(kinds.values()) > 60


def test_without_rotate_flip_a_patch_is_a_piece_of_the_volume():
    for seed in range(20):
        p = drawn(PLAIN, seed)
        x, y, z = p.start
        piece = numbered()[x : x + 4, y : y + 5, z : z + 3]
        assert np.array_equal(place(p, numbered()), piece)


def test_patches_reach_every_place():
    starts = [drawn(PLAIN, seed).start for seed in range(300)]
    for axis, room in enumerate((5, 2, 3)):
        assert {start[axis] for start in starts} == set(range(room + 1))


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        (6, 16, [0] * 5 + [0, 1, 2, 3, 4, 5] + [5] * 5),
        (6, 9, [0, 0, 0, 1, 2, 3, 4, 5, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_smaller_volumes_are_centered_and_their_border_repeated(size, patch, expected):
    labels = np.broadcast_to(np.arange(size), (4, 4, size))
    p = draw(PLAIN, rng(), labels.shape, (4, 4, patch))
    assert place(p, labels)[0, 0].tolist() == expected
    image = labels[None].astype(np.float32)
    assert place(p, image)[0, 0, 0].tolist() == expected


def test_a_patch_is_a_copy():
    image = np.zeros((1, *SHAPE), dtype=np.float32)
    p = drawn(PLAIN)
    place(p, image)[:] = 1
    assert not image.any()
    assert place(p, image).flags.c_contiguous


# Zoom

ZOOMED = AugmentSettings(zoom=0.5)


def test_without_zoom_what_is_cut_is_the_patch():
    assert drawn(TURNS).extent == drawn(TURNS).patch


def test_extents_are_in_their_range_each_axis_by_itself():
    extents = [drawn(ZOOMED, seed, patch=(40, 40, 40)).extent for seed in range(200)]
    sizes = np.array(extents)
    assert sizes.min() >= round(40 * 2**-0.5)
    assert sizes.max() <= round(40 * 2**0.5)
    assert sizes.min() < 31
    assert sizes.max() > 52
    assert len({tuple(sorted(extent)) for extent in extents}) > 150


@pytest.mark.parametrize("seed", range(8))
def test_a_zoomed_image_and_its_labels_stay_together(seed):
    """Labels of a ramp, cut at a value, are the ramp's own voxels above it, but for the boundary."""
    ramp = np.broadcast_to(np.arange(40.0, dtype=np.float32)[:, None, None], (40, 30, 20))
    p = draw(replace_zoom(TURNS), rng(seed), ramp.shape, (16, 14, 12))
    image = place(p, ramp[None].copy())[0]
    labels = place(p, (ramp >= 20).astype(np.uint8))
    assert image.shape == labels.shape == (16, 14, 12)
    sure = np.abs(image - 19.5) > 1
    assert np.array_equal(labels[sure], (image >= 19.5)[sure])


def replace_zoom(settings):
    return settings.model_copy(update={"zoom": 0.5})


def test_a_zoomed_patch_spans_what_was_cut():
    """Twice the extent on 1D ramps: neighbours differ by two voxels."""
    ramp = np.broadcast_to(np.arange(40.0, dtype=np.float32), (4, 4, 40))[None].copy()
    p = replace(
        drawn(PLAIN, patch=(4, 4, 16)), start=(0, 0, 4), extent=(4, 4, 32), patch=(4, 4, 16)
    )
    assert np.allclose(np.diff(place(p, ramp)[0, 0, 0]), 2)
    assert place(p, ramp)[0, 0, 0, 0] == 4.5


# Rotation


def blob(shape=(40, 40, 30)):
    """An image with an ellipsoid that lies off center and has no symmetry along the axes."""
    x, y, z = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij")
    return ((x - 18) / 9) ** 2 + ((y - 22) / 5) ** 2 + ((z - 14) / 3 + (x - 18) / 8) ** 2


def turned_by(rotation, extent, patch):
    return replace(
        drawn(PLAIN, shape=(40, 40, 30), patch=patch),
        start=(0, 0, 0),
        extent=extent,
        rotation=rotation,
    )


def test_a_quarter_turn_is_a_quarter_turn():
    volume = rng().normal(0, 1, (1, 12, 12, 9)).astype(np.float32)
    p = turned_by(((0, 1, 0), (-1, 0, 0), (0, 0, 1)), (12, 12, 9), (12, 12, 9))
    np.testing.assert_allclose(place(p, volume), np.rot90(volume, axes=(1, 2)), atol=1e-5)
    labels = numbered((12, 12, 9))
    assert np.array_equal(place(p, labels), np.rot90(labels))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("augment", [PLAIN, TURNS, ZOOMED], ids=["alone", "turned", "zoomed"])
def test_a_rotated_patch_shows_its_place_in_millimeters(seed, augment):
    """An image that is its own x, y, z in mm: steps in the patch are rotations of steps of a voxel."""
    spacing = (0.8, 0.8, 2.0)
    shape, patch = (60, 60, 40), (12, 10, 8)
    mm = np.stack(
        np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    )
    p = draw(augment.model_copy(update={"rotate": 20.0}), rng(seed), shape, patch, None, spacing)
    p = replace(p, start=tuple((n - e) // 2 for n, e in zip(shape, p.extent, strict=True)))
    places = place(p, mm.astype(np.float32))
    steps = np.stack(
        [np.diff(places, axis=axis).mean((1, 2, 3)) / spacing[axis - 1] for axis in (1, 2, 3)],
        axis=1,
    )
    lengths = np.linalg.norm(steps, axis=0)
    if not augment.zoom:
        np.testing.assert_allclose(lengths, 1, atol=1e-3)
    gram = (steps / lengths).T @ (steps / lengths)
    np.testing.assert_allclose(gram, np.eye(3), atol=1e-3)
    rotated = not np.allclose(np.abs(steps / lengths).max(0), 1)
    assert rotated


def test_angles_are_in_their_range():
    """A rotation around one axis of at most r degrees three times: never more than 3 r in all."""
    settings = AugmentSettings(rotate=10.0)
    traces = [
        np.trace(drawn(settings, seed, shape=(40, 40, 30), patch=(8, 8, 8)).rotation)
        for seed in range(200)
    ]
    angles = np.degrees(np.arccos((np.array(traces) - 1) / 2))
    assert angles.max() < 10 * 3**0.5 + 0.5
    assert angles.max() > 12
    assert angles.min() < 3


@pytest.mark.parametrize("seed", range(8))
def test_a_rotated_image_and_its_labels_stay_together(seed):
    shape = blob()
    settings = TURNS.model_copy(update={"rotate": 25.0, "zoom": 0.3})
    p = draw(settings, rng(seed), shape.shape, (16, 14, 12))
    image = place(p, shape[None])[0]
    labels = place(p, (shape < 4).astype(np.uint8))
    sure = np.abs(image - 4) > 2.5
    assert image.shape == labels.shape == (16, 14, 12)
    assert np.array_equal(labels[sure], (image < 4)[sure])


def test_no_rotation_draws_and_changes_nothing():
    for seed in range(5):
        assert drawn(PLAIN, seed).rotation is None
        assert drawn(ZOOMED, seed) == drawn(ZOOMED.model_copy(update={"rotate": 0.0}), seed)


# Around the foreground


def with_two_classes():
    """A voxel of class 1 in one corner, many of class 2 in the opposite one."""
    labels = np.zeros((20, 18, 16), dtype=np.uint8)
    labels[0, 0, 0] = 1
    labels[-4:, -4:, -4:] = 2
    return labels


@pytest.mark.parametrize("augment", [PLAIN, TURNS], ids=["plain", "turned"])
def test_foreground_share_of_one_always_shows_foreground(augment):
    labels = with_two_classes()
    always = augment.model_copy(update={"foreground_share": 1.0})
    shown = Counter()
    for seed in range(100):
        placed = place(draw(always, rng(seed), labels.shape, (5, 6, 4), labels), labels)
        assert placed.any()
        shown.update(np.unique(placed[placed > 0]).tolist())
    assert min(shown[1], shown[2]) > 30  # classes are drawn, not voxels


def test_foreground_share_is_a_share():
    labels = np.zeros((40, 40, 40), dtype=np.uint8)
    labels[20, 20, 20] = 1
    half = AugmentSettings(foreground_share=0.5)
    patches = [
        place(draw(half, rng(s), labels.shape, (4, 4, 4), labels), labels) for s in range(400)
    ]
    assert 0.4 < np.mean([patch.any() for patch in patches]) < 0.6


def test_foreground_lies_anywhere_in_its_patch():
    labels = np.zeros((30, 30, 30), dtype=np.uint8)
    labels[15, 15, 15] = 1
    always = AugmentSettings(foreground_share=1.0)
    places = set()
    for seed in range(100):
        placed = place(draw(always, rng(seed), labels.shape, (4, 4, 4), labels), labels)
        places.add(tuple(np.argwhere(placed)[0]))
    assert len(places) > 30
    assert np.ptp(list(places), axis=0).tolist() == [3, 3, 3]


def test_labels_without_foreground_or_smaller_than_the_patch():
    always = AugmentSettings(foreground_share=1.0)
    empty = np.zeros(SHAPE, dtype=np.uint8)
    assert place(draw(always, rng(), SHAPE, (4, 4, 4), empty), empty).shape == (4, 4, 4)
    thin = np.ones((9, 9, 2), dtype=np.uint8)
    assert place(draw(always, rng(), thin.shape, (4, 4, 8), thin), thin).all()


# Intensity


def patch_of(channels=1, seed=0):
    return rng(seed).normal(100, 20, (channels, 8, 8, 8)).astype(np.float32)


def test_no_strength_changes_nothing():
    patch = patch_of()
    assert change_intensity(drawn(PLAIN), patch) is patch


@pytest.mark.parametrize("strength", [0.1, 1.0, 2.0])
def test_drawn_intensities_are_in_their_ranges(strength):
    found = [drawn(AugmentSettings(intensity=strength), seed) for seed in range(300)]
    gammas = np.log2([p.gamma for p in found])
    scales, shifts = [p.scale for p in found], [p.shift for p in found]
    noises = np.array([p.noise for p in found])
    ranges = (
        (gammas, -strength, strength),
        (scales, 1 - strength / 2, 1 + strength / 2),
        (shifts, -strength / 4, strength / 4),
    )
    for values, low, high in ranges:
        assert low <= np.min(values) < low + 0.1 * (high - low)
        assert high >= np.max(values) > high - 0.1 * (high - low)
    assert 0.4 < (noises > 0).mean() < 0.6
    assert 0.08 * strength < noises.max() <= 0.1 * strength


def test_intensity_formula():
    """v in [0, 1] becomes a * v^g + b, each channel between its own extremes."""
    p = replace(drawn(PLAIN), gamma=1.7, scale=0.8, shift=0.1)
    patch = patch_of(2)
    patch[1] *= 30
    changed = change_intensity(p, patch)
    for before, after in zip(patch, changed, strict=True):
        low, extent = before.min(), np.ptp(before)
        expected = low + extent * (0.8 * ((before - low) / extent) ** 1.7 + 0.1)
        np.testing.assert_allclose(after, expected, rtol=1e-4)
    assert changed.dtype == np.float32


def test_noise_is_replayed_and_of_the_size_drawn():
    p = replace(drawn(PLAIN), noise=0.1, noise_seed=5)
    patch = rng().uniform(0, 10, (1, 24, 24, 24)).astype(np.float32)
    noise = change_intensity(p, patch) - patch
    assert noise.std() == pytest.approx(0.1 * np.ptp(patch), rel=0.05)
    assert np.array_equal(change_intensity(p, patch), change_intensity(p, patch))
    other = change_intensity(replace(p, noise_seed=6), patch)
    assert not np.array_equal(change_intensity(p, patch), other)


def test_the_patch_before_is_left_as_it_was():
    patch = patch_of()
    change_intensity(drawn(AugmentSettings(intensity=1.0)), patch)
    assert np.array_equal(patch, patch_of())


def test_a_constant_patch_stays_finite():
    p = replace(drawn(PLAIN), gamma=0.5, noise=0.1)
    changed = change_intensity(p, np.full((1, 4, 4, 4), 7, dtype=np.float32))
    assert np.isfinite(changed).all()
    np.testing.assert_allclose(changed, 7, atol=1e-3)


# On a device: the same for tensors

EVERYTHING = AugmentSettings(rotate_flip=True, zoom=0.4, rotate=20, intensity=0.8)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("patch", [(8, 7, 6), (24, 20, 22)], ids=["inside", "beyond"])
def test_a_tensor_is_cut_and_changed_as_an_array_is(seed, patch):
    image = rng(seed).normal(0, 1, (2, 18, 16, 14)).astype(np.float32)
    labels = rng(seed).integers(0, 3, (18, 16, 14)).astype(np.uint8)
    p = replace(drawn(EVERYTHING, seed, image.shape[1:], patch), noise=0.0)
    placed, placed_labels = place(p, image), place(p, labels)
    tensor, tensor_labels = (place(p, torch.from_numpy(array)) for array in (image, labels))
    assert np.array_equal(tensor_labels.numpy(), placed_labels)
    assert tensor_labels.dtype == torch.uint8
    np.testing.assert_allclose(tensor.numpy(), placed, rtol=1e-6)
    changed, expected = change_intensity(p, tensor), change_intensity(p, placed)
    np.testing.assert_allclose(changed.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_noise_of_a_tensor_is_replayed_and_of_the_size_drawn():
    p = replace(drawn(PLAIN), noise=0.1, noise_seed=2**32 - 1)
    patch = torch.from_numpy(rng().uniform(0, 10, (1, 24, 24, 24)).astype(np.float32))
    noise = change_intensity(p, patch) - patch
    assert float(noise.std()) == pytest.approx(1.0, rel=0.05)
    assert torch.equal(change_intensity(p, patch), change_intensity(p, patch))
    other = change_intensity(replace(p, noise_seed=6), patch)
    assert not torch.equal(change_intensity(p, patch), other)


def test_a_tensor_that_is_not_changed_is_left_alone():
    patch = torch.zeros(1, 4, 4, 4)
    assert change_intensity(drawn(PLAIN), patch) is patch
    volume = torch.zeros(1, *SHAPE)
    place(drawn(PLAIN), volume)[:] = 1
    assert not volume.any()
