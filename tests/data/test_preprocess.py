from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import affines, nnunet_folder, save_json, shapes, world_grid

from vclipseg.data.datasets import open_dataset
from vclipseg.data.intensity import normalize
from vclipseg.data.preprocess import (
    Plan,
    PlanSettings,
    Trace,
    load_plan,
    make_plan,
    prepare_image,
    prepare_labels,
    restore,
    restore_mask,
    save_plan,
)
from vclipseg.data.resample import resample_image, resample_labels
from vclipseg.data.trace import resampled_affine
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError, UsageError

PLAN = Plan(spacing=(1.0, 1.0, 1.0), intensity=("none",))
DIRECTION = np.array([0.3, -0.5, 0.7])
RNG = np.random.default_rng(0)


def ramp(shape, affine) -> np.ndarray:
    """An image that is a linear function of world coordinates, float32 `(X, Y, Z)`."""
    grid = world_grid(shape, affine) - affine[:3, 3].reshape(3, 1, 1, 1)
    return np.tensordot(DIRECTION, grid, 1).astype(np.float32)


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=np.float32)[labels].transpose(3, 0, 1, 2)


def inner(array: np.ndarray, margin: int) -> np.ndarray:
    return array[(..., *[slice(margin, n - margin) for n in array.shape[-3:]])]


plans = st.builds(
    lambda spacing, orientation: Plan(
        spacing=spacing, orientation=orientation, intensity=("none",)
    ),
    st.tuples(*[st.floats(0.5, 4.0)] * 3),
    st.sampled_from(["RAS", "LPS", "PIR"]),
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, affine=affines(), orientation=st.sampled_from(["RAS", "LIP"]), data=st.data())
def test_prepared_voxels_are_where_their_affine_says(shape, affine, orientation, data):
    """Linear interpolation keeps a linear function of the world, wherever it reaches."""
    volume = Volume(ramp(shape, affine)[None], affine)
    spacing = np.sort(volume.spacing) * 0 + data.draw(st.floats(0.5, 1.9)) * min(volume.spacing)
    plan = Plan(spacing=tuple(spacing), orientation=orientation, intensity=("none",))
    prepared, trace = prepare_image(volume, plan)
    expected = ramp(prepared.shape, prepared.affine)
    expected += DIRECTION @ (prepared.affine[:3, 3] - affine[:3, 3])
    steps = np.array(trace.prepared_shape) / trace.cropped_shape
    keep = tuple(
        slice(m, n - m) for m, n in zip(np.ceil(steps / 2).astype(int), prepared.shape, strict=True)
    )
    np.testing.assert_allclose(
        prepared.array[0][keep], expected[keep], atol=1e-3 * np.abs(expected).max()
    )


@settings(max_examples=60, deadline=None)
@given(shape=shapes, affine=affines(), plan=plans)
def test_restored_probabilities_are_where_the_scan_is(shape, affine, plan):
    volume = Volume(np.zeros((1, *shape), dtype=np.float32), affine)
    prepared, trace = prepare_image(volume, plan)
    values = ramp(prepared.shape, prepared.affine) + DIRECTION @ prepared.affine[:3, 3]
    restored = restore(np.stack([values, -values]), trace)
    expected = ramp(shape, affine) + DIRECTION @ affine[:3, 3]
    assert restored.shape == (2, *shape)
    low, high = values.min(), values.max()
    tolerance = 1e-4 * max(1.0, np.abs(expected).max())
    outside = np.abs(restored[0] - expected) > tolerance
    # only voxels beyond the outermost prepared centres may differ, and they take the edge's value
    indices = np.linalg.inv(prepared.affine) @ np.concatenate(
        [world_grid(shape, affine).reshape(3, -1), np.ones((1, int(np.prod(shape))))]
    )
    last = np.array(prepared.shape)[:, None] - 1
    beyond = ((indices[:3] < -1e-6) | (indices[:3] > last + 1e-6)).any(axis=0).reshape(shape)
    assert not (outside & ~beyond).any()
    assert restored[0].min() >= low - tolerance
    assert restored[0].max() <= high + tolerance


