"""From a scan to a mask on its own grid, with networks whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vclipseg
from data.made import affines
from toy import build, make_batch
from vclipseg import inference
from vclipseg.checkpoint import load_model, save_model
from vclipseg.data.plan import Plan
from vclipseg.data.volume import Volume, axes_and_flips, turn_affine
from vclipseg.errors import DataError, OutOfMemory, UsageError
from vclipseg.inference import (
    Predictor,
    PredictSettings,
    load,
)
from vclipseg.methods.base import Method, MethodSettings, Task
from vclipseg.windows import blend_weights


class Fake(Method):
    """Predicts by a function of the images, and remembers the shapes it saw."""

    def __init__(self, function):
        super().__init__(MethodSettings(), Task(1, ("background", "organ"), 1))
        self.function = function
        self.shapes = []

    def loss(self, batch, step):
        raise NotImplementedError

    def predict(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.shapes.append(tuple(images.shape))
        return self.function(images)


def soft(images):
    """Two classes, each voxel by itself."""
    foreground = images[:, :1].sigmoid()
    return torch.cat([1 - foreground, foreground], 1)


def bright(images):
    """Class 1 where the first channel is above one half."""
    foreground = (images[:, :1] > 0.5).float()
    return torch.cat([1 - foreground, foreground], 1)


def mean_of_window(images):
    """The same for a whole window: its mean."""
    share = images.mean((1, 2, 3, 4), keepdim=True).sigmoid()
    share = share.expand(-1, 1, *images.shape[2:])
    return torch.cat([1 - share, share], 1)


def make_plan(spacing=(1.0, 1.0, 1.0), channels=1, **changes):
    return Plan(spacing=spacing, intensity=("none",) * channels, **changes)


def predictor(function=soft, plan=None, channels=1, patch=(8, 8, 8), **predict):
    description = {
        "class_names": ["background", "organ"],
        "label_values": [0, 1],
        "channel_names": [f"MR{c}" for c in range(channels)],
        "plan": (plan or make_plan(channels=channels)).model_dump(),
        "predict": {"precision": "fp32", **predict},
        "patch": list(patch),
        "method": {"filters": 4},
    }
    return Predictor(Fake(function), description)


def image(shape, channels=1, seed=0):
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))


def volume(shape=(10, 9, 8), channels=1, affine=None):
    return Volume(image(shape, channels).numpy(), np.eye(4) if affine is None else affine)


# Windows


@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
@pytest.mark.parametrize(
    ("window", "stride"), [(None, None), ((8, 8, 8), (3, 5, 8)), ((5, 20, 3), (1, 20, 2))]
)
def test_windows_of_a_pointwise_network_equal_the_whole_volume(window, stride, blend):
    x = image((13, 17, 9))
    p = predictor(mode="window", window=window, stride=stride, blend=blend, batch=3)
    torch.testing.assert_close(p.prepared(x), soft(x[None])[0])
    assert len(p.method.shapes) > 1
    whole = predictor(mode="whole")
    assert torch.equal(whole.prepared(x), soft(x[None])[0])
    assert whole.method.shapes == [(1, 1, 13, 17, 9)]


@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
def test_overlaps_are_averaged_by_weight(blend):
    """Against a plain loop over windows."""
    x = image((12, 10, 9), seed=1)
    p = predictor(mean_of_window, mode="window", window=(8, 8, 8), stride=(3, 2, 4), blend=blend)
    total, visits = np.zeros((2, 12, 10, 9)), np.zeros((12, 10, 9))
    weight = blend_weights((8, 8, 8), blend)
    for a, b, c in itertools.product([0, 3, 4], [0, 2], [0, 1]):
        box = (slice(a, a + 8), slice(b, b + 8), slice(c, c + 8))
        share = 1 / (1 + np.exp(-x.numpy()[0][box].mean()))
        total[(0, *box)] += weight * (1 - share)
        total[(1, *box)] += weight * share
        visits[box] += weight
    np.testing.assert_allclose(p.prepared(x), total / visits, rtol=1e-5)


def test_published_window_and_strides():
    """Left atrium: windows of 112 x 112 x 80, strides 18, 18, 4, foreground averaged over visits."""
    x = torch.zeros(1, 131, 113, 90)
    p = predictor(
        mode="window", window=(112, 112, 80), stride=(18, 18, 4), blend="uniform", batch=5
    )
    torch.testing.assert_close(p.prepared(x), torch.full((2, 131, 113, 90), 0.5))
    assert sum(shape[0] for shape in p.method.shapes) == 3 * 2 * 4
    assert {shape[1:] for shape in p.method.shapes} == {(1, 112, 112, 80)}
    assert max(shape[0] for shape in p.method.shapes) == 5


def test_window_is_the_training_patch_and_half_of_it_the_stride():
    p = predictor(mode="window", patch=(8, 4, 6), batch=1)
    p.prepared(image((16, 8, 9)))
    assert p.method.shapes == [(1, 1, 8, 4, 6)] * (3 * 3 * 2)


def test_a_volume_smaller_than_the_window_is_taken_as_it_is():
    x = image((16, 16, 6))
    p = predictor(mode="window", window=(32, 8, 16))
    torch.testing.assert_close(p.prepared(x), soft(x[None])[0])
    assert {shape[2:] for shape in p.method.shapes} == {(16, 8, 6)}


def test_a_stride_that_leaves_gaps_is_refused():
    p = predictor(mode="window", window=(4, 4, 4), stride=(4, 5, 4))
    with pytest.raises(UsageError, match="larger than the window"):
        p.prepared(image((12, 12, 12)))


# Whole or windows, and what to do without memory


@pytest.mark.parametrize(("free", "whole"), [(10**9, True), (10**4, False)])
def test_auto_takes_the_whole_volume_where_memory_allows(monkeypatch, free, whole):
    monkeypatch.setattr(inference, "available_memory", lambda device: free)
    p = predictor(mode="auto")
    p.prepared(image((12, 12, 12)))
    assert (p.method.shapes == [(1, 1, 12, 12, 12)]) == whole


def failing(error, above):
    """`soft`, but out of memory for images of more voxels than `above`."""

    def function(images):
        if images.numel() > above:
            raise error
        return soft(images)

    return function


MEMORY_ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=repr)
@pytest.mark.parametrize("mode", ["auto", "whole"])
def test_without_memory_for_the_whole_volume_windows_are_tried(error, mode):
    x = image((12, 12, 12))
    p = predictor(failing(error, 8**3), mode=mode, batch=1)
    torch.testing.assert_close(p.prepared(x), soft(x[None])[0])
    assert p.method.shapes[0] == (1, 1, 12, 12, 12)
    assert set(p.method.shapes[1:]) == {(1, 1, 8, 8, 8)}


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=repr)
def test_without_memory_for_a_window_the_error_says_what_helps(error):
    p = predictor(failing(error, 0))
    with pytest.raises(OutOfMemory, match=r"predict\.window") as raised:
        p.prepared(image((12, 12, 12)))
    assert raised.value.exit_code == 5


def test_other_errors_are_not_taken_for_missing_memory():
    error = RuntimeError("unsupported memory format option ChannelsLast")
    p = predictor(failing(error, 0))
    with pytest.raises(RuntimeError, match="memory format"):
        p.prepared(image((12, 12, 12)))
    assert len(p.method.shapes) == 1


@pytest.mark.parametrize("shape", [(30, 12, 12), (8, 9, 10)])
def test_a_mask_is_made_slab_by_slab(shape):
    """As from the probabilities of the whole, on a grid that is cropped, turned and not resampled."""
    x = volume(shape, affine=np.diag([-1.0, 1, 1, 1]))
    x.array[:, :4] = 0
    p = predictor(mean_of_window, plan=make_plan(crop="nonzero"), mode="window")
    probs = p.probabilities(x).array
    np.testing.assert_array_equal(p.predict(x).array, probs.argmax(0))


# Volumes


def turned_spacing(affine, shape):
    """Voxel sizes after turning to RAS: a plan that needs no resampling."""
    turned = turn_affine(affine, shape, *axes_and_flips(affine, "RAS"))
    return tuple(float(v) for v in np.linalg.norm(turned[:3, :3], axis=0))


def ellipsoid(shape, centers=(0.62, 0.4, 0.55), radius=0.28):
    """Off-center, so that a flipped or permuted mask would not cover it."""
    grid = [(np.arange(n) + 0.5) / n - c for n, c in zip(shape, centers, strict=True)]
    return sum(g**2 for g in np.meshgrid(*grid, indexing="ij")) < radius**2


shapes = st.tuples(*[st.integers(9, 16)] * 3)
large_shapes = st.tuples(*[st.integers(16, 22)] * 3)  # 5 voxels of radius outlive resampling


@settings(max_examples=40, deadline=None)
@given(affines(), shapes, st.sampled_from(["none", "nonzero"]))
def test_mask_lies_on_the_scans_own_grid(affine, shape, crop):
    """Without resampling the mask of a thresholding network is the thresholded scan, voxel by voxel."""
    inside = ellipsoid(shape)
    plan = make_plan(turned_spacing(affine, shape), crop=crop)
    scan = Volume(inside[None].astype(np.float32), affine)
    mask = predictor(bright, plan, mode="window", patch=(7, 8, 9)).predict(scan)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, inside)
    assert np.array_equal(mask.affine, affine)


@settings(max_examples=40, deadline=None)
@given(affines(shear=False), large_shapes, st.tuples(*[st.floats(0.6, 1.5)] * 3))
def test_mask_overlays_the_scan_in_the_world_after_resampling(affine, shape, factors):
    inside = ellipsoid(shape)
    spacing = tuple(np.multiply(turned_spacing(affine, shape), factors))
    scan = Volume(inside[None].astype(np.float32), affine)
    mask = predictor(bright, make_plan(spacing)).predict(scan)
    assert mask.array.shape == shape
    assert np.array_equal(mask.affine, affine)

    def center_mm(voxels):
        return affine[:3, :3] @ np.argwhere(voxels).mean(0) + affine[:3, 3]

    off = np.linalg.solve(affine[:3, :3], center_mm(mask.array) - center_mm(inside))
    assert np.abs(off).max() < 0.5  # voxels
    dice = 2 * (mask.array * inside).sum() / (mask.array.sum() + inside.sum())
    assert dice > 0.75


@settings(max_examples=10, deadline=None)
@given(affines(), shapes)
def test_probabilities_lie_on_the_scans_own_grid(affine, shape):
    plan = make_plan(turned_spacing(affine, shape))
    scan = volume(shape, affine=affine)
    probs = predictor(soft, plan).probabilities(scan)
    assert probs.array.dtype == np.float32
    expected = soft(torch.from_numpy(scan.array)[None])[0]
    np.testing.assert_allclose(probs.array, expected, atol=1e-6)
    assert np.array_equal(probs.affine, affine)


def test_probabilities_sum_to_one_after_resampling():
    probs = predictor(soft, make_plan((1.4, 0.8, 1.0))).probabilities(volume())
    np.testing.assert_allclose(probs.array.sum(0), 1, atol=1e-5)


def test_channels_reach_the_network_in_their_order():
    seen = []

    def look(images):
        seen.append(images.mean((0, 2, 3, 4)).tolist())
        return soft(images)

    scan = Volume(np.stack([np.full((8, 8, 8), c, dtype=np.float32) for c in range(3)]), np.eye(4))
    predictor(look, channels=3).predict(scan)
    assert seen == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (3, 8, 8, 8), (8, 8, 8)])
def test_wrong_number_of_channels(shape):
    scan = Volume(np.zeros(shape, dtype=np.float32), np.eye(4))
    with pytest.raises(UsageError, match=r"2 channel\(s\) \(MR0, MR1\).*got an array of shape"):
        predictor(channels=2).predict(scan)


# A model from a file


def save(path, name="vclipseg", **settings):
    method = build(name, "robust", channels=2, steps=9, **settings)
    description = {
        "class_names": ["background", "organ"],
        "label_values": [0, 7],
        "channel_names": ["MR0", "MR1"],
        "plan": make_plan(channels=2).model_dump(mode="json"),
        "predict": {"mode": "whole", "precision": "fp32"},
        "patch": [16, 16, 16],
        "steps": 9,
        "method": method.settings.model_dump(mode="json"),
    }
    save_model(path, method.state_dict(), description)
    return method.eval()


@pytest.mark.parametrize("name", ["supervised", "vclipseg"])
def test_load_gives_the_model_back(name, tmp_path):
    method = save(tmp_path / "checkpoints" / "model.safetensors", name)
    images = make_batch(channels=2).images[:1]
    with torch.no_grad():
        expected = method.predict(images)[0]
    for path in (tmp_path, tmp_path / "checkpoints" / "model.safetensors"):
        loaded = load(path)
        assert loaded.class_names == ("background", "organ")
        assert loaded.label_values == (0, 7)
        torch.testing.assert_close(loaded.prepared(images[0]), expected, atol=1e-5, rtol=1e-4)
    assert vclipseg.load is load


def test_load_takes_other_settings(tmp_path):
    save(tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").settings.mode == "whole"
    other = load(tmp_path / "m.safetensors", PredictSettings(mode="window", window=(4, 4, 4)))
    assert (other.settings.mode, other.window) == ("window", (4, 4, 4))


def test_a_model_without_what_only_training_needs(tmp_path):
    """The teacher and the projections; a decoder that is missing is another matter."""
    method = save(tmp_path / "m.safetensors", teacher_decay=0.9)
    weights, description = load_model(tmp_path / "m.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith(method.training_only)}
    assert len(kept) < len(weights) / 2
    save_model(tmp_path / "small.safetensors", kept, description)
    x = image((16, 16, 16), 2)
    expected = load(tmp_path / "m.safetensors").prepared(x)
    assert torch.equal(load(tmp_path / "small.safetensors").prepared(x), expected)
    for broken in (
        {k: v for k, v in kept.items() if "decoders.0.head" not in k},
        {**kept, "stranger": torch.zeros(1)},
    ):
        save_model(tmp_path / "broken.safetensors", broken, description)
        with pytest.raises(DataError, match="weights do not fit"):
            load(tmp_path / "broken.safetensors")


def test_a_model_of_another_version(tmp_path):
    save(tmp_path / "m.safetensors")
    weights, description = load_model(tmp_path / "m.safetensors")
    description["method"]["novelty"] = 1
    save_model(tmp_path / "m.safetensors", weights, description)
    with pytest.raises(DataError, match=r"does not know \(novelty\); predict with the version"):
        load(tmp_path / "m.safetensors")


def test_load_without_a_finished_model(tmp_path):
    with pytest.raises(UsageError, match=r"no finished model.*vclipseg train --resume"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no such model"):
        load(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable model"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("wrong", [{"window": (0, 4, 4)}, {"mode": "all"}, {"batch": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        PredictSettings(**wrong)
