"""That a GPU does what the CPU does; `make bench-gpu` runs these.

`VCLIPSEG_TEST_DEVICE` names the device. Without it they are skipped; `cpu` tries the tests themselves.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from toy import RECIPES, TINY, batch_for, build, fast, fit
from vclipseg.checkpoint import load_state, save_state
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import PatchSampler
from vclipseg.data.resident import Resident
from vclipseg.data.volume import read_image
from vclipseg.experiment import new_run, train_run
from vclipseg.inference import load
from vclipseg.methods import METHODS
from vclipseg.training import make_machine, start, train

DEVICE = os.environ.get("VCLIPSEG_TEST_DEVICE", "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="VCLIPSEG_TEST_DEVICE names no device")
each_method = pytest.mark.parametrize("name", list(METHODS))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "preset_name"), RECIPES, ids=["-".join(recipe) for recipe in RECIPES]
)
def test_every_recipe_trains(name, preset_name, precision):
    state = fit(build(name, preset_name, steps=4), fast(steps=4, precision=precision))
    for key, weights in state.weights().items():
        assert weights.device.type == DEVICE, key
        assert torch.isfinite(weights).all(), key


@each_method
def test_probabilities_are_those_of_the_cpu(name):
    method = build(name).eval()
    images = batch_for(method).images
    with torch.no_grad():
        expected = method.predict(images)
        probs = method.to(DEVICE).predict(images.to(DEVICE)).cpu()
    torch.testing.assert_close(probs, expected, atol=2e-3, rtol=0)


@each_method
def test_a_run_goes_on_from_a_checkpoint(name, tmp_path):
    """On every device the state comes back whole; the same weights to the bit are the CPU's promise."""
    settings = fast(steps=4)

    def save_half(state, loss):
        if state.step == 2:
            save_state(tmp_path / "last.pt", state.state_dict())

    unbroken = fit(build(name, steps=4), settings, on_step=save_half)
    state = start(build(name, steps=4, seed=1), settings, make_machine(settings))
    state.load_state_dict(load_state(tmp_path / "last.pt"))
    resumed = fit(state.method, settings, state=state)
    for key, weights in unbroken.weights().items():
        torch.testing.assert_close(resumed.weights()[key], weights, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("preset_name", ["robust", "faithful"])
def test_a_step_waits_for_nothing(preset_name):
    """Patches are cut from volumes on the GPU, and nothing is read back until a row of the log."""
    if DEVICE != "cuda":
        pytest.skip("of a GPU")
    method, settings = build("vclipseg", preset_name, steps=9), fast(steps=9, log_every=9)
    machine = make_machine(settings)
    rng = np.random.default_rng(0)
    images = {name: rng.standard_normal((1, 24, 20, 18), dtype=np.float32) for name in "abcd"}
    sampler = PatchSampler(
        image=images.__getitem__,
        labels=lambda name: (images[name][0] > 1).astype(np.uint8),
        labeled="ab",
        unlabeled="cd",
        patch=(16, 16, 16),
        patches=method.patches_at,
        augment=AugmentSettings(rotate_flip=True, intensity=0.3),
        seed=0,
        resident=Resident(machine.device, 2**30),
    )
    state = start(method, settings, machine)

    def on_step(state, loss):
        # volumes are sent when first drawn; unlabeled ones are from the fourth step on in `robust`
        torch.cuda.set_sync_debug_mode("error" if 4 <= state.step < 8 else "default")

    try:
        train(state, sampler.batch, settings, machine, on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 9


@pytest.mark.parametrize("compile", ["on", "graphs"])
def test_compiled_networks_learn_the_same(compile):
    if DEVICE != "cuda":
        pytest.skip("of a GPU")
    plain, compiled = (fit(build(), fast(steps=6, compile=c)) for c in ("off", compile))
    for key, weights in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[key], weights, atol=0.02, rtol=0.02)


def test_a_run_that_saves_memory_equals_one_that_does_not():
    plain, saving = (fit(build(), fast(steps=3, save_memory=s)) for s in (False, True))
    for key, weights in plain.weights().items():
        torch.testing.assert_close(saving.weights()[key], weights, atol=0.02, rtol=0.02)


def test_a_run_from_scan_to_mask(tiny_data, tmp_path, monkeypatch):
    experiment = load_experiment(None, TINY)
    run, prepared = new_run(experiment, tiny_data, tmp_path / "run", Console(quiet=True))
    train_run(run, prepared.cases, Console(quiet=True))
    scan = read_image(prepared.dataset.case(prepared.split.test[0]).images)
    mask = load(run.folder).predict(scan).array
    monkeypatch.setattr("vclipseg.inference.default_device", lambda: torch.device("cpu"))
    assert np.mean(mask == load(run.folder).predict(scan).array) > 0.999
