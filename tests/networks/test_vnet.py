from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vclipseg.networks.vnet import (
    Conv3d,
    ConvBlock,
    Decoder,
    Encoder,
    Head,
    MultiDecoderVNet,
    PointwiseConv3d,
    VNet,
    pad_to_stride,
    pads_to_stride,
    unpad,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


# The published networks: 16 filters, one channel, two classes


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda: Encoder(1, 16, 0.5), 7_376_896),
        (lambda: Decoder(2, 16, "transposed", 0.5), 2_071_970),
        (lambda: Decoder(2, 16, "trilinear", 0.5), 2_898_850),
        (lambda: Decoder(2, 16, "nearest", 0.5), 2_898_850),
        (lambda: VNet(1, 2), 9_448_866),
        (lambda: MultiDecoderVNet(1, 2, ("transposed", "trilinear")), 12_347_716),
        (lambda: MultiDecoderVNet(1, 2, ("transposed", "trilinear", "nearest")), 15_246_566),
    ],
    ids=["encoder", "transposed", "trilinear", "nearest", "V-Net", "two decoders", "three"],
)
def test_parameter_count_is_the_published_one(make, parameters):
    with torch.device("meta"):
        assert count(make()) == parameters


# Any size, channels, classes, filters


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 16, 6), (17, 20, 33), (1, 5, 16)])
def test_logits_have_the_size_of_the_images(size):
    network = VNet(1, 2, filters=2).eval()
    assert network(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("channels", "classes", "filters"), [(1, 2, 1), (3, 4, 2), (2, 9, 5), (4, 2, 3)]
)
def test_channels_classes_and_filters_are_free(channels, classes, filters):
    network = MultiDecoderVNet(channels, classes, ("transposed", "nearest"), filters).eval()
    images = torch.randn(2, channels, 16, 16, 16)
    assert [logits.shape for logits in network(images)] == [(2, classes, 16, 16, 16)] * 2


def test_features_halve_and_widen():
    features = Encoder(1, 2, 0.0)(torch.randn(1, 1, 32, 16, 48))
    assert [tuple(f.shape[1:]) for f in features] == [
        (2, 32, 16, 48),
        (4, 16, 8, 24),
        (8, 8, 4, 12),
        (16, 4, 2, 6),
        (32, 2, 1, 3),
    ]


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert VNet(1, 2, filters=2).eval()(torch.randn(1, 1, 16, 16, 16)).dtype == torch.float32


# How it is wired


def test_skips_are_added():
    """With what comes from below silenced, a decoder sees the finest skip alone."""
    decoder = Decoder(2, 2, "transposed", 0.0).eval()
    for module in decoder.ups.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.zeros_(module.weight)
    features = [torch.randn(1, 2 * 2**i, 32 // 2**i, 32 // 2**i, 32 // 2**i) for i in range(5)]
    expected = decoder.head(decoder.blocks[-1](features[0]))
    torch.testing.assert_close(decoder(features), expected)


def test_block_is_convolution_normalization_relu():
    block = ConvBlock(1, 3, 2)
    names = [type(layer).__name__ for layer in block]
    assert names == ["Conv3d", "BatchNorm3d", "ReLU"] * 2
    assert block(torch.randn(1, 1, 4, 4, 4)).min() >= 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_pointwise_convolution_is_a_convolution_and_keeps_the_layout_of_channels(memory_format):
    x = torch.randn(2, 8, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
    layer = PointwiseConv3d(8, 3)
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight, layer.bias))
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)


def beaten_by_every_feature(layer):
    """Whether a class has a lower weight than another for each feature."""
    weight = layer.weight.detach().flatten(1)
    others = ~torch.eye(len(weight), dtype=torch.bool)
    return bool((weight[:, None] < weight[None]).all(2)[others].any())


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_head_begins_without_a_favorite(classes):
    plain, ours = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        plain.append(beaten_by_every_feature(PointwiseConv3d(8, classes)))
        torch.manual_seed(seed)
        head = Head(8, classes)
        ours.append(beaten_by_every_feature(head))
        torch.testing.assert_close(head.weight.sum(1), torch.zeros_like(head.weight.sum(1)))
        assert not head.bias.any()
    assert any(plain)
    assert not any(ours)


