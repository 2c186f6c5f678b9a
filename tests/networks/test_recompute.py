"""Stages that are computed again in backward: the same result, and less that is stored."""

from __future__ import annotations

import pytest
import torch

from toy import RECIPES, batch_for, build, fast, fit
from vclipseg.networks.vnet import Staged, recompute

QUICK = ("vclipseg", "caussl")
MAINS = [
    pytest.param(*recipe, id=recipe[0], marks=() if recipe[0] in QUICK else pytest.mark.slow)
    for recipe in RECIPES
    if recipe[1] == "robust"
]


def gradients(name, preset, saving, **settings):
    """The loss of a step, its gradients, and the running statistics after it."""
    method = build(name, preset, **settings)
    recompute(method, saving)
    torch.manual_seed(5)
    loss = method.loss(batch_for(method, size=(16, 16, 32)), 50)
    loss.total.backward()
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return loss.total.detach(), grads, dict(method.named_buffers())


@pytest.mark.parametrize(("name", "preset"), MAINS)
def test_the_result_is_the_same(name, preset):
    (loss, grads, buffers), (loss_again, grads_again, buffers_again) = (
        gradients(name, preset, saving) for saving in (False, True)
    )
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grads_again[key], grad, rtol=1e-5, atol=1e-6)
    for key, buffer in buffers.items():  # followed once
        assert torch.equal(buffers_again[key], buffer), key


def test_what_a_stage_draws_is_the_same_again():
    """CAML's attention drops out inside a stage."""
    plain, saving = (gradients("caml", "faithful", s, dropout=0.5) for s in (False, True))
    assert any("encoder.blocks.3.1" in key for key in plain[1])
    for key, grad in plain[1].items():
        torch.testing.assert_close(saving[1][key], grad, rtol=1e-5, atol=1e-6)


def test_narrow_maps_take_the_path_of_their_own():
    """With 8 filters batch normalization is folded, which has statistics of its own to leave alone."""
    plain, saving = (gradients("vclipseg", "faithful", s, filters=8, dropout=0.5) for s in (0, 1))
    assert torch.equal(plain[0], saving[0])
    for before, after in zip(plain[1:], saving[1:], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def stored(saving):
    """Bytes that autograd holds after a forward pass."""
    method = build("vclipseg", "faithful")
    recompute(method, saving)
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = batch_for(method, size=(32, 32, 16)).images
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = method.network(images).logits
    inputs = {p.untyped_storage().data_ptr() for p in method.parameters()}
    del logits
    return sum(size for place, size in held.items() if place not in inputs)


def test_less_is_stored():
    assert stored(True) < 0.4 * stored(False)


def test_training_says_so_and_takes_it_back():
    state = fit(build(), fast(steps=1, save_memory=True))
    assert all(m.recompute for m in state.method.modules() if isinstance(m, Staged))
    fit(state.method, fast(steps=1))
    assert not any(m.recompute for m in state.method.modules() if isinstance(m, Staged))


@pytest.mark.slow
def test_a_run_that_saves_memory_equals_one_that_does_not():
    plain, saving = (fit(build(), fast(steps=3, save_memory=s)) for s in (False, True))
    for key, weights in plain.weights().items():
        torch.testing.assert_close(saving.weights()[key], weights, rtol=1e-3, atol=1e-5)
