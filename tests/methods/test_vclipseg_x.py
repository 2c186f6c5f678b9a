"""What VCLIPSeg-X changes of VCLIPSeg, switch by switch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toy import LATE, batch_for, build
from vclipseg.losses import IGNORE
from vclipseg.methods.vclipseg import VCLIPSegSettings
from vclipseg.methods.vclipseg_x import Deformed, VCLIPSegXSettings
from vclipseg.warping import warp

OFF = {"deformation": 0.0, "deep_weight": 0.0, "contrast_temperature": 0.0}


def make(**changes):
    return build("vclipseg_x", "robust", **changes)


def test_without_its_switches_it_is_vclipseg():
    ours = make(**OFF)
    theirs = build("vclipseg", "robust", copy_paste=0.0)
    theirs.load_state_dict(ours.state_dict())
    batch = batch_for(ours)
    for x, y in zip(
        ours.loss(batch, LATE).values(), theirs.loss(batch, LATE).values(), strict=True
    ):
        assert x == y
    assert set(OFF) == set(VCLIPSegXSettings.model_fields) - set(VCLIPSegSettings.model_fields)
    assert all(VCLIPSegXSettings.model_fields[name].default == value for name, value in OFF.items())


# Deformation


def test_labels_are_deformed_like_their_image():
    method = make(deformation=0.1)
    batch = batch_for(method)
    seen = method.deform(batch)
    assert isinstance(seen, Deformed)
    assert not torch.equal(seen.images, batch.images)
    torch.testing.assert_close(seen.images, warp(batch.images, seen.places))
    assert torch.equal(seen.labels, warp(batch.labels, seen.places[: batch.num_labeled]))
    assert seen.natural is batch
    assert seen.case_ids == batch.case_ids


@pytest.mark.parametrize("copy_paste", [0.0, 0.67])
def test_the_teacher_sees_patches_as_they_lie(copy_paste):
    """Its word on an unlabeled patch is deformed like the patch, whatever row it stands in."""
    method = make(deformation=0.1, copy_paste=copy_paste)
    batch = batch_for(method)
    method.teacher.eval()
    seen = method.deform(batch)
    rows = batch.num_labeled
    guides = method.guides(seen, [])
    plain = [z.softmax(1) for z in method.teacher(batch.plain).logits]
    for guide, said in zip(guides, plain, strict=True):
        expected = warp(said, seen.places)[rows:]
        torch.testing.assert_close(guide[rows:], expected)
        if copy_paste:
            torch.testing.assert_close(guide[:rows], expected)


def test_deformations_are_of_the_batch():
    method = make(deformation=0.1)
    first, again, other = (method.deform(batch_for(method, seed)).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Deep supervision


def test_coarse_outputs_are_of_the_patch():
    method = make(deep_weight=0.25)
    batch = batch_for(method)
    out = method.network(batch.images)
    assert len(out.coarse) == 4  # two scales of two decoders
    assert all(z.shape == out.logits[0].shape for z in out.coarse)
    assert method.loss(batch, LATE)["deep"].weight == 0.25
    assert any(name.startswith("network.coarse.") for name in method.state_dict())
    assert "network.coarse." in method.training_only


def test_coarse_outputs_learn_from_labels_only():
    method = make(deep_weight=1.0, deformation=0.0)
    batch = batch_for(method)
    out = method.network(batch.images)
    known = torch.full((len(batch.images), *batch.labels.shape[1:]), IGNORE)
    known[: batch.num_labeled] = batch.labels
    loss = method.supervise(out, known)["deep"].value
    gradients = torch.autograd.grad(loss, out.coarse)
    assert all(g[: batch.num_labeled].any() for g in gradients)
    assert not any(g[batch.num_labeled :].any() for g in gradients)


# Contrast


def naive_contrast(prototypes, text, tau):
    text = text - text.mean(0)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    found = []
    for k, v in enumerate(prototypes):
        scores = np.array([v @ t / np.linalg.norm(v) / tau for t in text])
        found.append(np.log(np.exp(scores).sum()) - scores[k])
    return found


def test_prototypes_tell_text_vectors_apart():
    method = make(contrast_temperature=0.5)
    prototypes = torch.randn(method.text.shape, generator=torch.Generator().manual_seed(0))
    expected = naive_contrast(prototypes.double().numpy(), method.text.double().numpy(), 0.5)
    np.testing.assert_allclose(method.gaps(prototypes).numpy(), expected, rtol=1e-4)
    assert not np.allclose(make(**OFF).gaps(prototypes).numpy(), expected)
