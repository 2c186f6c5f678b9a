"""How much is computed, read and copied: counted, not timed, so that nothing here can be flaky."""

from __future__ import annotations

import tracemalloc
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from toy import TINY, batch_for, build, fast
from vclipseg import metrics, nearest
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.augment import AugmentSettings, change_intensity, draw, place
from vclipseg.data.batch import PatchSampler
from vclipseg.data.resident import Resident
from vclipseg.device import Machine
from vclipseg.experiment import make_sampler, new_run
from vclipseg.inference import Predictor, PredictSettings
from vclipseg.methods import presets
from vclipseg.runlog import RunLog
from vclipseg.training import start, train

# Passes through the networks


@contextmanager
def passes(*modules):
    """How many patches each of the modules is given, call by call."""
    seen = [[] for _ in modules]

    def note(rows, args):
        (given,) = args
        rows.append(
            len(given if isinstance(given, torch.Tensor) else given[0])
        )  # maps of a decoder

    hooks = [
        module.register_forward_hook(lambda m, args, out, rows=rows: note(rows, args))
        for module, rows in zip(modules, seen, strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_a_step_passes_the_student_once_and_the_teacher_over_unlabeled_patches_alone():
    method = build("vclipseg", "robust")
    with passes(method.network, method.teacher.network) as (student, teacher):
        method.loss(batch_for(method), 50)
    assert (student, teacher) == ([4], [2])


def test_a_step_of_the_warm_up_leaves_the_teacher_out():
    method = build("vclipseg", "robust")
    assert method.warmup_steps > 0
    with passes(method.network, method.teacher.network) as (student, teacher):
        method.loss(batch_for(method, step=0), 0)
    assert (student, teacher) == ([4], [])


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [("supervised", "robust", [4]), ("vclipseg", "faithful", [4]), ("mcnet", "robust", [4])],
)
def test_labeled_and_unlabeled_patches_go_through_one_pass(name, preset, expected):
    method = build(name, preset)
    with passes(method.network, method.network.encoder) as (network, encoder):
        method.loss(batch_for(method), 50)
    assert network == encoder == expected


@pytest.mark.parametrize(("predict_with", "second"), [("first", []), ("mean", [1])])
def test_a_decoder_that_is_not_read_is_not_computed(predict_with, second):
    method = build("vclipseg", "robust", predict_with=predict_with).eval()
    network = method.network
    with torch.no_grad(), passes(network.encoder, *network.decoders) as (encoder, *decoders):
        method.predict(torch.zeros(1, 1, 16, 16, 16))
    assert (encoder, decoders) == ([1], [[1], second])


def predictor(method, **settings):
    description = {
        "class_names": ["background", "organ"],
        "label_values": [0, 1],
        "channel_names": ["image"],
        "plan": {"spacing": (1.0, 1.0, 1.0), "intensity": ("none",)},
        "patch": (16, 16, 16),
        "method": {"filters": 4},
    }
    return Predictor(method, description, PredictSettings(precision="fp32", **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 2] * 2),  # 2 x 2 x 2 windows with strides of half a window, two at once
        ({"batch": 3}, [3, 1] * 2),
        ({"stride": (4, 4, 4), "batch": 9}, [4, 4]),
        ({"stride": (2, 4, 16)}, [2, 2] * 3),
        ({"mode": "whole"}, [1]),
    ],
)
def test_windows_of_a_volume(settings, expected):
    method = build("vclipseg", "robust")
    with passes(method.network.encoder) as (encoder,):
        predictor(method, **settings).prepared(torch.zeros(1, 20, 20, 20))
    assert encoder == expected


def test_a_step_takes_no_more_multiplications_than_its_equations():
    """Those of torch's own layers: what is quicker here is no other function."""
    method = build("vclipseg", "faithful", filters=8)
    counts = []
    for layers in (None, {"PointwiseConv3d": nn.Conv3d, "Conv3d": nn.Conv3d}):
        for module in method.modules():
            if layers and type(module).__name__ in layers:
                module.__class__ = layers[type(module).__name__]
        with FlopCounterMode(display=False) as counter:
            method.loss(batch_for(method), 50).total.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]


# Waiting for a GPU


class Nowhere(Machine):
    """Tensors without values: whatever a step would have to read of them fails."""

    def __init__(self):
        super().__init__(torch.device("meta"), "fp32")

    def autocast(self):
        return nullcontext()


