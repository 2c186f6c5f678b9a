"""Losses against their formulas, written once more in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vclipseg.losses import (
    IGNORE,
    add,
    class_dice_losses,
    cross_entropy,
    cross_entropy_by_image,
    dice_loss,
    info_nce,
    most_likely,
    one_hot,
    patch_dice_loss,
    sharpen,
    sigmoid_rampup,
    soft_cross_entropy,
    soft_dice_loss,
)

SHAPE = (2, 3, 4, 2)


def made(num_classes=2, seed=0, ignored=0.0):
    """Logits, probs and labels, as numpy arrays."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (SHAPE[0], num_classes, *SHAPE[1:]))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = rng.integers(0, num_classes, SHAPE)
    labels[rng.random(SHAPE) < ignored] = IGNORE
    return logits, probs, labels


def naive_dice(p, g, form):
    """Of one class, over the whole batch."""
    if form == "linear":
        return 1 - (2 * (p * g).sum() + 1e-8) / (p.sum() + g.sum() + 1e-8)
    return 1 - (2 * (p * g).sum() + 1e-5) / ((p**2).sum() + (g**2).sum() + 1e-5)


def number(value):
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def tensor(array):
    return torch.from_numpy(array) if array.dtype == np.int64 else torch.from_numpy(array).float()


# Dice


@pytest.mark.parametrize("form", ["linear", "squared"])
def test_binary_dice_is_of_the_foreground_alone(form):
    _, probs, labels = made()
    expected = naive_dice(probs[:, 1], labels == 1, form)
    assert float(dice_loss(tensor(probs), tensor(labels), form)) == number(expected)


def test_multiclass_dice_counts_the_background():
    _, probs, labels = made(3)
    expected = np.mean([naive_dice(probs[:, c], labels == c, "multiclass") for c in range(3)])
    assert float(dice_loss(tensor(probs), tensor(labels), "multiclass")) == number(expected)


@pytest.mark.parametrize("form", ["linear", "squared"])
def test_dice_is_averaged_over_the_foreground_classes_present(form):
    _, probs, labels = made(4)
    labels[labels == 2] = 0
    expected = np.mean([naive_dice(probs[:, c], labels == c, form) for c in (1, 3)])
    assert float(dice_loss(tensor(probs), tensor(labels), form)) == number(expected)


@pytest.mark.parametrize("form", ["linear", "squared"])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_dice_without_any_foreground_counts_every_class(form, num_classes):
    _, probs, labels = made(num_classes)
    labels[:] = 0
    expected = np.mean([naive_dice(probs[:, c], labels == c, form) for c in range(1, num_classes)])
    assert float(dice_loss(tensor(probs), tensor(labels), form)) == number(expected)


@pytest.mark.parametrize("form", ["linear", "squared", "multiclass"])
def test_dice_of_a_perfect_prediction_is_zero(form):
    _, _, labels = made(3)
    probs = one_hot(tensor(labels), 3)
    assert float(dice_loss(probs, tensor(labels), form)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["linear", "squared", "multiclass"])
def test_ignored_voxels_are_left_out_of_dice(form):
    _, probs, labels = made(3, ignored=0.4)
    kept = labels != IGNORE
    classes = range(3) if form == "multiclass" else (1, 2)
    values = [naive_dice(probs[:, c][kept], labels[kept] == c, form) for c in classes]
    assert float(dice_loss(tensor(probs), tensor(labels), form)) == number(np.mean(values))


@pytest.mark.parametrize("form", ["linear", "squared", "multiclass"])
def test_soft_dice_is_the_same_formula_on_soft_targets(form):
    _, probs, _ = made(3)
    _, targets, _ = made(3, seed=1)
    classes = range(3) if form == "multiclass" else (1, 2)
    expected = np.mean([naive_dice(probs[:, c], targets[:, c], form) for c in classes])
    assert float(soft_dice_loss(tensor(probs), tensor(targets), form=form)) == number(expected)