@settings(max_examples=40, deadline=None)
@given(shape=shapes, affine=affines(), orientation=st.sampled_from(["RAS", "LPS", "SAL"]))
def test_without_resampling_the_way_back_is_exact(shape, affine, orientation):
    labels = np.random.default_rng(1).integers(0, 3, shape).astype(np.uint8)
    volume = Volume(labels[None].astype(np.float32), affine)
    plan = Plan(spacing=(1, 1, 1), orientation=orientation, intensity=("none",))
    turned, trace = prepare_image(volume, plan)
    plan = plan.model_copy(update={"spacing": tuple(np.abs(_turned_spacing(trace)))})
    turned, trace = prepare_image(volume, plan)
    prepared = prepare_labels(Volume(labels, affine), trace)
    np.testing.assert_array_equal(prepared.array, turned.array[0])
    mask = restore_mask(one_hot(prepared.array, 3), trace)
    np.testing.assert_array_equal(mask.array, labels)
    np.testing.assert_array_equal(mask.affine, affine)
    assert mask.array.dtype == np.uint8


def _turned_spacing(trace: Trace) -> np.ndarray:
    steps = np.linalg.norm(trace.prepared_affine[:3, :3], axis=0)
    return steps * trace.prepared_shape / trace.cropped_shape


@settings(max_examples=40, deadline=None)
@given(affine=affines(), plan=plans)
def test_a_restored_mask_overlays_the_labels_in_the_world(affine, plan):
    shape = (18, 20, 16)
    centre = np.array(shape).reshape(3, 1, 1, 1) / 2
    labels = (np.square((np.indices(shape) - centre) / 6).sum(axis=0) < 1).astype(np.uint8)
    _, trace = prepare_image(Volume(labels[None].astype(np.float32), affine), plan)
    prepared = prepare_labels(Volume(labels, affine), trace)
    extent = np.ptp(np.argwhere(prepared.array), axis=0) + 1 if prepared.array.any() else 0
    if np.min(extent) < 3:  # the grid is coarser than the object along an axis
        return
    mask = restore_mask(one_hot(prepared.array, 2), trace)
    np.testing.assert_array_equal(mask.affine, affine)
    places = [
        world_grid(v.shape, v.affine)[:, v.array > 0].mean(axis=1)
        for v in (Volume(labels, affine), prepared, mask)
    ]
    step = max(*Volume(labels, affine).spacing, *prepared.spacing)
    np.testing.assert_allclose(places[1], places[0], atol=0.5 * step)
    np.testing.assert_allclose(places[2], places[0], atol=0.5 * step)


def test_mask_is_the_argmax_of_the_restored_probabilities():
    image = Volume(np.zeros((1, 9, 7, 6), dtype=np.float32), np.diag([-1.0, 2.0, 1.5, 1.0]))
    _, trace = prepare_image(image, Plan(spacing=(1.3, 1.0, 2.0), intensity=("none",)))
    probs = RNG.dirichlet(np.ones(5), trace.prepared_shape).transpose(3, 0, 1, 2).astype("f")
    expected = restore(probs, trace).argmax(axis=0)
    np.testing.assert_array_equal(restore_mask(probs, trace).array, expected)
    np.testing.assert_array_equal(restore_mask(torch.from_numpy(probs), trace).array, expected)
    half = restore(torch.from_numpy(probs).half(), trace)
    np.testing.assert_allclose(half, restore(probs, trace), atol=2e-3)


def test_crop_is_cut_from_the_image_and_restored_as_background():
    image = np.zeros((1, 12, 10, 8), dtype=np.float32)
    image[0, 3:9, 2:7, 1:6] = RNG.normal(5, 1, (6, 5, 5))
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    plan = PLAN.model_copy(update={"crop": "nonzero"})
    prepared, trace = prepare_image(Volume(image, affine), plan)
    assert prepared.shape == (6, 5, 5)
    probs = one_hot(np.ones(prepared.shape, dtype=int), 2)
    mask, whole = restore_mask(probs, trace), restore(probs, trace)
    np.testing.assert_array_equal(mask.array, image[0] != 0)
    np.testing.assert_allclose(whole.sum(axis=0), 1)
    np.testing.assert_array_equal(whole[0], image[0] == 0)
    empty, _ = prepare_image(Volume(image * 0, affine), plan)
    assert empty.shape == (12, 10, 8)


@pytest.mark.parametrize(
    ("old", "new", "first", "last"),
    [(4, 2, 0.5, 2.5), (2, 4, -0.25, 1.25), (3, 1, 1.0, 1.0), (5, 5, 0.0, 4.0)],
)
def test_corners_of_the_field_of_view_stay(old, new, first, last):
    affine = resampled_affine(np.eye(4), (old, 3, 3), (new, 3, 3))
    assert affine[0, 3] == pytest.approx(first)
    assert affine[0, 0] * (new - 1) + affine[0, 3] == pytest.approx(last)


def test_shrinking_a_lot_averages_instead_of_skipping():
    noise = RNG.normal(0, 1, (1, 60, 8, 8)).astype(np.float32)
    small = resample_image(noise, (10, 8, 8))
    skipped = resample_image(noise[:, :20], (10, 8, 8))  # a factor of 2 is not smoothed
    assert small.std() < 0.8 * skipped.std()


