"""The contract that every method and preset keeps. A new method is tested by being in METHODS."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from toy import (
    LATE,
    NAMES,
    RECIPES_IN_TIME,
    batch_for,
    build,
    fast,
    fit,
    foreground_dice,
    make_batch,
    make_sure,
)
from vclipseg.checkpoint import load_state, save_state
from vclipseg.errors import UsageError
from vclipseg.losses import IGNORE
from vclipseg.methods import METHODS, NEEDS_TEXT, PRESETS, method_class, preset, presets
from vclipseg.methods.base import Ema, Loss, MethodSettings, Task, Term

each_recipe = pytest.mark.parametrize(("name", "preset_name"), RECIPES_IN_TIME)
each_method = pytest.mark.parametrize("name", list(METHODS))


def trained(method):
    return [p for p in method.parameters() if p.requires_grad]


def gradient(value, method):
    found = torch.autograd.grad(value, trained(method), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def unsure(name):
    """Settings with which pseudo-labels of an untrained network count too."""
    return {"threshold": 0.0} if "threshold" in method_class(name).Settings.model_fields else {}


def test_presets_are_listed_without_their_modules():
    assert {name: sorted(names) for name, names in PRESETS.items()} == {
        name: sorted(presets(name)) for name in METHODS
    }


# The loss


@each_recipe
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("empty", [False, True], ids=["balls", "empty"])
def test_loss_is_finite(name, preset_name, num_classes, empty):
    method = build(name, preset_name, num_classes=num_classes)
    batch = batch_for(method, num_classes=num_classes, empty=empty)
    loss = method.loss(batch, LATE)
    assert all(torch.isfinite(term.value) for term in loss.values()), dict(loss)
    assert torch.isfinite(gradient(loss.total, method)).all()


@each_recipe
def test_a_class_missing_from_a_patch_gives_no_nan(name, preset_name):
    """Labels know three classes, the patches show one; and so does a patch of nothing but it."""
    method = build(name, preset_name, num_classes=4)
    batch = batch_for(method, num_classes=2)
    only_organ = replace(batch, labels=torch.ones_like(batch.labels))
    for shown in (batch, only_organ):
        loss = method.loss(shown, LATE)
        assert all(torch.isfinite(term.value) for term in loss.values()), dict(loss)
        assert torch.isfinite(gradient(loss.total, method)).all()


@each_recipe
def test_each_term_teaches_the_trained_weights(name, preset_name):
    """A term without a gradient is a term that is not there."""
    method = build(name, preset_name, dropout=0.0, **unsure(name))
    make_sure(method)
    batch = batch_for(method, size=32)
    mask = method.predict(batch.images).argmax(1)  # labels that the network agrees with somewhere
    batch = replace(batch, labels=mask[: batch.num_labeled])
    for term, (_, value) in method.loss(batch, LATE).items():
        assert gradient(value, method).abs().sum() > 0, term


@each_recipe
def test_number_of_patches_is_the_budget_of_every_step(name, preset_name):
    method = build(name, preset_name, steps=100)
    for step in range(101):
        labeled, unlabeled = method.patches_at(step)
        assert labeled > 0
        assert labeled + unlabeled == sum(method.settings.patches)
    assert method.patches_at(100) == method.settings.patches
    if preset_name == "robust":  # BCP's network sees two patches in one
        assert sum(method.settings.patches) == (8 if name == "bcp" else 4)


@each_recipe
@pytest.mark.parametrize("patches", [(3, 1), (1, 3)])
def test_labeled_and_unlabeled_patches_need_not_be_as_many(name, preset_name, patches):
    try:
        method = build(name, preset_name, patches=patches)
    except ValidationError:
        pytest.skip("as many, or in pairs")
    loss = method.loss(batch_for(method), LATE)
    assert torch.isfinite(gradient(loss.total, method)).all()


@each_recipe
def test_labeled_patches_alone_are_a_batch(name, preset_name):
    method = build(name, preset_name)
    loss = method.loss(make_batch(patches=(4, 0)), 0)
    assert all(torch.isfinite(term.value) for term in loss.values()), dict(loss)
    assert torch.isfinite(gradient(loss.total, method)).all()
    assert gradient(loss.total, method).any()


@each_recipe
def test_total_is_the_weighted_sum_of_the_terms(name, preset_name):
    method = build(name, preset_name)
    loss = method.loss(batch_for(method), LATE)
    assert len(loss) > 0
    expected = sum(weight * float(value.detach()) for weight, value in loss.values())
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)


@each_recipe
def test_facts_are_numbers_without_gradient(name, preset_name):
    method = build(name, preset_name)
    loss = method.loss(batch_for(method), LATE)
    for fact, value in loss.facts.items():
        number = torch.as_tensor(value)
        assert number.ndim == 0, fact
        assert not number.requires_grad, fact
        assert fact not in loss
    assert name != "vclipseg" or not method.settings.dlb or "pseudo_share" in loss.facts


@each_recipe
def test_unlabeled_images_change_the_gradient(name, preset_name):
    if method_class(name).Settings().patches[1] == 0:
        pytest.skip("uses none")
    method = build(name, preset_name, **unsure(name)).eval()

    def of(unlabeled):
        batch = batch_for(method)
        images = torch.cat([batch.labeled_images, unlabeled])
        return gradient(method.loss(replace(batch, images=images), LATE).total, method)

    images = batch_for(method, seed=5).unlabeled_images
    control = preset_name == "robust_without_unlabeled"  # blind but for batch statistics
    assert torch.allclose(of(images), of(images.flip(2) * 2)) == control


@each_recipe
def test_loss_changes_no_trained_weight(name, preset_name):
    method = build(name, preset_name)
    before = [p.clone() for p in method.parameters()]
    method.loss(batch_for(method), LATE)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


@each_recipe
def test_loss_does_not_change_the_batch(name, preset_name):
    method = build(name, preset_name)
    batch, untouched = batch_for(method), batch_for(method)
    method.loss(batch, LATE)
    assert torch.equal(batch.images, untouched.images)
    assert torch.equal(batch.labels, untouched.labels)


@each_recipe
def test_voxels_without_a_label_may_be_in_a_labeled_patch(name, preset_name):
    method = build(name, preset_name)
    batch = batch_for(method)
    batch.labels[:, :8] = IGNORE
    loss = method.loss(batch, LATE)
    assert torch.isfinite(loss.total), dict(loss)


@each_recipe
def test_loss_is_finite_in_bfloat16(name, preset_name):
    method = build(name, preset_name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(batch_for(method), LATE)
    assert torch.isfinite(loss.total)
    assert loss.total.dtype == torch.float32


@each_method
def test_several_channels(name):
    method = build(name, channels=3)
    assert torch.isfinite(method.loss(batch_for(method, channels=3), LATE).total)


# Prediction


@each_recipe
@pytest.mark.parametrize("size", [(16, 16, 16), (16, 17, 6)])
def test_predict_gives_probabilities(name, preset_name, size):
    method = build(name, preset_name, num_classes=3).eval()
    with torch.no_grad():
        probs = method.predict(make_batch(size=size, num_classes=3).images)
    assert probs.shape == (4, 3, *size)
    assert probs.min() >= 0
    torch.testing.assert_close(probs.sum(1), torch.ones(4, *size))


@each_recipe
def test_prediction_of_a_case_does_not_depend_on_its_neighbours(name, preset_name):
    method = build(name, preset_name).eval()
    images = batch_for(method).images
    with torch.no_grad():
        alone, together = method.predict(images[:1]), method.predict(images)[:1]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


# State


@each_recipe
def test_state_holds_everything(name, preset_name, tmp_path):
    method = build(name, preset_name, steps=1)
    fit(method, fast(steps=1))
    save_state(tmp_path / "state.pt", {"method": method.state_dict()})
    restored = build(name, preset_name, steps=1, seed=1)
    restored.train().to(memory_format=torch.channels_last_3d)  # as the loop does
    restored.load_state_dict(load_state(tmp_path / "state.pt")["method"])
    totals = []
    for each in (method, restored):
        torch.manual_seed(3)
        each.before_step(LATE)
        loss = each.loss(batch_for(each), LATE)
        each.after_step(LATE)
        totals.append(loss.total.detach())
    assert torch.equal(*totals)
    assert all(
        torch.equal(value, restored.state_dict()[key]) for key, value in method.state_dict().items()
    )


@each_recipe
def test_text_vectors_are_state(name, preset_name):
    if name not in NEEDS_TEXT:
        pytest.skip("reads none")
    method = build(name, preset_name)
    assert torch.equal(method.state_dict()["text"], 3 * torch.eye(2, 8))


@each_recipe
def test_prediction_does_without_what_only_training_needs(name, preset_name):
    method = build(name, preset_name).eval()
    images = batch_for(method).images
    with torch.no_grad():
        before = method.predict(images)
        for key, value in method.state_dict().items():
            if key.startswith(method.training_only) and value.is_floating_point():
                value.fill_(torch.nan)
        assert torch.equal(before, method.predict(images))


@each_method
def test_a_method_that_needs_text_says_so(name):
    cls = method_class(name)
    task = Task(1, NAMES[:2], 10)
    if name in NEEDS_TEXT:
        with pytest.raises(ValueError, match="text vector"):
            cls(cls.Settings(filters=1), task)
    else:
        cls(cls.Settings(filters=1), task)


def test_state_dict_is_plain_tensors(tmp_path):
    """So that it can be read without running anybody's code."""
    for name in METHODS:
        file = io.BytesIO()
        torch.save(build(name).state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)


