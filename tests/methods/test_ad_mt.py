"""AD-MT's equations, written once more in numpy, the teachers' turns and the switches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy import LATE, batch_for, build, fast, fit, make_batch
from vclipseg import views
from vclipseg.losses import IGNORE
from vclipseg.methods import preset
from vclipseg.methods.ad_mt import ADMTSettings, Turns, arbitrate, fuse
from vclipseg.mixing import centered_boxes
from vclipseg.training import TrainSettings, learning_rate

NUM_CLASSES = 3
SIZE = (16, 16, 32)


def make(turn=0, **changes):
    settings = {"dropout": 0.0, "threshold": 0.4, **changes}
    method = build("ad_mt", "faithful", num_classes=NUM_CLASSES, steps=15_000, **settings)
    method.turns.state[0] = turn
    return method


def batch_of(seed=0, patches=(2, 2)):
    return make_batch(seed, SIZE, patches=patches, num_classes=NUM_CLASSES)


def generator_of(batch):
    """The draws of a loss of this batch, once more."""
    return torch.Generator().manual_seed(batch.generator.initial_seed())


def probs_of(logits):
    z = logits.detach().double().numpy()
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


# The loss in numpy


def naive_fuse(p1, p2):
    h1, h2 = (-(p * np.log2(p + 1e-10)).sum(1, keepdims=True) for p in (p1, p2))
    w1 = np.exp(-h1) / (np.exp(-h1) + np.exp(-h2))
    p = w1 * p1 + (1 - w1) * p2
    return p.argmax(1), p.max(1), p1.argmax(1) != p2.argmax(1)


def naive_supervised(p, labels):
    """0.5 (CE + Dice), Dice squared and over all classes."""
    own = np.take_along_axis(p, labels[:, None], 1)
    dice = []
    for c in range(NUM_CLASSES):
        a, b = p[:, c], labels == c
        dice.append(1 - (2 * (a * b).sum() + 1e-5) / ((a**2).sum() + b.sum() + 1e-5))
    return 0.5 * (-np.log(own).mean() + np.mean(dice))


def naive_strong(weak, turn, rng):
    """The strong view, its boxes and partners."""
    n = len(weak)
    boxes, partner = torch.zeros(n, *SIZE, dtype=torch.bool), list(range(n))
    if turn:
        boxes = centered_boxes(n, SIZE, rng)
        partner = torch.randperm(n, generator=rng).tolist()
        strong = torch.stack([torch.where(boxes[i], weak[partner[i]], weak[i]) for i in range(n)])
        return strong, boxes, partner
    colored = views.brightness_contrast(weak, rng)
    use = torch.rand(n, generator=rng) < 0.8
    colored = torch.stack([colored[i] if use[i] else weak[i] for i in range(n)])
    noisy = views.noise(colored, rng)
    use = torch.rand(n, generator=rng) < 0.2
    strong = torch.stack([noisy[i] if use[i] else colored[i] for i in range(n)])
    return strong, boxes, partner


@torch.no_grad()
def naive_loss(method, batch, step):
    s, turn = method.settings, method.turns.whose
    weak = batch.plain[batch.num_labeled :]
    taught = []
    for index, teacher in enumerate(method.teachers):
        teacher.network.train(index == turn and s.active_teacher == "train")
        taught.append(probs_of(teacher.network(weak)))
    y, c, conflict = naive_fuse(*taught)
    strong, boxes, partner = naive_strong(weak, turn, generator_of(batch))
    boxes = boxes.numpy()
    p = probs_of(method.network(torch.cat([batch.labeled_images, weak, strong])))
    p_labeled, p_weak, p_strong = np.split(p, [2, 4])
    own, own_c = p_weak.argmax(1), p_weak.max(1)

    def cut(x):
        return np.stack([np.where(boxes[i], x[partner[i]], x[i]) for i in range(len(x))])

    share = conflict.mean()
    y, c, conflict = cut(y), cut(c), cut(conflict)
    if s.align_student:
        own, own_c = cut(own), cut(own_c)
    for v in np.ndindex(y.shape):
        if conflict[v] and y[v] != own[v] and own_c[v] > c[v]:
            y[v], c[v] = own[v], own_c[v]
    kept = c >= s.threshold
    chosen = np.take_along_axis(p_strong, y[:, None], 1)[:, 0]
    unlabeled = -np.log(chosen[kept]).mean() if kept.any() else 0.0
    weight = s.unlabeled_weight * math.exp(-5 * (1 - min(step / s.rampup_steps, 1)) ** 2)
    terms = {
        "supervised": (1.0, naive_supervised(p_labeled, batch.labels.numpy())),
        "unlabeled": (weight, unlabeled),
    }
    return terms, {"conflict": share, "pseudo_share": kept.mean()}


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("active", ["train", "eval"])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("seed", [0, 2])
def test_loss(turn, active, align, seed):
    method = make(turn, active_teacher=active, align_student=align)
    batch, step = batch_of(seed), 2_000
    expected, facts = naive_loss(method, batch, step)
    loss = method.loss(batch, step)
    assert list(loss) == list(expected)
    for name, (weight, value) in expected.items():
        assert loss[name].weight == pytest.approx(weight)
        assert float(loss[name].value.detach()) == pytest.approx(value, rel=1e-3), name
    for name, value in facts.items():
        assert float(loss.facts[name]) == pytest.approx(float(value), abs=1e-3)
    assert 0 < float(loss.facts["pseudo_share"]) <= 1


def test_aligning_the_student_matters_where_boxes_are_cut():
    mixing = next(
        seed
        for seed in range(20)
        if naive_strong(torch.zeros(2, 1, *SIZE), 1, generator_of(batch_of(seed)))[2] == [1, 0]
    )
    totals = {
        (turn, align): float(
            make(turn, align_student=align).loss(batch_of(mixing), LATE).total.detach()
        )
        for turn in (0, 1)
        for align in (True, False)
    }
    assert totals[0, True] == pytest.approx(totals[0, False])
    assert totals[1, True] != pytest.approx(totals[1, False], rel=1e-7)


def test_labeled_patches_alone_are_supervision():
    method, batch = make(), batch_of(patches=(4, 0))
    loss = method.loss(batch, 0)
    with torch.no_grad():
        p = probs_of(method.network(batch.images))
    assert list(loss) == ["supervised"]
    expected = naive_supervised(p, batch.labels.numpy())
    assert float(loss["supervised"].value.detach()) == pytest.approx(expected, rel=1e-4)


def test_nothing_is_sure_enough():
    loss = make(threshold=0.999).loss(batch_of(), LATE)
    assert float(loss["unlabeled"].value.detach()) == 0
    assert float(loss.facts["pseudo_share"]) == 0
    loss.total.backward()


def test_views_are_of_the_plain_images():
    """The harness's own change of contrast reaches the labeled patches only."""
    batch = batch_of()
    images = torch.cat([batch.labeled_images, 5 * batch.unlabeled_images])
    for turn in (0, 1):
        values = [
            make(turn).loss(replace(b, plain_images=batch.images), LATE).total.detach()
            for b in (batch_of(), replace(batch_of(), images=images))
        ]
        assert torch.equal(*values)