@pytest.mark.parametrize("form", ["linear", "squared", "multiclass"])
def test_soft_dice_is_of_the_kept_voxels(form):
    _, probs, _ = made(3)
    _, targets, _ = made(3, seed=1)
    kept = np.random.default_rng(2).random(SHAPE) < 0.5
    classes = range(3) if form == "multiclass" else (1, 2)
    values = [naive_dice(probs[:, c][kept], targets[:, c][kept], form) for c in classes]
    found = soft_dice_loss(tensor(probs), tensor(targets), tensor(kept.astype(float)), form)
    assert float(found) == number(np.mean(values))


def test_classes_that_only_dropped_voxels_hold_are_absent():
    _, probs, labels = made(3)
    kept = labels != 2
    expected = naive_dice(probs[:, 1][kept], (labels == 1)[kept], "linear")
    targets = one_hot(tensor(labels), 3)
    found = soft_dice_loss(tensor(probs), targets, torch.from_numpy(kept).float())
    assert float(found) == number(expected)


@pytest.mark.parametrize("form", ["linear", "squared", "multiclass"])
def test_dice_of_nothing_is_finite(form):
    """Every voxel ignored: no NaN, and no gradient."""
    _, probs, labels = made(3)
    labels[:] = IGNORE
    probs = tensor(probs).requires_grad_()
    loss = dice_loss(probs, tensor(labels), form)
    (gradient,) = torch.autograd.grad(loss, probs)
    assert torch.isfinite(loss)
    assert not gradient.any()


