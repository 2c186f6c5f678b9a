"""MC-Net's equation, written once more in numpy, and its switches one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import naive
from toy import build, make_batch
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Task

K = 3
PLAIN = {
    "decoders": 2,
    "dice": "linear",
    "dice_weight": 0.5,
    "ce_weight": 0.0,
    "unlabeled_weight": 1.0,
    "rampup_steps": 6_000,
    "temperature": 0.1,
    "detach_target": False,
    "predict_with": "first",
    "dropout": 0.0,
}
BATCH = make_batch(3, (16, 32, 16), num_classes=K)
STEP = 2_000


def make(**changes):
    return build("mcnet", "faithful", num_classes=K, steps=15_000, **{**PLAIN, **changes})


def naive_sharpen(p, temperature):
    return p ** (1 / temperature) / (p ** (1 / temperature) + (1 - p) ** (1 / temperature))


@torch.no_grad()
def naive_loss(method, batch, step, s):
    """Name -> (weight, value) of every term."""
    probs = [naive.softmax(z) for z in method.network(batch.images)]
    assert len(probs) == s["decoders"]
    labels = batch.labels.numpy()
    known = [p[: len(labels)] for p in probs]
    mutual = 0.0
    for i, p in enumerate(probs):
        for j, q in enumerate(probs):
            if i != j:
                mutual += ((p - naive_sharpen(q, s["temperature"])) ** 2).mean()
    weight = s["unlabeled_weight"] * naive.ramp(step, s["rampup_steps"])
    return {
        "dice": (s["dice_weight"], sum(naive.dice(p, labels, s["dice"]) for p in known)),
        "ce": (s["ce_weight"], sum(naive.cross_entropy(p, labels) for p in known)),
        "mutual": (weight, mutual),
    }


@pytest.mark.parametrize(
    ("changes", "values", "weights"),
    [
        ({}, "", ""),
        ({"decoders": 3}, "dice ce mutual", ""),
        ({"dice": "squared"}, "dice", ""),
        ({"dice_weight": 1.0}, "", "dice"),
        ({"ce_weight": 0.5}, "", "ce"),
        ({"unlabeled_weight": 0.1}, "", "mutual"),
        ({"rampup_steps": 15_000}, "", "mutual"),
        ({"temperature": 0.5}, "mutual", ""),
        ({"detach_target": True}, "", ""),  # of no consequence but to the gradient
    ],
    ids=str,
)
def test_switch_changes_its_terms_as_the_formula_says(changes, values, weights):
    method = make(**changes)
    found = naive.numbers(method.loss(BATCH, STEP))
    expected = naive_loss(method, BATCH, STEP, {**PLAIN, **changes})
    assert list(found) == list(expected)
    for name, (weight, value) in expected.items():
        assert found[name] == (pytest.approx(weight), pytest.approx(value, rel=1e-4)), name
    plain = naive.numbers(make().loss(BATCH, STEP))
    assert naive.changed(found, plain) == [set(values.split()), set(weights.split())]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("decoders", [2, 3])
def test_gradient_goes_into_both_sides_unless_the_target_is_detached(detach, decoders):
    """d/dp_i = sum_j 2 (p_i - s(p_j)) / N, and with both sides + sum_j 2 (s(p_i) - p_j) s'(p_i) / N."""
    temperature = 0.5
    method = make(decoders=decoders, temperature=temperature, detach_target=detach)
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(0.1, 0.9, (2, K, 2, 3, 2)) for _ in range(decoders)]
    probs = [torch.from_numpy(a).requires_grad_() for a in arrays]
    method.disagreement(probs).backward()
    for i, p in enumerate(arrays):
        others = [q for j, q in enumerate(arrays) if j != i]
        expected = sum(2 * (p - naive_sharpen(q, temperature)) for q in others)
        if not detach:
            s = naive_sharpen(p, temperature)
            slope = s * (1 - s) / (p * (1 - p)) / temperature
            expected = expected + sum(2 * (s - q) * slope for q in others)
        np.testing.assert_allclose(probs[i].grad, expected / p.size, rtol=1e-6)


def test_certain_decoders_have_a_finite_gradient():
    method = make()
    certain = torch.zeros(1, K, 2, 2, 2)
    certain[:, 0] = 1
    probs = [certain.clone().requires_grad_(), certain.flip(1).clone().requires_grad_()]
    method.disagreement(probs).backward()
    assert all(torch.isfinite(p.grad).all() for p in probs)


@pytest.mark.parametrize(
    ("name", "parameters"), [("faithful", 12_347_716), ("plus", 15_246_566)], ids=str
)
def test_the_network_has_the_published_size(name, parameters):
    cls = method_class("mcnet")
    with torch.device("meta"):
        settings = cls.Settings(**preset("mcnet", name)["method"])
        method = cls(settings, Task(1, ("background", "organ"), 15_000))
    assert sum(p.numel() for p in method.parameters()) == parameters


def test_decoders_differ_in_how_they_upsample():
    ups = [decoder.ups[0][0] for decoder in make(decoders=3).network.decoders]
    assert isinstance(ups[0], nn.ConvTranspose3d)
    assert [up.mode for up in ups[1:]] == ["trilinear", "nearest"]


@pytest.mark.parametrize(("name", "decoders"), [("faithful", 2), ("plus", 3)])
def test_published_presets(name, decoders):
    found = method_class("mcnet").Settings(**preset("mcnet", name)["method"]).model_dump()
    published = {**PLAIN, "dropout": 0.5, "decoders": decoders, "patches": (2, 2), "warmup": 0.0}
    assert {key: found[key] for key in published} == published
    train = preset("mcnet", name)["train"]
    assert train == {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}


@pytest.mark.parametrize(("steps", "full_at"), [(15_000, 6_000), (150, 60)])
def test_rampup_scales_with_the_length_of_the_run(steps, full_at):
    method = build("mcnet", "faithful", steps=steps)
    at = [method.loss(make_batch(), step)["mutual"].weight for step in (0, full_at // 2, full_at)]
    assert at == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0])


@pytest.mark.parametrize("predict_with", ["first", "mean"])
@pytest.mark.parametrize("decoders", [2, 3])
def test_predict_with(predict_with, decoders):
    method = make(predict_with=predict_with, decoders=decoders).eval()
    with torch.no_grad():
        probs = [naive.softmax(z) for z in method.network(BATCH.images)]
        expected = probs[0] if predict_with == "first" else np.mean(probs, 0)
        np.testing.assert_allclose(method.predict(BATCH.images), expected, atol=1e-5)