# Settings and presets


@each_recipe
def test_preset_is_of_known_sections(name, preset_name):
    assert set(preset(name, preset_name)) <= {"method", "train", "text", "predict", "augment"}


@each_method
def test_every_method_has_both_common_presets(name):
    assert {"robust", "faithful"} <= set(presets(name))


@each_method
def test_settings_are_frozen_and_know_their_name(name):
    settings = method_class(name).Settings()
    assert isinstance(settings, MethodSettings)
    assert settings.name == name
    with pytest.raises(ValueError, match="frozen"):
        settings.filters = 3
    with pytest.raises(ValueError, match="nonsense"):
        type(settings)(nonsense=1)


def test_unknown_method_and_preset():
    with pytest.raises(UsageError, match="no method 'nnunet'; there are supervised, "):
        method_class("nnunet")
    with pytest.raises(UsageError, match="supervised has no preset 'x'; it has faithful, robust"):
        preset("supervised", "x")


# Bricks


def test_loss_is_a_dict_of_terms():
    loss = Loss(facts={"share": 0.5}, a=Term(2.0, torch.tensor(3.0)), b=Term(0.5, torch.tensor(4)))
    assert float(loss.total) == 8
    assert list(loss) == ["a", "b"]
    assert Loss().facts == {}


def test_ema_follows_its_closed_form():
    student = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(student.weight, 5.0)
    teacher = Ema(student, 0.99)
    torch.nn.init.constant_(student.weight, 1.0)
    for _ in range(100):
        teacher.update(student, LATE)
    assert teacher.network.weight.item() == pytest.approx(1 + 4 * 0.99**100, rel=1e-4)