def test_labels_resample_to_values_they_have():
    labels = RNG.choice([0, 2, 7], (9, 8, 7)).astype(np.uint8)
    for shape in ((5, 11, 3), (18, 16, 14)):
        resampled = resample_labels(labels, shape)
        assert resampled.shape == shape
        assert resampled.dtype == np.uint8
        assert set(np.unique(resampled)) <= {0, 2, 7}
    # three times finer: each old centre is a new centre
    np.testing.assert_array_equal(resample_labels(labels, (27, 24, 21))[1::3, 1::3, 1::3], labels)


def test_labels_off_the_grid_of_the_image_are_refused():
    image = Volume(np.zeros((1, 6, 6, 6), dtype=np.float32), np.eye(4))
    _, trace = prepare_image(image, PLAN)
    with pytest.raises(DataError, match="shape"):
        prepare_labels(Volume(np.zeros((6, 6, 5), dtype=np.uint8), np.eye(4)), trace)
    moved = np.eye(4)
    moved[0, 3] = 3
    with pytest.raises(DataError, match=r"3\.0 mm"):
        prepare_labels(Volume(np.zeros((6, 6, 6), dtype=np.uint8), moved), trace)
    moved[0, 3] = 1e-3
    assert prepare_labels(Volume(np.zeros((6, 6, 6), dtype=np.uint8), moved), trace).shape


def test_trace_survives_json():
    image = Volume(np.ones((1, 6, 7, 8), dtype=np.float32), np.diag([-1.0, 2.0, 0.1 + 0.2, 1.0]))
    prepared, trace = prepare_image(image, PLAN)
    again = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    assert again == trace
    np.testing.assert_array_equal(again.prepared_affine, prepared.affine)


def test_probs_of_another_shape_are_refused():
    _, trace = prepare_image(Volume(np.ones((1, 6, 6, 6), dtype=np.float32), np.eye(4)), PLAN)
    for bad in (np.zeros((2, 6, 6, 5)), np.zeros((6, 6, 6))):
        with pytest.raises(ValueError, match="probs"):
            restore_mask(bad, trace)


# ---- intensity -------------------------------------------------------------------------


def test_zscore_of_all_and_of_nonzero_voxels():
    image = RNG.normal(50, 5, (8, 8, 8)).astype(np.float32)
    whole = normalize(image, "zscore")
    assert whole.mean() == pytest.approx(0, abs=1e-5)
    assert whole.std() == pytest.approx(1, abs=1e-5)
    image[:5] = 0
    masked = normalize(image, "zscore")
    assert masked[5:].mean() == pytest.approx(0, abs=1e-5)
    assert masked[0].max() < masked[5:].min()


def test_window_percentile_rescale_none():
    image = np.linspace(-1000, 1000, 1001, dtype=np.float32).reshape(7, 11, 13)
    window = normalize(image, "window", (-160, 240))
    assert (window.min(), window.max()) == (-1, 1)
    assert np.interp(40, image.ravel(), window.ravel()) == pytest.approx(0, abs=1e-6)
    clipped = normalize(image, "percentile", percentiles=(10, 90))
    assert (clipped == clipped.min()).mean() == pytest.approx(0.1, abs=0.01)
    assert clipped.std() == pytest.approx(1, abs=1e-5)
    rescaled = normalize(image, "rescale")
    assert (rescaled.min(), rescaled.max()) == (0, 1)
    np.testing.assert_array_equal(normalize(image, "none"), image)


def test_window_then_zscore_is_the_literatures_scale_of_ct():
    """The window to [0, 1], then mean 0 and deviation 1 over all voxels, air too."""
    hu = RNG.normal(0, 300, (9, 8, 7)).astype(np.float32)
    hu[:4] = -1000  # more than a quarter of it is one value after the window, and counts
    windowed = (np.clip(hu, -125, 275) + 125) / 400
    expected = (windowed - windowed.mean()) / windowed.std()
    found = normalize(hu, "window_zscore", (-125, 275))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    with pytest.raises(ValueError, match="'window_zscore' needs a window"):
        normalize(hu, "window_zscore")


@pytest.mark.parametrize(
    "intensity", ["zscore", "percentile", "rescale", "window", "window_zscore"]
)
@pytest.mark.parametrize("value", [0.0, 1000.3, np.nan])
def test_constant_images_become_finite(intensity, value):
    image = np.full((6, 6, 6), value, dtype=np.float32)
    normalized = normalize(image, intensity, (0, 1))
    assert np.isfinite(normalized).all()
    assert np.abs(normalized).max() <= 1


