"""BCP's equations, written once more in numpy, its two stages and its switches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from toy import LATE, batch_for, build, fast, fit, make_batch
from vclipseg.labeling import largest_components
from vclipseg.losses import IGNORE
from vclipseg.methods import preset
from vclipseg.methods.bcp import BCPSettings
from vclipseg.mixing import random_box
from vclipseg.training import TrainSettings, learning_rate

NUM_CLASSES = 3
SIZE = (16, 32, 16)


def make(preset="faithful", **changes):
    settings = {"dropout": 0.0, "warmup": 0.0, **changes}
    return build("bcp", preset, num_classes=NUM_CLASSES, steps=17_000, **settings)


def batch_of(patches=(4, 4), seed=0, **kind):
    return make_batch(seed, SIZE, patches=patches, num_classes=NUM_CLASSES, **kind)


def box_of(batch, share=2 / 3):
    """The box that a loss of this batch draws."""
    generator = torch.Generator().manual_seed(batch.generator.initial_seed())
    return random_box(SIZE, share, generator)


# The loss in numpy


def naive_part(logits, labels, mask):
    """l(z, y; m): half cross-entropy, half Dice of each patch and class."""
    z = logits.detach().double().numpy()
    labels, mask = (
        labels.numpy(),
        np.broadcast_to(mask.numpy(), labels.shape) & (labels.numpy() >= 0),
    )
    probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    own = np.take_along_axis(probs, np.maximum(labels, 0)[:, None], 1)[:, 0]
    ce = -np.log(own[mask]).mean()
    dice = []
    for n in range(len(z)):
        for c in range(NUM_CLASSES):
            p, g = probs[n, c], labels[n] == c
            m = mask[n]
            dice.append((2 * (m * p * g).sum() + 1e-5) / ((m * (p + g)).sum() + 1e-5))
    return 0.5 * (ce + 1 - np.mean(dice))


def naive_largest(labels):
    kept = np.zeros_like(labels)
    for k in range(1, NUM_CLASSES):
        pieces, count = ndimage.label(labels == k, ndimage.generate_binary_structure(3, 3))
        if count:
            kept[pieces == max(range(1, count + 1), key=lambda i: (pieces == i).sum())] = k
    return kept


@torch.no_grad()
def naive_second_stage(method, batch, largest=True, joint=False):
    box, half = box_of(batch), batch.num_labeled // 2
    x, y, u = batch.labeled_images, batch.labels, batch.unlabeled_images
    _, plain = batch.split(batch.plain)
    pseudo = []
    # apart: each has its own batch statistics
    for images in (plain,) if joint else (plain[:half], plain[half:]):
        labels = method.teacher.network(images).argmax(1)
        if largest:
            labels = torch.from_numpy(np.stack([naive_largest(n) for n in labels.numpy()]))
        pseudo.extend(labels.split(half))
    inside = box.float()
    mixed = [
        x[:half] * (1 - inside) + u[:half] * inside,
        u[half:] * (1 - inside) + x[half:] * inside,
    ]
    if joint:
        z_in, z_out = method.network(torch.cat(mixed)).split(half)
    else:
        z_in, z_out = map(method.network, mixed)
    known = naive_part(z_in, y[:half], ~box) + naive_part(z_out, y[half:], box)
    guessed = naive_part(z_in, pseudo[0], box) + naive_part(z_out, pseudo[1], ~box)
    return {"supervised": (1.0, known), "unlabeled": (0.5, guessed)}, pseudo


def assert_terms(loss, expected):
    assert list(loss) == list(expected)
    for name, (weight, value) in expected.items():
        assert loss[name].weight == pytest.approx(weight)
        assert float(loss[name].value.detach()) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("patches", [(4, 4), (2, 2)])
@pytest.mark.parametrize("passes", ["apart", "joint"])
@pytest.mark.parametrize("ignored", [False, True])
def test_second_stage(patches, passes, ignored):
    method, batch = make(patches=patches, passes=passes), batch_of(patches)
    if ignored:
        batch.labels[:, :9] = IGNORE
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    expected, pseudo = naive_second_stage(method, batch, joint=passes == "joint")
    loss = method.loss(batch, LATE)
    assert_terms(loss, expected)
    share = torch.cat(pseudo).gt(0).float().mean()
    assert float(loss.facts["pseudo_foreground"]) == pytest.approx(float(share))


def test_first_stage():
    method, batch = make(warmup=0.5), batch_of((8, 0))
    box, x, y = box_of(batch), batch.images, batch.labels
    inside = box.float()
    with torch.no_grad():
        logits = method.network(x[:4] * (1 - inside) + x[4:] * inside)
    mixed = torch.where(box, y[4:], y[:4])
    expected = naive_part(logits, mixed, torch.ones_like(box))
    assert_terms(method.loss(batch, 0), {"supervised": (1.0, expected)})


def test_without_the_largest_component():
    method, batch = make(largest_component=False), batch_of()
    expected, _ = naive_second_stage(method, batch, largest=False)
    assert_terms(method.loss(batch, LATE), expected)
    changed, _ = naive_second_stage(method, batch)
    assert changed["unlabeled"] != expected["unlabeled"]
    assert changed["supervised"] == expected["supervised"]


def test_weight_of_pseudo_labels():
    assert make(unlabeled_weight=0.2).loss(batch_of(), LATE)["unlabeled"].weight == 0.2


def test_the_teacher_looks_at_plain_images():
    method, batch = make(), batch_of()
    changed = replace(batch_of(), images=batch.images * 2 - 1, plain_images=batch.images)
    expected, _ = naive_second_stage(method, changed)
    assert_terms(method.loss(changed, LATE), expected)


def test_each_direction_has_its_own_batch_statistics():
    method, seen = make(), []
    method.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method.teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method.loss(batch_of(), LATE)
    assert seen == [(2, 1, *SIZE)] * 4


# Largest components


def test_largest_components():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (4, 6, 7, 8)) * (rng.random((4, 6, 7, 8)) < 0.2)
    labels[2] = 0
    labels[3] = 1
    found = largest_components(torch.from_numpy(labels)).numpy()
    for n in range(4):
        assert np.array_equal(found[n], naive_largest(labels[n]))
    assert (found != labels)[:2].any((1, 2, 3)).all()


def test_pieces_that_touch_at_a_corner_are_one():
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    labels[0, 0, 0, 0] = labels[0, 1, 1, 1] = labels[0, 3, 3, 3] = 1
    assert largest_components(labels).nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


# Stages and teacher


def test_the_first_stage_is_the_warmup():
    method = build("bcp", "faithful", steps=17_000)
    asked = [method.patches_at(step) for step in (0, 1_999, 2_000, 16_999)]
    assert asked == [(8, 0), (8, 0), (4, 4), (4, 4)]
    assert method.scale == 1
    robust = build("bcp", "robust", steps=100)
    assert [robust.patches_at(step) for step in (39, 40)] == [(8, 0), (4, 4)]


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_the_second_stage_begins_with_the_teacher_as_the_student(warmup):
    """Then it keeps its share every step, and its running statistics are its own."""
    method, steps = build("bcp", "robust", steps=6, warmup=warmup, teacher_decay=0.9), 6
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.fill_(7.0)  # whatever it was
    first = int(warmup * steps)
    students, teachers = [], []

    def note(state, loss):
        students.append([p.detach().clone() for p in method.network.parameters()])
        teachers.append([p.detach().clone() for p in method.teacher.network.parameters()])

    before = [p.detach().clone() for p in method.network.parameters()]
    fit(method, fast(steps=steps), on_step=note)
    if first:
        assert all((p == 7).all() for p in teachers[first - 1])
    expected = students[first - 1] if first else before
    for step in range(first, steps):
        expected = [0.9 * e + 0.1 * s for e, s in zip(expected, students[step], strict=True)]
        for e, t in zip(expected, teachers[step], strict=True):
            torch.testing.assert_close(e, t)
    pairs = zip(method.network.buffers(), method.teacher.network.buffers(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_teacher_works_as_in_training():
    """It drops out, normalizes by the batch and is not trained."""
    method = make(dropout=0.5).train()
    assert method.teacher.network.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    images = batch_of().unlabeled_images
    first, second = (method.teacher(images) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_later_run_goes_on_from_an_earlier_one():
    earlier = build("supervised", "robust", seed=4)
    method = build("bcp", "robust", warmup=0.0)
    taken = method.start_from(earlier.state_dict())
    assert set(taken) == set(earlier.state_dict())
    for network in (method.network, method.teacher.network):
        state = network.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in earlier.network.state_dict().items())


def test_the_teacher_has_no_part_in_prediction():
    assert build("bcp").training_only == ("teacher.",)


# Settings


@pytest.mark.parametrize("patches", [(4, 2), (3, 3), (2, 0)])
def test_patches_come_in_pairs(patches):
    with pytest.raises(ValueError, match="as many labeled as unlabeled"):
        BCPSettings(patches=patches)


def test_published_settings():
    values = preset("bcp", "faithful")
    s = BCPSettings.model_validate(values["method"])
    assert (s.patches, s.dropout, s.filters) == ((4, 4), 0.5, 16)
    assert (s.unlabeled_weight, s.teacher_decay, s.largest_component) == (0.5, 0.99, True)
    assert [int(s.box * n) for n in (112, 112, 80)] == [74, 74, 53]
    assert int(s.warmup * 17_000) == 2_000
    train = TrainSettings(steps=17_000, **values["train"])
    rates = [learning_rate(train, step) for step in (0, 1_999, 4_499, 4_500, 8_999, 9_000, 16_999)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5])
    assert (train.optimizer, train.weights, train.nesterov) == ("sgd", "last", False)


def test_number_of_parameters():
    method = build("bcp", "faithful", filters=16)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in method.teacher.parameters()) == 9_448_866


def test_the_box_is_drawn_by_the_batch():
    method = make()
    values = [float(method.loss(batch_of(seed=seed), LATE).total.detach()) for seed in (0, 0)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    other = replace(batch_of(), generator=torch.Generator().manual_seed(9))
    assert float(method.loss(other, LATE).total.detach()) != pytest.approx(values[0], rel=1e-5)


def test_smallest_patches():
    method = build("bcp", "robust")
    assert torch.isfinite(method.loss(batch_for(method, size=16), LATE).total)