def test_ema_warms_up_as_the_mean_of_all_steps():
    """With a = 1 - 1/(t+1) the first step is a copy, and after n steps it is the plain mean."""
    student = torch.nn.Linear(1, 1, bias=False)
    teacher, seen = Ema(student, 0.99), []
    for step in range(20):
        torch.nn.init.normal_(student.weight)
        seen.append(student.weight.item())
        teacher.update(student, step)
        assert teacher.network.weight.item() == pytest.approx(sum(seen) / len(seen), abs=1e-6)


@pytest.mark.parametrize("buffers", [False, True])
def test_ema_of_running_statistics(buffers):
    student = torch.nn.BatchNorm1d(2).train()
    teacher = Ema(student, 0.5, buffers=buffers)
    student(torch.randn(8, 2) + 4)
    teacher.update(student, LATE)
    if buffers:
        torch.testing.assert_close(teacher.network.running_mean, student.running_mean / 2)
        assert teacher.network.num_batches_tracked == 1
        assert not teacher.train().network.training
    else:
        assert not teacher.network.running_mean.any()
        assert teacher.train().network.training


def test_ema_has_no_gradient_and_no_trained_weight():
    student = torch.nn.Linear(2, 2)
    teacher = Ema(student, 0.9)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not teacher(torch.randn(1, 2)).requires_grad


# Learning


@pytest.mark.slow
@each_recipe
def test_learns_balls(name, preset_name):
    """A toy that every method must solve with what its `robust` preset trains with."""
    if preset_name != "robust":
        pytest.skip("published settings are for 16 filters and thousands of steps")
    steps = 120
    method = build(name, preset_name, steps=steps)
    settings = fast(steps=steps, lr=0.01, **presets(name)[preset_name]["train"])
    state = fit(method, settings, lambda step: batch_for(method, step, 32, step))
    method.load_state_dict(state.weights())
    test = batch_for(method, seed=10_000, size=32)
    with torch.no_grad():
        probs = method.eval().predict(test.labeled_images)
    assert foreground_dice(probs, test.labels) > 0.85


@each_method
def test_sgd_goes_on_after_a_warm_up(name):
    """Terms that begin later give weights their first gradients then."""
    method = build(name, "faithful", steps=4, warmup=0.5, **unsure(name))
    state = fit(method, fast(steps=4, optimizer="sgd"))
    assert state.step == 4


# Going on from an earlier run


@each_recipe
def test_starts_from_the_weights_of_an_earlier_run(name, preset_name):
    """And from those of another method, where a network is the same."""
    earlier, method = build(name, preset_name, seed=1), build(name, preset_name, seed=2)
    weights = {k: v for k, v in earlier.state_dict().items() if not k.startswith("teacher")}
    taken = method.start_from(weights)
    assert set(taken) == set(weights)
    for value in (m.eval().predict(batch_for(m).images) for m in (earlier, method)):
        torch.testing.assert_close(value, earlier.predict(batch_for(earlier).images))
    teacher = getattr(method, "teacher", None)
    if teacher is not None:
        copies = teacher.network.state_dict()
        assert all(torch.equal(copies[k], v) for k, v in method.network.state_dict().items())


def test_weights_of_another_shape_are_left_out():
    method = build("supervised", filters=4)
    taken = method.start_from(build("supervised", filters=2, num_classes=3).state_dict())
    assert all(name.endswith("num_batches_tracked") for name in taken)
