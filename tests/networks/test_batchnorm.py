from __future__ import annotations

import pytest
import torch
from torch import nn

from vclipseg.networks.batchnorm import BatchNorm3d, can_fold
from vclipseg.networks.vnet import norm_relu

SHAPE = (2, 8, 6, 5, 16)


def maps(channels=8, dtype=torch.float32, shape=SHAPE):
    x = torch.randn(shape[0], channels, *shape[2:]) * 3 + torch.randn(channels, 1, 1, 1)
    return x.to(dtype).to(memory_format=torch.channels_last_3d)


def pair(channels):
    torch.manual_seed(0)
    ours, torchs = BatchNorm3d(channels), nn.BatchNorm3d(channels)
    nn.init.uniform_(torchs.weight, 0.5, 2)
    nn.init.normal_(torchs.bias)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def test_the_networks_use_it():
    assert isinstance(norm_relu(8)[0], BatchNorm3d)


@pytest.mark.parametrize("channels", [2, 8, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 1 / 128)], ids=str
)
def test_training_equals_torch(channels, dtype, tolerance):
    ours, torchs = pair(channels)
    results = []
    shape = (*SHAPE[:4], 64)
    for norm in (ours, torchs):
        torch.manual_seed(1)
        x, grad = maps(channels, dtype, shape), maps(channels, dtype, shape)
        assert can_fold(x)
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        results.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        scale = float(theirs.detach().abs().max())
        assert torch.allclose(mine.float(), theirs.float(), rtol=0, atol=tolerance * scale)


def test_gradient_agrees_with_finite_differences():
    norm = BatchNorm3d(8).double()
    x = maps(dtype=torch.float64, shape=(1, 8, 2, 2, 8)).requires_grad_()
    assert can_fold(x)
    weigh = torch.randn_like(x)
    assert torch.autograd.gradcheck(lambda v: (norm(v) * weigh).sum(), (x,), atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [
        maps(channels=32),
        maps(channels=3),
        maps(shape=(2, 8, 6, 5, 4)),
        maps().contiguous(),
    ],
    ids=["wide", "odd channels", "short", "layout"],
)
def test_other_maps_are_left_to_torch(x):
    assert not can_fold(x)
    ours, torchs = pair(x.shape[1])
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.running_var, torchs.running_var)


def test_evaluation_is_left_to_torch():
    ours, torchs = pair(8)
    x = maps()
    assert torch.equal(ours.eval()(x), torchs.eval()(x))


def test_a_constant_map_stays_finite():
    ours, _ = pair(8)
    x = torch.full(SHAPE, 3.0).to(memory_format=torch.channels_last_3d).requires_grad_()
    ours(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_one_value_a_channel_takes_the_running_statistics():
    ours, _ = pair(8)
    ours.running_mean += 1
    x = torch.randn(1, 8, 1, 1, 1, requires_grad=True)
    found = ours.train()(x)
    assert ours.num_batches_tracked == 0
    torch.testing.assert_close(found, ours.eval()(x))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.any()
