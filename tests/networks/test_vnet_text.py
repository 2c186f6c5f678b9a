from __future__ import annotations

import pytest
import torch

from vclipseg.networks.vnet_text import Projection, TextVNet, VoxelPrompts


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def text(num_classes=2, dim=8):
    return torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))


# The published network: 16 filters, one channel, two classes, E = 512


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        network = TextVNet(1, torch.zeros(2, 512))
    assert count(network) == 16_857_142
    assert count(network.prompts) == 4_114_674
    assert count(network.projections) == 394_752
    assert count(network.encoder, network.prompts, network.decoders[0]) == 13_563_540


def test_parameter_count_without_prompts_and_projections_is_that_of_two_decoders():
    with torch.device("meta"):
        network = TextVNet(1, torch.zeros(2, 512), prompts=False, projections=0)
    assert count(network) == 12_347_716


def test_prediction_runs_no_decoder_that_it_does_not_need():
    network = TextVNet(1, text(), filters=2).eval()
    ran = []
    for i, module in enumerate([*network.decoders, *network.projections]):
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    network.predict(torch.randn(1, 1, 16, 16, 16), decoders=1)
    assert ran == [0]


# Any size, channels, classes, filters


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 20, 6), (17, 5, 33)])
def test_output_has_the_size_of_the_images(size):
    network = TextVNet(1, text(), filters=2).eval()
    images = torch.randn(1, 1, *size)
    out = network(images)
    coarse = tuple(-(-n // 16) for n in size)
    assert [z.shape for z in out.logits] == [(1, 2, *size)] * 2
    assert out.fused.shape == (1, 32, *coarse)
    assert network.predict(images, 2).shape == (1, 2, *size)


@pytest.mark.parametrize(("channels", "classes", "filters"), [(1, 2, 1), (3, 4, 2), (2, 9, 3)])
def test_channels_classes_and_filters_are_free(channels, classes, filters):
    network = TextVNet(channels, text(classes), filters=filters).eval()
    out = network(torch.randn(1, channels, 16, 16, 16))
    assert out.logits[1].shape == (1, classes, 16, 16, 16)


def test_logits_are_float32_under_autocast():
    network = TextVNet(1, text(), filters=2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(1, 1, 16, 16, 16))
    assert {z.dtype for z in out.logits} == {torch.float32}


# Voxel-wise prompts, equations 1 to 3


def test_each_voxel_is_told_a_mixture_of_the_projected_text_vectors():
    prompts = VoxelPrompts(8, text()).eval()
    features = torch.randn(2, 8, 3, 2, 4)
    seen = []
    prompts.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    fused = prompts(features)
    share = prompts.controller(features).softmax(1)
    vectors = prompts.text @ prompts.project_text.weight.T + prompts.project_text.bias
    mixture = sum(share[:, c, None] * vectors[c].view(1, 8, 1, 1, 1) for c in range(2))
    torch.testing.assert_close(seen[0][:, :8], features)  # image first
    torch.testing.assert_close(seen[0][:, 8:], mixture)
    assert fused.shape == features.shape


def test_text_is_state_but_not_trained():
    network = TextVNet(1, text(), filters=2)
    assert torch.equal(network.state_dict()["prompts.text"], text())
    assert "prompts.text" not in dict(network.named_parameters())


def test_text_vectors_are_copied():
    mine = text()
    network = TextVNet(1, mine, filters=2)
    mine.zero_()
    assert torch.equal(network.prompts.text, text())


def test_both_decoders_read_the_fused_features():
    network = TextVNet(1, text(), filters=2).eval()
    seen = []
    for decoder in network.decoders:
        decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = network(torch.randn(1, 1, 16, 16, 16))
    assert seen[0][-1] is seen[1][-1] is out.fused


def test_words_change_the_prediction():
    torch.manual_seed(0)
    network, images = TextVNet(1, text(), 2, dropout=0.0), torch.randn(2, 1, 32, 16, 16)
    before = network.predict(images, 1)
    network.prompts.text.copy_(network.prompts.text.flip(0))
    assert not torch.allclose(before, network.predict(images, 1), atol=1e-3)


# Prediction


def test_predict_is_the_mean_of_the_first_decoders():
    network, images = TextVNet(1, text(), filters=2).eval(), torch.randn(1, 1, 16, 16, 16)
    first, second = (z.softmax(1) for z in network(images).logits)
    torch.testing.assert_close(network.predict(images, 1), first)
    torch.testing.assert_close(network.predict(images, 2), (first + second) / 2)


def test_projection_is_two_pointwise_layers():
    projection = Projection(4, 8)
    features = torch.randn(1, 4, 2, 2, 2)
    alone = projection(features[..., :1, :1, :1])
    torch.testing.assert_close(projection(features)[..., :1, :1, :1], alone)
    assert projection(features).shape == (1, 8, 2, 2, 2)
