"""Mean Teacher's equation, written once more in numpy, and its switches one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import naive
from toy import LATE, build, fast, fit, make_batch
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Task
from vclipseg.training import TrainSettings, learning_rate

K = 3
PLAIN = {
    "dice": "linear",
    "dice_weight": 0.5,
    "ce_weight": 0.5,
    "unlabeled_weight": 0.1,
    "rampup_steps": 6_000,
    "teacher_decay": 0.99,
    "noise": 0.0,
    "dropout": 0.0,
    "warmup": 0.0,
}
"""As published, without what is random."""
BATCH = make_batch(3, (16, 32, 16), num_classes=K)
STEP = 2_000


def make(**changes):
    """A method whose teacher is not yet like its student."""
    method = build("mean_teacher", "faithful", num_classes=K, steps=6_000, **{**PLAIN, **changes})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


@torch.no_grad()
def naive_loss(method, batch, step, s):
    """Name -> (weight, value) of every term."""
    p = naive.softmax(method.network(batch.images))
    q = naive.softmax(method.teacher.network(batch.unlabeled_images))
    labels = batch.labels.numpy()
    known, unknown = p[: len(labels)], p[len(labels) :]
    weight = s["unlabeled_weight"] * naive.ramp(step, s["rampup_steps"])
    return {
        "dice": (s["dice_weight"], naive.dice(known, labels, s["dice"])),
        "ce": (s["ce_weight"], naive.cross_entropy(known, labels)),
        "consistency": (weight, ((unknown - q) ** 2).mean()),
    }


@pytest.mark.parametrize(
    ("changes", "values", "weights"),
    [
        ({}, "", ""),
        ({"dice": "squared"}, "dice", ""),
        ({"dice": "multiclass"}, "dice", ""),
        ({"dice_weight": 1.0}, "", "dice"),
        ({"ce_weight": 0.0}, "", "ce"),
        ({"unlabeled_weight": 1.0}, "", "consistency"),
        ({"rampup_steps": 3_000}, "", "consistency"),
        ({"rampup_steps": 0}, "", "consistency"),
        ({"noise": 0.1}, "consistency", ""),
    ],
    ids=str,
)
def test_switch_changes_its_terms_as_the_formula_says(changes, values, weights):
    method = make(**changes)
    found = naive.numbers(method.loss(BATCH, STEP))
    expected = naive_loss(method, BATCH, STEP, {**PLAIN, **changes})
    assert list(found) == list(expected)
    for name, (weight, value) in expected.items():
        close = 0.2 if changes.get("noise") else 1e-4  # the noise changes the teacher a little
        assert found[name] == (pytest.approx(weight), pytest.approx(value, rel=close)), name
    plain = naive.numbers(make().loss(BATCH, STEP))
    assert naive.changed(found, plain) == [set(values.split()), set(weights.split())]


def test_published_preset():
    settings = method_class("mean_teacher").Settings(**preset("mean_teacher", "faithful")["method"])
    published = {**PLAIN, "dice": "squared", "noise": 0.1, "noise_limit": 0.2, "dropout": 0.5}
    found = settings.model_dump()
    assert {key: found[key] for key in published} == published
    assert (found["predict_with"], found["patches"]) == ("student", (2, 2))


@pytest.mark.parametrize("name", ["mean_teacher", "ua_mt"])
def test_published_rate_is_divided_every_2500_of_6000_steps(name):
    train = TrainSettings(steps=6_000, **preset(name, "faithful")["train"])
    rates = {step: learning_rate(train, step) for step in (0, 2_499, 2_500, 4_999, 5_000, 5_999)}
    assert list(rates.values()) == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])
    assert (train.optimizer, train.weights) == ("sgd", "last")


@pytest.mark.parametrize(("steps", "full_at"), [(6_000, 6_000), (600, 600)])
def test_rampup_scales_with_the_length_of_the_run(steps, full_at):
    method = build("mean_teacher", "faithful", steps=steps)
    at = [
        method.loss(make_batch(), step)["consistency"].weight for step in (0, full_at // 2, full_at)
    ]
    assert at == pytest.approx([0.1 * math.exp(-5), 0.1 * math.exp(-1.25), 0.1])


def test_the_network_has_the_published_size():
    with torch.device("meta"):
        cls = method_class("mean_teacher")
        method = cls(cls.Settings(), Task(1, ("background", "organ"), 6_000))
    for network in (method.network, method.teacher.network):
        assert sum(p.numel() for p in network.parameters()) == 9_448_866


# The teacher


def test_the_teacher_sees_clamped_noise_on_plain_unlabeled_patches():
    method = make(noise=0.1)
    seen = []
    method.teacher.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    changed = replace(BATCH, images=3 * BATCH.images, plain_images=BATCH.images)
    for _ in range(2):
        method.loss(changed, STEP)
    noise = [images - BATCH.unlabeled_images for images in seen]
    assert len(noise) == 2
    for n in noise:
        assert n.abs().max() <= 0.2 + 1e-6
        assert float((n.abs() > 0.1999).float().mean()) == pytest.approx(0.0455, abs=0.01)
        assert float(n[n.abs() < 0.1].std()) == pytest.approx(0.054, abs=0.003)
        assert abs(float(n.mean())) < 0.003
    assert not torch.equal(*noise)


def test_the_teacher_is_as_in_training_but_is_not_trained():
    method = make(dropout=0.5)
    assert method.teacher.network.training
    first, second = (method.teach(BATCH.unlabeled_images) for _ in range(2))
    assert not torch.equal(first, second)  # dropout
    assert not first.requires_grad
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_is_an_average_of_weights_and_keeps_its_own_statistics():
    """And at the first step it becomes the student."""
    method = build("mean_teacher", "faithful", steps=4, **{**PLAIN, "teacher_decay": 0.6})
    students, teachers = [], []

    def on_step(state, loss):
        students.append([p.detach().clone() for p in method.network.parameters()])
        teachers.append([p.clone() for p in method.teacher.network.parameters()])

    fit(method, fast(steps=4), None, on_step)
    assert all(torch.equal(a, b) for a, b in zip(students[0], teachers[0], strict=True))
    for step in range(1, 4):
        keep = min(1 - 1 / (step + 1), 0.6)
        for old, new, student in zip(
            teachers[step - 1], teachers[step], students[step], strict=True
        ):
            torch.testing.assert_close(new, keep * old + (1 - keep) * student)
    own, other = method.teacher.network.state_dict(), method.network.state_dict()
    statistics = [key for key in own if "running_mean" in key]
    assert statistics
    assert not any(torch.equal(own[key], other[key]) for key in statistics)


def test_during_warmup_there_is_supervision_only():
    method = make(warmup=0.5)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    loss = method.loss(make_batch(0, num_classes=K, patches=(4, 0)), 0)
    assert float(loss["consistency"].value.detach()) == 0
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())


# Prediction


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_predict_with(name):
    method = make(predict_with=name).eval()
    images = BATCH.images
    chosen = {"student": method.network, "teacher": method.teacher.network}[name]
    with torch.no_grad():
        found = method.predict(images)
        np.testing.assert_allclose(found, naive.softmax(chosen(images)), atol=1e-6)
        for key, value in method.state_dict().items():
            if key.startswith(method.training_only) and value.is_floating_point():
                value.fill_(torch.nan)
        assert torch.equal(method.predict(images), found)
    kept = {
        k.partition(".")[0] for k in method.state_dict() if not k.startswith(method.training_only)
    }
    assert kept == {"network" if name == "student" else "teacher"}


def test_the_trained_teacher_can_predict():
    """Its statistics are those of the patches that it saw, noise and all."""
    method = build("mean_teacher", "robust", steps=10, warmup=0.0, predict_with="teacher")
    fit(method, fast(steps=10))
    method.eval()
    batch = make_batch(LATE)
    with torch.no_grad():
        difference = method.predict(batch.images) - method.network(batch.images).softmax(1)
    assert 0 < difference.abs().max() < 0.5
