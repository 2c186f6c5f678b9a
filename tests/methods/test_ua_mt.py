"""What UA-MT adds to a Mean Teacher, written once more in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import naive
from toy import build, make_batch
from vclipseg.methods import method_class, preset
from vclipseg.methods.mean_teacher import MeanTeacher

K = 3
BATCH = make_batch(3, num_classes=K)
QUIET = {"noise": 0.0, "dropout": 0.0, "warmup": 0.0}


def make(**changes):
    """A method whose teacher is not yet like its student, and sure here and there."""
    method = build("ua_mt", "faithful", num_classes=K, steps=6_000, **{**QUIET, **changes})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
        method.teacher.network.decoders[0].head.weight.mul_(4)
    return method


def naive_limit(step):
    return (0.75 + 0.25 * naive.ramp(step, 6_000)) * math.log(K)


def test_it_is_a_mean_teacher():
    method = make()
    assert isinstance(method, MeanTeacher)
    assert method.settings.name == "ua_mt"
    assert {"dice", "ce", "consistency"} == set(method.loss(BATCH, 0))


@pytest.mark.parametrize("step", [0, 1_000, 3_000, 6_000, 9_000])
def test_limit_rises_to_the_highest_entropy(step):
    assert make().limit(step, K) == pytest.approx(naive_limit(step))
    assert make().limit(6_000, 2) == pytest.approx(math.log(2))
    shorter = build("ua_mt", "faithful", steps=600)
    assert shorter.limit(step // 10, K) == pytest.approx(naive_limit(step))


@pytest.mark.parametrize("passes", [2, 8])
def test_entropy_is_that_of_the_mean_of_all_passes(passes):
    """They are run two at a time, on the patches twice over."""
    method = make(passes=passes)
    rng = np.random.default_rng(0)
    answers = np.moveaxis(rng.dirichlet([1] * K, (passes, 2, 4, 4, 4)), -1, 2)
    seen = []

    def teach(images):
        at = 2 * len(seen)
        seen.append(images)
        return torch.from_numpy(np.concatenate(answers[at : at + 2])).float()

    method.teach = teach
    images = BATCH.unlabeled_images
    found = method.entropy(images)
    mean = answers.mean(0)
    np.testing.assert_allclose(found, -(mean * np.log(mean + 1e-6)).sum(1), rtol=1e-5)
    assert len(seen) == passes // 2
    assert all(torch.equal(pairs, torch.cat([images, images])) for pairs in seen)


def test_consistency_is_the_mean_over_certain_voxels():
    method, step = make(), 3_000
    loss = method.loss(BATCH, step)
    with torch.no_grad():
        p = naive.softmax(method.network(BATCH.images))[2:]
        q = naive.softmax(method.teacher.network(BATCH.unlabeled_images))
    entropy = -(q * np.log(q + 1e-6)).sum(1)  # without noise and dropout all passes are alike
    certain = entropy < naive_limit(step)
    assert 0.1 < certain.mean() < 0.9
    expected = (certain[:, None] * (p - q) ** 2).sum() / (K * certain.sum())
    assert float(loss["consistency"].value.detach()) == pytest.approx(expected, rel=1e-3)
    assert float(loss.facts["certain_share"]) == pytest.approx(certain.mean(), abs=1e-3)
    assert loss["consistency"].weight == pytest.approx(0.1 * math.exp(-1.25))


def test_without_a_limit_it_is_the_mean_teachers_consistency():
    free = make(threshold=1.0)
    plain = build("mean_teacher", "faithful", num_classes=K, steps=6_000, **QUIET)
    plain.load_state_dict(free.state_dict())
    expected = plain.loss(BATCH, 0)["consistency"].value
    torch.testing.assert_close(free.loss(BATCH, 0)["consistency"].value, expected)


def test_where_nothing_is_certain_nothing_is_followed():
    method = make()
    with torch.no_grad():
        for p in method.teacher.network.decoders[0].head.parameters():
            p.zero_()  # every class is as likely
    loss = method.loss(BATCH, 0)
    assert float(loss["consistency"].value.detach()) == 0
    assert float(loss.facts["certain_share"]) == 0
    loss.total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in method.parameters())


def test_passes_differ_by_noise_and_dropout():
    images = BATCH.unlabeled_images
    for changes, random in (({}, False), ({"noise": 0.1}, True), ({"teacher_dropout": 0.3}, True)):
        method = make(**changes)
        first, second = (method.teach(images) for _ in range(2))
        assert torch.equal(first, second) != random, changes


@pytest.mark.parametrize(("teacher_dropout", "expected"), [(None, 0.2), (0.0, 0.0), (0.4, 0.4)])
def test_teacher_dropout_is_the_teachers_alone(teacher_dropout, expected):
    method = make(dropout=0.2, teacher_dropout=teacher_dropout)
    method.start_from(method.state_dict())
    for network, share in ((method.network, 0.2), (method.teacher, expected)):
        found = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout3d)]
        assert found == [share, share]


def test_during_warmup_there_is_supervision_only():
    loss = make().loss(make_batch(0, num_classes=K, patches=(4, 0)), 0)
    assert float(loss["consistency"].value.detach()) == 0
    assert "certain_share" not in loss.facts


def test_settings():
    cls = method_class("ua_mt").Settings
    published = cls(**preset("ua_mt", "faithful")["method"]).model_dump()
    expected = {
        "dice": "squared",
        "dropout": 0.5,
        "teacher_dropout": None,
        "passes": 8,
        "threshold": 0.75,
        "threshold_steps": 6_000,
        "unlabeled_weight": 0.1,
        "rampup_steps": 6_000,
        "teacher_decay": 0.99,
        "noise": 0.1,
        "noise_limit": 0.2,
        "predict_with": "student",
    }
    assert {key: published[key] for key in expected} == expected
    for passes in (0, 3):
        with pytest.raises(ValueError, match="passes"):
            cls(passes=passes)