class NothingSent(TorchDispatchMode):
    """Copies from memory to the device fail."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            sources = [a.device.type for a in args if isinstance(a, torch.Tensor)]
            assert not (out.device.type == "meta" and "cpu" in sources), "a copy to the device"
        return out


def steps_nowhere(method, folder, steps=3, sends=False):
    """Steps of the loop and their log, on a device that cannot be waited for."""
    machine, settings = Nowhere(), fast(steps=steps + 1)
    log = RunLog(folder)
    state = start(method, settings, machine)

    def on_step(state, loss):
        log.add(loss)
        if state.step == steps:
            raise KeyboardInterrupt

    def batch_at(step):
        batch = batch_for(method, step, step=step)
        return replace(batch, images=batch.images.to("meta"), labels=batch.labels.to("meta"))

    batches = [batch_at(step) for step in range(steps)]
    with pytest.raises(KeyboardInterrupt), nullcontext() if sends else NothingSent():
        train(state, batches.__getitem__, settings, machine, on_step)
    assert log.count == steps


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name == "robust" else pytest.mark.slow)
        for name in presets("vclipseg")
    ],
)
def test_a_step_waits_for_nothing(preset, tmp_path):
    steps_nowhere(build("vclipseg", preset, steps=4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "mean_teacher", "cps", "mcnet"])
def test_a_step_of_the_methods_beside_it_waits_for_nothing(name, tmp_path):
    steps_nowhere(build(name, "robust", steps=4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ua_mt", "caussl", "ad_mt", "crossmatch", "vclipseg_x"])
def test_a_step_may_send_what_it_draws_but_reads_nothing_back(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # this device has none
    steps_nowhere(build(name, "robust", steps=4), tmp_path, sends=True)


def test_a_patch_is_cut_and_changed_without_waiting():
    volume = torch.empty(1, 20, 18, 16, device="meta")
    augment = AugmentSettings(rotate_flip=True, zoom=0.3, rotate=15, intensity=0.5)
    for seed in range(4):
        p = draw(augment, np.random.default_rng(seed), (20, 18, 16), (16, 16, 16))
        patch = place(p, volume)
        assert change_intensity(replace(p, noise=0.0), patch).shape == (1, 16, 16, 16)


# Data


def test_each_case_is_read_once(tiny_data, tmp_path, monkeypatch):
    experiment = load_experiment(None, TINY)
    run, prepared = new_run(experiment, tiny_data, tmp_path / "run", Console(quiet=True))
    reads = []
    kind = type(prepared.cases)
    for name in ("image", "labels"):
        real = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, i, n=name, real=real: reads.append((n, i)) or real(self, i)
        )
    sampler = make_sampler(run, build(warmup=0.0), prepared.cases, torch.device("cpu"))
    list(sampler.batches(0, 8))
    assert len(reads) == len(set(reads)) == 4 + 2  # images of all cases, labels of the labeled


def test_a_volume_is_sent_to_its_device_once():
    sent, reads, resident = [], [], Resident(torch.device("cpu"), room=10_000)
    large, small = np.zeros((1, 20, 20, 20), np.float32), np.zeros((1, 8, 8, 8), np.float32)

    def read_small():
        reads.append("small")
        return small

    for _ in range(3):
        sent.append((resident("large", lambda: large), resident("small", read_small)))
    assert [list(resident.held), resident.room] == [["small"], 10_000 - small.nbytes]
    assert reads == ["small"]
    assert all(torch.equal(a, torch.from_numpy(large)) for a, _ in sent)
    assert sent[0][1] is sent[1][1] is sent[2][1]


def peak_bytes(function):
    """What a call allocates at most at one time."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_patch_costs_the_memory_of_a_patch():
    """However large its volume: turning and flipping are views."""
    image = np.zeros((1, 96, 96, 96), np.float32)
    parameters = draw(
        AugmentSettings(rotate_flip=True), np.random.default_rng(0), (96,) * 3, (16,) * 3
    )
    patch = 16**3 * 4
    assert peak_bytes(lambda: place(parameters, image)) < 2 * patch < image.nbytes / 50


def test_a_batch_copies_each_patch_a_fixed_number_of_times():
    image = np.zeros((1, 64, 64, 64), np.float32)
    labels = np.zeros((64, 64, 64), np.uint8)
    sampler = PatchSampler(
        image=lambda case_id: image,
        labels=lambda case_id: labels,
        labeled="ab",
        unlabeled="cd",
        patch=(32, 32, 32),
        patches=lambda step: (2, 2),
        augment=AugmentSettings(rotate_flip=True),
        seed=0,
    )
    sampler.batch(0)
    images = 4 * 32**3 * 4
    assert (
        peak_bytes(lambda: sampler.batch(1)) < 1.5 * images
    )  # those that torch stacks come on top


# Metrics


@pytest.fixture
def counted(monkeypatch):
    """Calls of what metrics cost: trees, and surfaces with the shapes they are looked for in."""
    calls = {"trees": 0, "surfaces": []}
    tree, surface = nearest.KDTree, metrics._surface

    def counting_tree(points):
        calls["trees"] += 1
        return tree(points)

    def counting_surface(mask):
        calls["surfaces"].append(mask.shape)
        return surface(mask)

    monkeypatch.setattr(nearest, "KDTree", counting_tree)
    monkeypatch.setattr(metrics, "_surface", counting_surface)
    return calls


def two_cubes():
    reference, prediction = np.zeros((2, 40, 30, 20), dtype=bool)
    reference[10:20, 10:20, 5:15] = True
    prediction[12:22, 10:20, 5:15] = True
    return reference, prediction


@pytest.mark.parametrize(
    "spacing", [(0.625,) * 3, (0.5, 0.5, 2.0)], ids=["isotropic", "anisotropic"]
)
def test_masks_that_nearly_agree_need_no_tree(counted, spacing):
    metrics.score(*two_cubes(), spacing)
    assert counted["trees"] == 0
    assert counted["surfaces"] == [(12, 10, 10)] * 2  # each surface once, within the joint box


@pytest.mark.parametrize(
    ("spacing", "trees"),
    [((0.625,) * 3, 2), ((0.5, 0.5, 2.0), 4)],
    ids=["isotropic", "anisotropic"],
)
def test_far_masks_share_their_distances(counted, spacing, trees):
    """A tree of each surface in voxels, and in mm where that is another distance; NSD needs none."""
    reference, prediction = two_cubes()
    metrics.score(reference, np.roll(prediction, 15, axis=0), spacing)
    assert counted["trees"] == trees


def test_an_empty_mask_has_no_distance_to_compute(counted):
    reference, prediction = two_cubes()
    metrics.score(reference, prediction & False, (1.0, 1.0, 1.0))
    assert counted == {"trees": 0, "surfaces": []}