def test_class_losses_are_one_a_class():
    _, probs, labels = made(3)
    found = class_dice_losses(tensor(probs), one_hot(tensor(labels), 3))
    expected = [naive_dice(probs[:, c], labels == c, "linear") for c in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_patch_dice_is_of_each_patch_and_class(num_classes, ignored):
    _, probs, labels = made(num_classes, ignored=ignored)
    values = []
    for n in range(SHAPE[0]):
        kept = labels[n] != IGNORE
        for c in range(num_classes):
            p, g = probs[n, c][kept], labels[n][kept] == c
            values.append((2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5))
    assert float(patch_dice_loss(tensor(probs), tensor(labels))) == number(1 - np.mean(values))


def test_patch_dice_of_nothing_is_zero_without_gradient():
    _, probs, labels = made(3)
    labels[:] = IGNORE
    probs = tensor(probs).requires_grad_()
    loss = patch_dice_loss(probs, tensor(labels))
    (gradient,) = torch.autograd.grad(loss, probs)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert not gradient.any()


# Cross-entropy


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_cross_entropy_is_the_mean_over_labeled_voxels(ignored):
    logits, probs, labels = made(3, ignored=ignored)
    kept = labels != IGNORE
    own = np.take_along_axis(probs, np.maximum(labels, 0)[:, None], 1)[:, 0]
    expected = -np.log(own[kept]).mean()
    assert float(cross_entropy(tensor(logits), tensor(labels))) == number(expected)


def test_cross_entropy_of_nothing_is_zero():
    logits, _, labels = made()
    labels[:] = IGNORE
    assert float(cross_entropy(tensor(logits), tensor(labels))) == 0


def test_soft_cross_entropy_formula():
    logits, probs, _ = made(3)
    _, targets, _ = made(3, seed=1)
    expected = -(targets * np.log(probs)).sum(1)
    assert float(soft_cross_entropy(tensor(logits), tensor(targets))) == number(expected.mean())
    kept = np.random.default_rng(0).random(SHAPE)
    weighed = (expected * kept).sum() / kept.sum()
    found = soft_cross_entropy(tensor(logits), tensor(targets), tensor(kept))
    # the sum of the weights is clamped to one voxel at least
    assert float(found) == number(weighed)


def test_soft_cross_entropy_of_hard_targets_is_cross_entropy():
    logits, _, labels = made(3, ignored=0.3)
    targets, kept = one_hot(tensor(labels), 3), tensor(labels) != IGNORE
    hard = cross_entropy(tensor(logits), tensor(labels))
    torch.testing.assert_close(soft_cross_entropy(tensor(logits), targets, kept), hard)


def test_soft_cross_entropy_of_nothing_is_zero():
    logits, probs, _ = made()
    nothing = torch.zeros(SHAPE)
    assert float(soft_cross_entropy(tensor(logits), tensor(probs), nothing)) == 0


def test_cross_entropy_by_image_is_over_the_voxels_with_a_loss():
    logits, probs, labels = made(3, ignored=0.3)
    weights = np.array([0.25, 0.0])
    total, count = 0.0, 0
    for row, weight in enumerate(weights):
        for voxel in np.ndindex(*SHAPE[1:]):
            label = labels[(row, *voxel)]
            if label != IGNORE and weight > 0:
                total -= weight * np.log(probs[(row, label, *voxel)])
                count += 1
    found = cross_entropy_by_image(tensor(logits), tensor(labels), tensor(weights))
    assert float(found) == number(total / count)


def test_cross_entropy_by_image_of_nothing_is_zero_with_a_gradient():
    logits, _, labels = made()
    for rows in (0, 2):
        z = tensor(logits)[:rows].requires_grad_()
        value = cross_entropy_by_image(z, tensor(labels)[:rows], torch.zeros(rows))
        value.backward()
        assert float(value.detach()) == 0
        assert not z.grad.any()


# Contrast


def test_info_nce_formula():
    rng = np.random.default_rng(0)
    anchors, positive = rng.normal(size=(5, 4)), rng.normal(size=4)
    negatives = rng.normal(size=(5, 7, 4))

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    losses = []
    for a, row in zip(anchors, negatives, strict=True):
        powers = [np.exp(cos(a, n) / 0.5) for n in (positive, *row)]
        losses.append(-np.log(powers[0] / sum(powers)))
    found = info_nce(tensor(anchors), tensor(positive), tensor(negatives), 0.5)
    assert float(found) == number(np.mean(losses))


# The rest


@pytest.mark.parametrize(
    ("step", "rampup_steps", "expected"),
    [
        (0, 6000, math.exp(-5)),
        (3000, 6000, math.exp(-5 * 0.25)),
        (6000, 6000, 1),
        (9000, 6000, 1),
        (6000, 15000, 0.165),  # the share that the specification works out
        (9000, 15000, 0.449),
        (0, 0, 1),
        (5, 0, 1),
    ],
)
def test_rampup(step, rampup_steps, expected):
    assert sigmoid_rampup(step, rampup_steps) == pytest.approx(expected, abs=5e-4)


def test_most_likely_is_the_first_of_the_largest():
    scores = np.random.default_rng(0).integers(0, 3, (*SHAPE[:1], 4, *SHAPE[1:])).astype("f4")
    np.testing.assert_array_equal(most_likely(torch.from_numpy(scores)), scores.argmax(1))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sharpen_formula(temperature):
    p = np.linspace(0, 1, 11)
    power = p ** (1 / temperature)
    expected = power / (power + (1 - p) ** (1 / temperature))
    np.testing.assert_allclose(sharpen(tensor(p), temperature), expected, atol=1e-6)


def test_one_hot_is_zero_where_the_label_is_unknown():
    labels = torch.tensor([0, 2, IGNORE, 1]).view(1, 4, 1, 1)
    found = one_hot(labels, 3)[0, :, :, 0, 0].T
    assert found.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_add_is_a_sum_with_a_gradient():
    values = [torch.tensor(float(i), requires_grad=True) for i in range(3)]
    total = add(2 * v for v in values)
    total.backward()
    assert total.item() == 6
    assert [float(v.grad) for v in values] == [2, 2, 2]