def test_a_step_is_one_forward_of_the_student():
    method, seen = make(), []
    method.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    method.loss(batch_of(), LATE)
    assert seen == [6]


# Fusion and arbitration


def test_the_surer_teacher_counts_more():
    sure = torch.tensor([0.99, 0.01, 0.0]).view(1, 3, 1, 1, 1)
    unsure = torch.tensor([0.3, 0.4, 0.3]).view(1, 3, 1, 1, 1)
    labels, confidence, conflict = fuse(sure, unsure)
    assert labels.item() == 0
    assert confidence.item() > 0.645
    assert conflict.item()


@pytest.mark.parametrize("seed", range(3))
def test_fusion_in_numpy(seed):
    rng = np.random.default_rng(seed)
    p1, p2 = (rng.dirichlet([0.3] * 4, (2, 3, 4, 5)).transpose(0, 4, 1, 2, 3) for _ in range(2))
    found = fuse(torch.from_numpy(p1), torch.from_numpy(p2))
    for mine, expected in zip(found, naive_fuse(p1, p2), strict=True):
        np.testing.assert_allclose(mine, expected)


@pytest.mark.parametrize(
    ("conflict", "own", "own_confidence", "expected"),
    [
        (True, 2, 0.9, (2, 0.9)),
        (False, 2, 0.9, (1, 0.8)),  # the teachers agree
        (True, 1, 0.9, (1, 0.8)),  # the same class
        (True, 2, 0.7, (1, 0.8)),  # less sure
    ],
)
def test_arbitration(conflict, own, own_confidence, expected):
    label, confidence = arbitrate(*map(torch.tensor, (1, 0.8, conflict, own_confidence, own)))
    assert (label.item(), pytest.approx(confidence.item())) == expected


# Turns


def test_turns_last_a_random_number_of_steps():
    torch.manual_seed(0)
    turns, lengths, last = Turns(5), [], 0
    count = 0
    for _ in range(3_000):
        count += 1
        turns.tick()
        if turns.whose != last:
            lengths.append(count)
            last, count = turns.whose, 0
    assert set(lengths) == {1, 2, 3, 4, 5}
    shares = [lengths.count(n) / len(lengths) for n in range(1, 6)]
    assert shares == pytest.approx([0.2] * 5, abs=0.05)


