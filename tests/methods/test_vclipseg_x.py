"""What VCLIPSeg-X changes of VCLIPSeg, switch by switch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from toy import LATE, batch_for, build
from vclipseg.losses import IGNORE
from vclipseg.methods.vclipseg import VCLIPSegSettings
from vclipseg.methods.vclipseg_x import Deformed, VCLIPSegXSettings

OFF = {
    "deformation": 0.0,
    "deformed_share": 1.0,
    "networks": 1,
    "deep_weight": 0.0,
    "least_share": 0.0,
    "contrast_temperature": 0.0,
}


def make(**changes):
    """The preset with every switch off but those asked for."""
    return build("vclipseg_x", "robust", **{**OFF, "threshold": 0.0, **changes})


def test_without_its_switches_it_is_vclipseg():
    ours = make()
    theirs = build("vclipseg", "robust")
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
    torch.testing.assert_close(seen.images, seen.warp(batch.images))
    as_images = seen.warp.rows(0, batch.num_labeled)(batch.labels)
    assert torch.equal(seen.labels, as_images)
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
        expected = seen.warp(said)[rows:]
        torch.testing.assert_close(guide[rows:], expected)
        if copy_paste:
            torch.testing.assert_close(guide[:rows], expected)


def test_deformations_are_of_the_batch():
    method = make(deformation=0.1)
    first, again, other = (method.deform(batch_for(method, seed)).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Several networks


@pytest.mark.parametrize("networks", [2, 3])
def test_networks_see_nothing_of_each_other(networks):
    method = make(networks=networks)
    batch = batch_for(method)
    logits = method.network(batch.images).logits
    assert len(logits) == networks
    assert not torch.allclose(logits[0], logits[1])
    (gradient,) = torch.autograd.grad(
        logits[1].sum(), method.network.members[0].decoders[0].head.weight, allow_unused=True
    )
    assert gradient is None
    method.eval()
    probs = [z.softmax(1) for z in method.network(batch.images).logits]
    torch.testing.assert_close(method.predict(batch.images), torch.stack(probs).mean(0))


def test_two_networks_multiply_less_than_two_decoders():
    flops = []
    for networks in (2, 1):
        method = make(networks=networks)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            method.network(torch.zeros(1, 1, 32, 32, 32))
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1]


def test_each_network_has_its_own_projection():
    method = make(networks=3)
    out = method.network(batch_for(method).images)
    embedded = method.network.embed(out)
    assert [e.shape for e in embedded] == [embedded[0].shape] * 3
    assert embedded[0].shape[1] == method.text.shape[1]
    second = method.network.members[1].projections[0](out.fused[:, 64:128])
    torch.testing.assert_close(embedded[1], second)


def test_networks_need_no_projection_to_predict():
    method = make(networks=2, deep_weight=0.1)
    names = [n for n in method.state_dict() if n.startswith("network.")]
    unneeded = [n for n in names if n.startswith(method.training_only)]
    assert sum(".projections." in n for n in unneeded) == 8
    assert sum(".coarse." in n for n in unneeded) == 8
    assert not any(".decoders." in n for n in unneeded)


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
    method = make(deep_weight=1.0)
    batch = batch_for(method)
    out = method.network(batch.images)
    known = torch.full((len(batch.images), *batch.labels.shape[1:]), IGNORE)
    known[: batch.num_labeled] = batch.labels
    loss = method.supervise(out, known)["deep"].value
    gradients = torch.autograd.grad(loss, out.coarse)
    assert all(g[: batch.num_labeled].any() for g in gradients)
    assert not any(g[batch.num_labeled :].any() for g in gradients)


# Thresholds


def test_the_surest_of_a_class_count_in_any_case():
    """A class sure of itself keeps what is above 0.9; one that is not, its better part."""
    method = make(threshold=0.9, least_share=0.5)
    labels = torch.tensor([0] * 10 + [1] * 10).view(1, 20, 1, 1)
    confidence = torch.tensor(
        [0.95] * 8 + [0.6] * 2 + [0.85, 0.8, 0.76, 0.75, 0.74, 0.66, 0.6, 0.6, 0.55, 0.5]
    )
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    kept = method.sure(confidence.view(1, 20, 1, 1), labels, everywhere).flatten()
    assert kept[:10].tolist() == [True] * 8 + [False] * 2
    assert kept[10:].tolist() == [True] * 5 + [False] * 5  # above 0.72
    plain = make(threshold=0.9).sure(confidence.view(1, 20, 1, 1), labels, everywhere)
    assert plain.flatten()[10:].tolist() == [False] * 10


def test_all_of_a_class_can_be_asked_for():
    method = make(threshold=0.9, least_share=1.0)
    confidence = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (confidence > 0.5).long()
    kept = method.sure(confidence, labels, torch.ones_like(labels, dtype=torch.bool))
    assert kept.all()
    assert kept.shape == labels.shape


@pytest.mark.parametrize("copy_paste", [0.0, 0.5])
def test_what_labels_teach_does_not_count_as_sure(copy_paste):
    """The share is of the voxels that follow pseudo-labels; the teacher is sure of labeled ones anyway."""
    method = make(threshold=0.9, least_share=0.5, copy_paste=copy_paste)
    _, known, guided = method.view(batch_for(method))
    taught = guided & (known == IGNORE)
    organ = torch.where(taught, 0.8, 0.96)
    guide = torch.stack([1 - organ, organ], 1)
    _, kept = method.pseudo_labels([guide] * 2, torch.zeros(2), taught)
    assert torch.equal(kept.bool(), taught)


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
    assert not np.allclose(make().gaps(prototypes).numpy(), expected)