def test_voxels_that_are_not_finite_take_the_lowest_value():
    image = np.arange(8, dtype=np.float32).reshape(2, 2, 2) + 3
    image[0, 0, 1], image[1, 1, 1] = np.nan, np.inf
    assert normalize(image, "none").ravel().tolist() == [3, 3, 5, 6, 7, 8, 9, 3]


# ---- the plan --------------------------------------------------------------------------


def test_plan_decides_from_spacing_and_channel_names(tmp_path):
    dataset = open_dataset(nnunet_folder(tmp_path))
    plan = make_plan(dataset, dataset.train, PlanSettings())
    assert plan.spacing == (1.0, 1.0, 2.0)
    assert plan.intensity == ("zscore",)
    assert set(plan.notes) == {"spacing", "intensity"}
    turned = make_plan(dataset, ["a"], PlanSettings(orientation="SAR"))
    assert turned.spacing == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "intensity"),
    [("CT", "percentile"), ("T1", "zscore"), ("noNorm", "none"), ("rescale_to_0_1", "rescale")],
)
def test_intensity_follows_the_channel_name(tmp_path, name, intensity):
    nnunet_folder(tmp_path)
    description = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    save_json(tmp_path / "dataset.json", description | {"channel_names": {"0": name}})
    dataset = open_dataset(tmp_path)
    assert make_plan(dataset, dataset.train, PlanSettings()).intensity == (intensity,)
    asked = make_plan(dataset, dataset.train, PlanSettings(intensity="none"))
    assert asked.intensity == ("none",)
    windowed = make_plan(dataset, dataset.train, PlanSettings(window=(-160, 240)))
    assert windowed.intensity == ("window",)


def test_plan_repeats_what_is_to_be_said_of_the_data(tmp_path):
    nnunet_folder(tmp_path)
    description = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    save_json(tmp_path / "dataset.json", description | {"remarks": ["Cut.", "Twice."]})
    dataset = open_dataset(tmp_path)
    plan = make_plan(dataset, dataset.train, PlanSettings())
    assert plan.notes["data"] == "Cut. Twice."


def test_plan_is_a_file_to_edit(tmp_path):
    plan = Plan(spacing=(1, 1, 3), intensity=("zscore", "none"), notes={"spacing": "median"})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    save_json(tmp_path / "plan.json", content | {"spacing": [2, 2, 2]})
    assert load_plan(tmp_path / "plan.json").spacing == (2, 2, 2)
    for wrong, named in (({"spacing": [0, 1, 1]}, "spacing"), ({"colour": 1}, "colour")):
        save_json(tmp_path / "plan.json", content | wrong)
        with pytest.raises(UsageError, match=f"plan.json: {named}"):
            load_plan(tmp_path / "plan.json")
    with pytest.raises(UsageError, match=r"missing\.json"):
        load_plan(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"orientation": "RAR"},
        {"orientation": "RA"},
        {"window": (5, 5)},
        {"percentiles": (50, 20)},
        {"spacing": (1, -1, 1)},
        {"intensity": "loud"},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PlanSettings(**wrong)


def test_plans_that_do_not_fit(tmp_path):
    dataset = open_dataset(nnunet_folder(tmp_path))
    for wrong, match in (
        ({"intensity": "window"}, '"window" needs window'),
        ({"intensity": "window_zscore"}, '"window_zscore" needs window'),
        ({"intensity": ("none", "none")}, "2 entries for 1 channels"),
    ):
        with pytest.raises(UsageError, match=match):
            make_plan(dataset, dataset.train, PlanSettings(**wrong))
    with pytest.raises(UsageError, match="spacing"):
        make_plan(dataset, [], PlanSettings())
    with pytest.raises(DataError, match="more channels"):
        prepare_image(Volume(np.zeros((2, 6, 6, 6), dtype=np.float32), np.eye(4)), PLAN)


@pytest.mark.parametrize("flips", list(product((-1.0, 1.0), repeat=3)))
def test_thin_volumes_work(flips):
    affine = np.diag([*np.multiply(flips, (0.5, 0.5, 8.0)), 1.0])
    image = Volume(RNG.normal(0, 1, (1, 30, 28, 6)).astype(np.float32), affine)
    prepared, trace = prepare_image(image, Plan(spacing=(2, 2, 30), intensity=("zscore",)))
    assert prepared.shape == (8, 7, 2)
    mask = restore_mask(one_hot(np.ones(prepared.shape, dtype=int), 2), trace)
    assert mask.array.all()
    assert mask.shape == image.shape