def test_turns_are_state():
    torch.manual_seed(0)
    turns, again = Turns(9), Turns(9)
    for _ in range(4):
        turns.tick()
    again.load_state_dict(turns.state_dict())
    for _ in range(20):
        for each in (turns, again):
            torch.manual_seed(1)
            each.tick()
        assert torch.equal(turns.state, again.state)


def test_a_turn_does_not_depend_on_the_length_of_the_run():
    assert (
        build("ad_mt", steps=10).turns.longest == build("ad_mt", steps=15_000).turns.longest == 19
    )


@pytest.mark.parametrize("turn", [0, 1])
def test_only_the_teacher_whose_turn_it_is_follows(turn):
    method = make(turn)
    method.turns.state[2] = 10
    before = [[v.clone() for v in t.network.state_dict().values()] for t in method.teachers]
    method.after_step(LATE)
    for index, teacher in enumerate(method.teachers):
        same = [
            torch.equal(a, b)
            for a, b in zip(before[index], teacher.network.state_dict().values(), strict=True)
        ]
        assert all(same) == (index != turn)
    assert method.turns.state.tolist() == [turn, 1, 10]


@pytest.mark.parametrize(
    ("step", "keep"), [(0, 0), (79, 0), (80, 0), (82, 0.5), (100, 10 / 11), (20_000, 0.99)]
)
def test_the_teacher_begins_as_a_copy_and_follows_with_its_statistics(step, keep):
    method = make()
    old = {k: v.clone() for k, v in method.teachers[0].network.state_dict().items()}
    method.network(batch_of().images)  # moves the running statistics
    method.after_step(step)
    new, student = method.teachers[0].network.state_dict(), method.network.state_dict()
    for key, value in new.items():
        if value.is_floating_point():
            expected = keep * old[key] + (1 - keep) * student[key]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        else:
            assert value == student[key]


def test_copy_steps_scale_with_the_run():
    method = build("ad_mt", steps=1_500)  # a tenth: 8 steps
    student = method.network.state_dict()
    for step, copied in ((7, True), (12, False)):
        with torch.no_grad():
            for p in method.network.parameters():
                p.add_(1)
        method.turns.state.copy_(torch.tensor([0, 0, 9]))
        method.after_step(step)
        teacher = method.teachers[0].network.state_dict()
        assert all(torch.equal(v, student[k]) for k, v in teacher.items()) == copied


@pytest.mark.parametrize("active", ["train", "eval"])
def test_mode_of_the_teachers(active):
    method = make(1, active_teacher=active)
    method.loss(batch_of(), LATE)
    assert [t.network.training for t in method.teachers] == [False, active == "train"]
    method.eval().loss(batch_of(), LATE)
    assert not any(t.network.training for t in method.teachers)


def test_all_begin_apart_and_no_teacher_is_trained():
    method = make()
    networks = [method.network, *(t.network for t in method.teachers)]
    heads = [network.decoders[0].head.weight for network in networks]
    assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not any(p.requires_grad for t in method.teachers for p in t.parameters())
    sixteen = build("ad_mt", "faithful", filters=16)
    counts = [sum(p.numel() for p in n.parameters()) for n in (sixteen.network, *sixteen.teachers)]
    assert counts == [9_448_866] * 3


def test_both_teachers_start_from_an_earlier_run():
    earlier, method = build("supervised", seed=4), build("ad_mt")
    method.start_from(earlier.state_dict())
    for network in (method.network, *(t.network for t in method.teachers)):
        state = network.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in earlier.network.state_dict().items())


def test_both_kinds_of_turn_train():
    method, seen = build("ad_mt", "robust", steps=12, warmup=0.25, period=2), set()
    fit(method, fast(steps=12), on_step=lambda state, loss: seen.add(method.turns.whose))
    assert seen == {0, 1}


# Settings


def test_published_settings():
    values = preset("ad_mt", "faithful")
    s = ADMTSettings.model_validate(values["method"])
    assert (s.patches, s.dropout, s.warmup, s.dice) == ((2, 2), 0.5, 0.0, "multiclass")
    assert (s.unlabeled_weight, s.rampup_steps, s.threshold) == (2.0, 6_000, 0.8)
    assert (s.period, s.teacher_decay, s.copy_steps, s.active_teacher) == (19, 0.99, 80, "train")
    assert s.align_student
    assert preset("ad_mt", "code")["method"] == {"align_student": False}
    train = TrainSettings(steps=15_000, **values["train"])
    assert learning_rate(train, 5_000) == pytest.approx(0.01 * (2 / 3) ** 0.9)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 1e-4)


def test_ignored_labels_are_left_out():
    method, batch = make(), batch_for(make(), num_classes=NUM_CLASSES)
    batch.labels[:] = IGNORE
    assert float(method.loss(batch, LATE)["supervised"].value.detach()) < 1
