"""Narrow maps read as wide ones: the layers of a V-Net stay what torch's own are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vclipseg.networks import wide
from vclipseg.networks.vnet import Conv3d, ConvTranspose3d, PointwiseConv3d
from vclipseg.networks.wide import LAYOUT, narrow, pair_weight, widen

LAYERS = {
    "3x3x3": lambda channels: Conv3d(channels, 4, 3, padding=1),
    "pointwise": lambda channels: PointwiseConv3d(channels, 3),
    "transposed": lambda channels: ConvTranspose3d(channels, 4),
}
PATHS = {"3x3x3": "conv3x3x3", "pointwise": "product", "transposed": "double"}


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=LAYOUT)


def test_widen_is_a_view_and_narrow_its_inverse():
    x = maps(2, 8, 6, 5, 16)
    assert widen(x, 4).shape == (2, 32, 6, 5, 4)
    assert widen(x, 4).data_ptr() == x.data_ptr()
    assert torch.equal(narrow(widen(x, 4), 4), x)
    assert torch.equal(widen(x, 2)[:, 8:], x[..., 1::2])


def test_a_pair_has_of_the_pairs_about_it_what_each_voxel_had():
    x, layer = maps(2, 3, 5, 4, 8).double(), nn.Conv3d(3, 5, 3, padding=1).double()
    pairs = F.conv3d(widen(x, 2), pair_weight(layer.weight), layer.bias.repeat(2), padding=1)
    torch.testing.assert_close(narrow(pairs, 2), layer(x))


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_torch(kind, channels, monkeypatch):
    """Those of float64 up to what bfloat16 rounds, and hardly further from them than torch's."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind](channels), maps(2, channels, 6, 5, 8).bfloat16().float()
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16().float()

    def results(layer, x, precision):
        torch.manual_seed(1)
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.float32):
            y = layer(x)
        grads = torch.autograd.grad(y, (x, *layer.parameters()), torch.randn(y.shape).to(y))
        return y, [v.double() for v in (y, *grads)]

    used = []
    path = getattr(wide, PATHS[kind])
    monkeypatch.setattr(wide, PATHS[kind], lambda *args: used.append(kind) or path(*args))
    y, found = results(layer, x, torch.float32)
    assert used
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=LAYOUT)
    monkeypatch.setattr(wide, "is_quicker", lambda x: False)
    _, plain = results(layer, x, torch.float32)
    _, exact = results(layer.double(), x.double(), torch.float64)
    for ours, torchs, true in zip(found, plain, exact, strict=True):
        scale = true.abs().max()
        assert (ours - true).abs().max() <= 0.01 * scale
        assert (ours - true).abs().mean() <= 1.5 * (torchs - true).abs().mean() + 1e-3 * scale


@pytest.mark.parametrize("kind", LAYERS)
def test_in_float32_and_for_odd_maps_torchs_own_are_taken(kind, monkeypatch):
    def fail(*_):
        raise AssertionError("wide")

    layer = LAYERS[kind](8)
    monkeypatch.setattr(wide, PATHS[kind], fail)
    layer(maps(1, 8, 4, 4, 8))
    if kind != "transposed":
        with torch.autocast("cpu", torch.bfloat16):
            layer(maps(1, 8, 4, 4, 7))


def test_only_what_is_asked_for_has_a_gradient():
    layer, x = ConvTranspose3d(4, 2), maps(1, 4, 3, 3, 3)
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (of_bias,) = torch.autograd.grad(layer(x).float().sum(), layer.bias)
    assert of_bias.tolist() == [6 * 6 * 6] * 2


@pytest.mark.parametrize("shape", [(2, 2, 2, 6), (1, 3, 3, 6), (2, 4, 3, 8)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_read_no_memory_that_was_never_written(kind, shape):
    torch.manual_seed(0)
    layer, x = LAYERS[kind](8), maps(shape[0], 8, *shape[1:]).requires_grad_()
    gradients = []
    for _ in range(5):
        del_me = [torch.full((size,), float("nan")) for size in (10_000, 100_000)]
        del del_me  # freed memory that holds NaN
        with torch.autocast("cpu", torch.bfloat16):
            value = layer(x).float().square().sum()
        gradients.append(torch.autograd.grad(value, (x, *layer.parameters())))
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))