def test_trilinear_decoder_aligns_corners():
    up = Decoder(2, 2, "trilinear", 0.0).ups[0][0]
    x = torch.randn(1, 32, 2, 2, 2)
    expected = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
    torch.testing.assert_close(up(x), expected)


def test_dropout_acts_in_training_only():
    network, images = VNet(1, 2, filters=2, dropout=0.5), torch.randn(2, 1, 16, 16, 16)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_dropout_is_at_the_bottleneck_and_before_the_last_convolution():
    network = VNet(1, 2, filters=2, dropout=0.99)
    seen = {}
    network.encoder.register_forward_hook(lambda _, args, out: seen.update(deepest=out[-1]))
    network.decoders[0].head.register_forward_hook(lambda _, args, out: seen.update(last=args[0]))
    network(torch.randn(2, 1, 32, 32, 32))
    for features in seen.values():
        dropped = ~features.flatten(2).any(-1)  # whole maps
        assert dropped.float().mean() > 0.5


def test_no_dropout_without_a_share():
    network, images = VNet(1, 2, filters=2, dropout=0.0), torch.randn(2, 1, 16, 16, 16)
    assert torch.equal(network(images), network(images))


# Padding


@pytest.mark.parametrize("size", [(16, 32, 48), (6, 17, 31), (1, 15, 100)])
def test_padding_is_undone(size):
    images = torch.randn(1, 2, *size)
    padded = pad_to_stride(images)
    assert all(n % 16 == 0 and n - old < 16 for n, old in zip(padded.shape[2:], size, strict=True))
    assert torch.equal(unpad(padded, images), images)


def test_padding_repeats_the_border_on_both_sides():
    images = torch.arange(6.0).view(1, 1, 1, 1, 6)
    line = pad_to_stride(images)[0, 0, 0, 0].tolist()
    assert line == [0.0] * 5 + [0, 1, 2, 3, 4, 5] + [5.0] * 5
    assert pads_to_stride((16, 15, 6)) == [5, 5, 0, 1, 0, 0]


def test_padded_slices_are_predicted_as_if_the_border_went_on():
    network = VNet(1, 2, filters=2).eval()
    images = torch.randn(1, 1, 16, 16, 6)
    longer = F.pad(images, (5, 5, 0, 0, 0, 0), mode="replicate")
    torch.testing.assert_close(network(images), network(longer)[..., 5:11])


@pytest.mark.parametrize(
    ("size", "dtype"), [((2, 3, 2), torch.float32), ((3, 4, 4), torch.bfloat16)]
)
def test_tiny_maps_are_computed_in_float32(size, dtype):
    """There oneDNN's bfloat16 weight gradient reads memory that nothing was written to."""
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv3d(4, 4, 3, padding=1)(torch.randn(2, 4, *size)).dtype == dtype


def test_the_gradient_of_tiny_maps_repeats():
    torch.manual_seed(0)
    convolution, x = Conv3d(32, 32, 3, padding=1), torch.randn(2, 32, 2, 3, 2)
    gradients = []
    for _ in range(10):
        del_me = [torch.full((size,), float("nan")) for size in (10_000, 100_000)]
        del del_me  # freed memory that holds NaN
        with torch.autocast("cpu", torch.bfloat16):
            value = convolution(x).square().sum()
        gradients.append(torch.autograd.grad(value, convolution.weight)[0])
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


@pytest.mark.parametrize("decoders", [1, 2, 3])
def test_predict_runs_only_the_decoders_that_it_averages(decoders):
    network = MultiDecoderVNet(1, 3, ("transposed", "trilinear", "nearest"), filters=2).eval()
    images = torch.randn(2, 1, 16, 17, 6)
    with torch.no_grad():
        expected = torch.stack([z.softmax(1) for z in network(images)[:decoders]]).mean(0)
        for decoder in network.decoders[decoders:]:
            decoder.head.weight.fill_(torch.nan)
        torch.testing.assert_close(network.predict(images, decoders), expected)
