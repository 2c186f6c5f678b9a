"""CPS's equations, written once more in numpy, and its switches one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import naive
from toy import build, make_batch
from vclipseg.losses import IGNORE
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Task

K = 3
PLAIN = {
    "initialization": "default",
    "dice": "linear",
    "dice_weight": 0.5,
    "ce_weight": 0.0,
    "unlabeled_weight": 1.0,
    "rampup_steps": 6_000,
    "apply_to": "all",
    "dlb": False,
    "dlb_weighting": "dynamic",
    "predict_with": "first",
    "dropout": 0.0,
}
"""In the frame of MC-Net."""
BATCH = make_batch(3, (16, 32, 16), num_classes=K)
STEP = 2_000


def make(**changes):
    return build("cps", "faithful", num_classes=K, steps=15_000, **{**PLAIN, **changes})


def naive_pseudo_label(probs, dices, weighting):
    """Dynamic labeling, equations 7 to 9 of VCLIPSeg."""
    weights = [1.0, 1.0]
    if weighting == "dynamic":
        weights = [math.exp(1 - 1 / (1 + math.exp(-d))) for d in dices]
    elif weighting == "voxel_entropy":
        weights = [np.exp((p * np.log(p)).sum(1, keepdims=True)) for p in probs]
    return (weights[0] * probs[0] + weights[1] * probs[1]).argmax(1)


@torch.no_grad()
def naive_loss(method, batch, step, s):
    """Name -> (weight, value) of every term."""
    probs = [naive.softmax(network(batch.images)) for network in (method.first, method.second)]
    labels, num_labeled = batch.labels.numpy(), batch.num_labeled
    dices = [naive.dice(p[:num_labeled], labels, s["dice"]) for p in probs]
    ce = sum(naive.cross_entropy(p[:num_labeled], labels) for p in probs)
    start = num_labeled if s["apply_to"] == "unlabeled" else 0
    value = 0.0
    for p, other in zip(probs, probs[::-1], strict=True):
        target = other.argmax(1)
        if s["dlb"]:
            target = naive_pseudo_label(probs, dices, s["dlb_weighting"])
            value += naive.dice(p[start:], target[start:], s["dice"])
        value += naive.cross_entropy(p[start:], target[start:])
    weight = s["unlabeled_weight"] * naive.ramp(step, s["rampup_steps"])
    return {
        "dice": (s["dice_weight"], sum(dices)),
        "ce": (s["ce_weight"], ce),
        "dlb" if s["dlb"] else "cross": (weight, value),
    }


DLB = {"dlb": True}


@pytest.mark.parametrize(
    ("base", "changes", "values", "weights"),
    [
        ({}, {}, "", ""),
        ({}, {"dice": "squared"}, "dice", ""),
        ({}, {"dice_weight": 0.0}, "", "dice"),
        ({}, {"ce_weight": 0.5}, "", "ce"),
        ({}, {"unlabeled_weight": 1.5}, "", "cross"),
        ({}, {"rampup_steps": 15_000}, "", "cross"),
        ({}, {"rampup_steps": 0}, "", "cross"),
        ({}, {"apply_to": "unlabeled"}, "cross", ""),
        ({}, {"dlb_weighting": "equal"}, "", ""),
        ({}, DLB, "cross dlb", "cross dlb"),
        (DLB, {"apply_to": "unlabeled"}, "dlb", ""),
        (DLB, {"dlb_weighting": "voxel_entropy"}, "dlb", ""),
        (DLB, {"dice": "squared"}, "dice dlb", ""),
        (DLB, {"dice": "multiclass"}, "dice dlb", ""),
    ],
    ids=str,
)
def test_switch_changes_its_terms_as_the_formula_says(base, changes, values, weights):
    method = make(**base, **changes)
    found = naive.numbers(method.loss(BATCH, STEP))
    expected = naive_loss(method, BATCH, STEP, {**PLAIN, **base, **changes})
    assert list(found) == list(expected)
    for name, (weight, value) in expected.items():
        assert found[name] == (pytest.approx(weight), pytest.approx(value, rel=1e-4)), name
    plain = naive.numbers(make(**base).loss(BATCH, STEP))
    assert naive.changed(found, plain) == [set(values.split()), set(weights.split())]


@pytest.mark.parametrize("dlb", [False, True])
def test_each_network_learns_from_fixed_labels(dlb):
    """d CE / d z_i = (p_i - one-hot) / N: nothing flows through a pseudo-label."""
    method = make(dlb=dlb)
    logits = [torch.randn(4, K, 2, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    probs = [z.softmax(1) for z in logits]
    dices = torch.tensor([0.4, 0.6], dtype=torch.double, requires_grad=True)
    labels = method.pseudo_labels(probs, dices, 2)
    assert not any(y.requires_grad for y in labels)
    if dlb:
        assert torch.equal(*labels)
        return
    method.follow(logits, probs, labels).backward()
    for z, other in zip(logits, logits[::-1], strict=True):
        target = naive.one_hot(other.detach().numpy().argmax(1), K)
        np.testing.assert_allclose(z.grad, (naive.softmax(z) - target) / (4 * 8), rtol=1e-6)


def test_dynamic_labeling_follows_the_better_network():
    method = make(dlb=True)
    probs = [torch.tensor(p).view(1, 2, 1, 1, 1) for p in ([0.6, 0.4], [0.4, 0.6])]
    for dices, winner in (([0.1, 0.9], 0), ([0.9, 0.1], 1)):
        labels = method.pseudo_labels(probs, torch.tensor(dices), 0)
        assert [int(y) for y in labels] == [winner, winner]


@pytest.mark.parametrize("dlb", [False, True])
def test_labeled_patches_are_left_out_where_pseudo_labels_are_for_the_unlabeled(dlb):
    method = make(dlb=dlb, apply_to="unlabeled")
    probs = [torch.rand(4, K, 2, 2, 2) for _ in range(2)]
    for labels in method.pseudo_labels(probs, torch.tensor([0.4, 0.6]), 2):
        assert (labels[:2] == IGNORE).all()
        assert (labels[2:] != IGNORE).all()


@pytest.mark.parametrize("name", ["robust", "cps_dlb_robust"])
def test_during_warmup_there_is_supervision_only(name):
    loss = build("cps", name).loss(make_batch(patches=(4, 0)), 0)
    assert loss["dlb" if "dlb" in name else "cross"].value.detach() == 0


# The networks


def test_the_networks_have_the_published_size_and_share_nothing():
    cls = method_class("cps")
    with torch.device("meta"):
        method = cls(cls.Settings(), Task(1, ("background", "organ"), 15_000))
    assert sum(p.numel() for p in method.parameters()) == 2 * 9_448_866


@pytest.mark.parametrize("initialization", ["default", "kaiming_xavier"])
def test_networks_begin_differently(initialization):
    method = make(initialization=initialization)
    for a, b in zip(method.first.modules(), method.second.modules(), strict=True):
        if isinstance(a, nn.Conv3d | nn.ConvTranspose3d):
            assert not torch.equal(a.weight, b.weight)


def test_kaiming_and_xavier():
    """Standard deviations sqrt(2 / fan in) and sqrt(2 / (fan in + fan out)) of plain convolutions."""
    plain, method = make(filters=8), make(filters=8, initialization="kaiming_xavier")
    fan_in = fan_out = 64 * 27
    for network, variance in (
        (method.first, 2 / fan_in),
        (method.second, 2 / (fan_in + fan_out)),
    ):
        conv, norm, *_ = network.encoder.blocks[3]
        assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(variance), rel=0.01)
        assert norm.weight.eq(1).all()
    transposed = [m.first.decoders[0].ups[0][0].weight for m in (plain, method)]
    assert torch.equal(*transposed)


# Presets and schedule


@pytest.mark.parametrize(
    ("name", "changes", "train"),
    [
        ("faithful", {}, {"lr": 0.01, "lr_power": 0.0}),
        ("cps_dlb", {"dlb": True}, {"lr": 0.01, "lr_power": 0.0}),
        (
            "ssl4mis",
            {
                "initialization": "kaiming_xavier",
                "dice": "multiclass",
                "ce_weight": 0.5,
                "unlabeled_weight": 0.1,
                "rampup_steps": 15_000,
                "apply_to": "unlabeled",
            },
            {"lr": 0.01, "lr_power": 0.9},
        ),
        (
            "original",
            {"dice_weight": 0.0, "ce_weight": 1.0, "unlabeled_weight": 1.5, "rampup_steps": 0},
            {"lr": 0.005, "lr_power": 0.9},
        ),
    ],
)
def test_published_presets(name, changes, train):
    found = method_class("cps").Settings(**preset("cps", name)["method"]).model_dump()
    published = {**PLAIN, "dropout": 0.5, "patches": (2, 2), "warmup": 0.0, **changes}
    assert {key: found[key] for key in published} == published
    assert preset("cps", name)["train"] == {"optimizer": "sgd", "weights": "last", **train}


def test_robust_presets_differ_in_the_labeling_only():
    first, second = (preset("cps", name)["method"] for name in ("robust", "cps_dlb_robust"))
    assert {**first, "dlb": True} == second


@pytest.mark.parametrize(
    ("name", "steps", "full_at", "full"),
    [
        ("faithful", 15_000, 6_000, 1.0),
        ("faithful", 150, 60, 1.0),
        ("ssl4mis", 30_000, 30_000, 0.1),
    ],
)
def test_rampup_scales_with_the_length_of_the_run(name, steps, full_at, full):
    method = build("cps", name, steps=steps)
    at = [method.loss(make_batch(), step)["cross"].weight for step in (0, full_at // 2, full_at)]
    assert at == pytest.approx([full * math.exp(-5), full * math.exp(-1.25), full])


# Prediction


@pytest.mark.parametrize("predict_with", ["first", "mean"])
def test_predict_with(predict_with):
    method = make(predict_with=predict_with).eval()
    images = BATCH.images
    with torch.no_grad():
        probs = [naive.softmax(network(images)) for network in (method.first, method.second)]
        expected = probs[0] if predict_with == "first" else np.mean(probs, 0)
        np.testing.assert_allclose(method.predict(images), expected, atol=1e-6)
    needed = {
        k.partition(".")[0] for k in method.state_dict() if not k.startswith(method.training_only)
    }
    assert needed == ({"first"} if predict_with == "first" else {"first", "second"})
