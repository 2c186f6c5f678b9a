"""The fusion against the published order of concatenating, mixing and upsampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vclipseg.networks.fusion import Fusion, LevelsVNet, decoder_levels, pick, places
from vclipseg.networks.vnet import VNet

FILTERS, EMBEDDING = 2, 5


def made_levels(size=(16, 32, 16), rows=2):
    torch.manual_seed(1)
    return [
        torch.randn(rows, FILTERS * width, *(n // cell for n in size))
        for width, cell in ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
    ]


def upsampled(x):
    """Twice as many voxels along each axis, linearly between the first and the last."""
    for axis in (2, 3, 4):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, 2 * n)
        below = np.minimum(at.astype(int), n - 2)
        share = (at - below).reshape([-1 if i == axis else 1 for i in range(5)])
        x = x.take(below, axis) * (1 - share) + x.take(below + 1, axis) * share
    return x


def mixed(weight, x):
    return np.einsum("ef,bfxyz->bexyz", weight, x)


def naive_fusion(fusion, levels, further):
    """h_i = W_i [up(h), f_i] + [up(h), f_i]; the last without the residual."""
    f = [level.double().numpy() for level in levels]
    w = [layer.weight.detach().double().numpy() for layer in fusion.mixes]
    h = mixed(w[0], f[0]) + f[0]
    for i in (1, 2, 3):
        joined = np.concatenate([upsampled(h), f[i]], 1)
        h = mixed(w[i], joined) + joined
    h = mixed(fusion.last.weight.detach().double().numpy(), np.concatenate([h, f[4]], 1))
    for layer in fusion.further if further else ():
        h = mixed(layer.weight.detach().double().numpy(), h)
    return h


@pytest.mark.parametrize("further", [False, True], ids=["teacher", "student"])
def test_fusion_is_that_of_wide_maps(further):
    levels, fusion = made_levels(), Fusion(FILTERS, EMBEDDING, further=2)
    found = fusion(levels, further=further)
    assert found.shape == (2, EMBEDDING, 16, 32, 16)
    expected = naive_fusion(fusion, levels, further)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_gradient_is_that_of_wide_maps():
    """Of each weight, by finite differences of the naive form."""
    levels, fusion = made_levels((16, 16, 16), 1), Fusion(FILTERS, EMBEDDING, further=1)
    fusion(levels, further=True).square().sum().backward()
    for weight in fusion.parameters():
        place = (0, weight.shape[1] // 2)
        values = []
        for shift in (1e-3, -1e-3):
            with torch.no_grad():
                weight[place] += shift
                values.append((naive_fusion(fusion, levels, True) ** 2).sum())
                weight[place] -= shift
        expected = (values[0] - values[1]) / 2e-3
        assert float(weight.grad[place]) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_parameter_counts():
    """The published widths for 16 filters: 128, 192, 224, 240, and 256 to 16."""
    fusion = Fusion(16, 16, further=2)
    widths = [layer.weight.shape[0] for layer in fusion.mixes]
    assert widths == [128, 192, 224, 240]
    assert sum(p.numel() for p in fusion.mixes.parameters()) == sum(n * n for n in widths)
    assert sum(p.numel() for p in fusion.last.parameters()) == 256 * 16
    assert sum(p.numel() for p in fusion.further.parameters()) == 2 * 16 * 16


def test_network_is_the_plain_one():
    network, plain = LevelsVNet(1, 2, 2, 0.0), VNet(1, 2, 2, 0.0)
    plain.load_state_dict(network.state_dict())
    images = torch.randn(1, 1, 20, 16, 9)
    out = network(images)
    torch.testing.assert_close(out.logits, plain(images))
    shapes = [tuple(level.shape[1:]) for level in out.levels]
    assert shapes == [(16, 4, 2, 2), (8, 8, 4, 4), (4, 16, 8, 8), (2, 32, 16, 16), (2, 32, 16, 16)]


def test_levels_are_sums_with_the_skip_and_the_last_map():
    network = LevelsVNet(1, 2, 2, 0.0).eval()
    features = network.encoder(torch.randn(1, 1, 16, 16, 16))
    decoder = network.decoders[0]
    *sums, last = decoder_levels(decoder, features)
    maps = decoder.maps(features)
    before = [features[-1], *maps[:-1]]
    for up, x, skip, found in zip(decoder.ups, before, features[3::-1], sums, strict=True):
        torch.testing.assert_close(found, up(x) + skip)
    torch.testing.assert_close(last, maps[-1])


def test_pick_takes_voxels_in_scan_order():
    maps = torch.arange(2 * 3 * 4).float().view(2, 3, 4, 1, 1)
    mask = torch.zeros(2, 4, 1, 1, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    assert places(mask).tolist() == [1, 7]
    assert pick(maps, places(mask)).tolist() == [[1, 5, 9], [15, 19, 23]]
    wide = maps.bfloat16().to(memory_format=torch.channels_last_3d)
    assert torch.equal(pick(wide, places(mask)), pick(maps, places(mask)))
