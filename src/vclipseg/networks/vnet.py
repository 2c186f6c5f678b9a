"""V-Net as the semi-supervised literature runs it (Milletari et al., 3DV 2016; arXiv 1606.04797).

Five encoder stages of 1, 2, 3, 3, 3 convolutions, skips that are added (not concatenated), batch
normalization, no residuals. A decoder is known by how it upsamples; several may share an encoder.

Shapes: images (B, C, X, Y, Z), features (B, F, x, y, z), logits (B, K, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vclipseg.networks import wide
from vclipseg.networks.batchnorm import BatchNorm3d, statistics_left_alone

Upsampling = Literal[
    "transposed", "trilinear", "nearest", "pointwise_trilinear", "pointwise_nearest"
]

STRIDE = 16  # of the deepest stage; every axis is padded to a multiple of it


class Conv3d(nn.Conv3d):
    """A 3x3x3 convolution, quick for narrow maps, that computes tiny ones on the CPU in float32.

    There oneDNN's bfloat16 weight gradient reads memory that it never wrote where the first axis has
    two voxels (torch 2.13): the result is NaN or, worse, plausible. Those maps cost nothing anyway.
    """

    NARROW = 128
    """Product of input and output channels up to which pairs of voxels are quicker."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, x, y, z) -> (B, G, x, y, z)."""
        if x.device.type == "cpu" and min(x.shape[2:]) < 3:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        is_narrow = self.in_channels * self.out_channels <= self.NARROW
        in_pairs = x.shape[4] % 2 == 0 and x.shape[4] >= 6  # neither may their map be tiny
        if is_narrow and in_pairs and wide.is_quicker(x):
            assert self.bias is not None
            return wide.conv3x3x3(x, self.weight, self.bias)
        return super().forward(x)


class PointwiseConv3d(nn.Conv3d):
    """A 1x1x1 convolution as the matrix product it is.

    torch has no quick kernel for it on the CPU, and its gradient comes in another memory layout, in
    which all that follows is slow.
    """

    WIDTH = 128
    """Channels of the voxels that are multiplied as one."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, x, y, z) -> (B, G, x, y, z)."""
        weight, bias = self.weight.flatten(1), self.bias
        assert bias is not None
        times = max(self.WIDTH // self.in_channels, 1) if wide.is_quicker(x) else 1
        times = gcd(times, x.shape[4])
        if times > 1:
            return wide.product(x, weight, bias, times)
        return F.linear(x.permute(0, 2, 3, 4, 1), weight, bias).permute(0, 4, 1, 2, 3)


class Head(PointwiseConv3d):
    """The last convolution, features to logits, that begins without a favorite.

    What it reads is never negative. Were all weights of a class below another's, its probability could
    not rise above what the biases allow; with 8 features chance alone makes one head in 128 so. Here
    each class's weights sum to 0, and the biases are 0.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(features, num_classes)
        assert self.bias is not None
        with torch.no_grad():
            self.weight -= self.weight.mean(1, keepdim=True)
            self.bias.zero_()


class ConvTranspose3d(nn.ConvTranspose3d):
    """A transposed 2x2x2 convolution with a stride of 2, quick on the CPU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, F, x, y, z) -> (B, G, 2x, 2y, 2z)."""
        if wide.is_quicker(x):
            assert self.bias is not None
            return wide.double(x, self.weight, self.bias)
        return super().forward(x)


class ConvBlock(nn.Sequential):
    """`depth` times 3x3x3 convolution, batch normalization, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        layers: list[nn.Module] = []
        for i in range(depth):
            channels = in_channels if i == 0 else out_channels
            layers += [Conv3d(channels, out_channels, 3, padding=1), *norm_relu(out_channels)]
        super().__init__(*layers)


def norm_relu(channels: int) -> list[nn.Module]:
    """Batch normalization and ReLU, the tail of every layer here.

    Not in place: a CPU writes slower where it has just read, and what ReLU reads is kept by nobody.
    """
    return [BatchNorm3d(channels), nn.ReLU()]


def downsample(channels: int) -> nn.Sequential:
    """Halve the grid, double the channels."""
    return nn.Sequential(nn.Conv3d(channels, 2 * channels, 2, stride=2), *norm_relu(2 * channels))


def upsample(channels: int, how: Upsampling) -> nn.Sequential:
    """Double the grid, halve the channels; "pointwise" ones mix channels before they enlarge."""
    half = channels // 2
    if how == "transposed":
        return nn.Sequential(ConvTranspose3d(channels, half), *norm_relu(half))
    mode = how.removeprefix("pointwise_")
    enlarge = nn.Upsample(
        scale_factor=2, mode=mode, align_corners=True if mode == "trilinear" else None
    )
    if how.startswith("pointwise"):
        return nn.Sequential(PointwiseConv3d(channels, half), enlarge, *norm_relu(half))
    return nn.Sequential(enlarge, Conv3d(channels, half, 3, padding=1), *norm_relu(half))


class Staged(nn.Module):
    """A network in stages, of which each may be computed again in backward instead of being stored.

    It follows its statistics the first time only.
    """

    recompute = False
    draws = False
    """Whether a stage draws random numbers, which then have to be the same again."""

    def stage(self, compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`compute(*inputs)`."""
        if not (self.recompute and torch.is_grad_enabled()):
            return compute(*inputs)
        return checkpoint(
            compute,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=self.draws,
            context_fn=lambda: (nullcontext(), statistics_left_alone()),
        )


def recompute(model: nn.Module, wanted: bool = True) -> None:
    """Let every V-Net in a model compute its stages again in backward, or store them."""
    for module in model.modules():
        if isinstance(module, Staged):
            module.recompute = wanted


class Encoder(Staged):
    """Images to features at 1, 1/2, 1/4, 1/8 and 1/16 of the grid."""

    def __init__(self, in_channels: int, filters: int, dropout: float) -> None:
        super().__init__()
        widths = [filters * 2**i for i in range(5)]
        self.blocks = nn.ModuleList(
            ConvBlock(in_channels if i == 0 else width, width, depth)
            for i, (width, depth) in enumerate(zip(widths, (1, 2, 3, 3, 3), strict=True))
        )
        self.downs = nn.ModuleList(downsample(width) for width in widths[:-1])
        self.dropout = nn.Dropout3d(dropout)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> five maps, the finest first; each axis a multiple of 16."""
        features = [self.stage(self.blocks[0], images)]
        for down, block in zip(self.downs, self.blocks[1:], strict=True):
            features.append(self.stage(lower, down, block, features[-1]))
        features[-1] = self.dropout(features[-1])
        return features


def lower(down: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """A level of the encoder: (B, F, x, y, z) -> (B, 2F, x/2, y/2, z/2)."""
    return block(down(x))


class Decoder(Staged):
    """The encoder's five maps to logits."""

    def __init__(
        self, num_classes: int, filters: int, upsampling: Upsampling, dropout: float
    ) -> None:
        super().__init__()
        widths = [filters * 2**i for i in (3, 2, 1, 0)]
        self.ups = nn.ModuleList(upsample(2 * width, upsampling) for width in widths)
        self.blocks = nn.ModuleList(
            ConvBlock(width, width, depth)
            for width, depth in zip(widths, (3, 3, 2, 1), strict=True)
        )
        self.dropout = nn.Dropout3d(dropout)
        self.head = Head(filters, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Five maps, the finest first -> (B, K, X, Y, Z)."""
        return self.with_maps(features)[1]

    def with_maps(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The decoder's own maps, and the logits."""
        maps = self.maps(features)
        return maps, self.head(self.dropout(maps[-1]))

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The encoder's five maps -> the decoder's four, the coarsest first, (B, F, X, Y, Z) last."""
        maps, x = [], features[-1]
        for up, block, skip in zip(self.ups, self.blocks, reversed(features[:-1]), strict=True):
            x = self.stage(higher, up, block, x, skip)
            maps.append(x)
        return maps


def higher(up: nn.Module, block: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """A level of the decoder: (B, 2F, x, y, z) and what the encoder saw -> (B, F, 2x, 2y, 2z)."""
    return block(up(x) + skip)


class MultiDecoderVNet(nn.Module):
    """One encoder and a decoder for each of `upsamplings`."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        upsamplings: Sequence[Upsampling],
        filters: int = 16,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, filters, dropout)
        self.decoders = nn.ModuleList(
            Decoder(num_classes, filters, upsampling, dropout) for upsampling in upsamplings
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) of any size -> a (B, K, X, Y, Z) of logits a decoder."""
        features = self.encoder(pad_to_stride(images))
        return [unpad(decoder(features), images).float() for decoder in self.decoders]

    def predict(self, images: Tensor, decoders: int) -> Tensor:
        """Mean probabilities (B, K, X, Y, Z) of the first `decoders` decoders; no other is run."""
        features = self.encoder(pad_to_stride(images))
        probs = [unpad(d(features), images).float().softmax(1) for d in self.decoders[:decoders]]
        return torch.stack(probs).mean(0) if decoders > 1 else probs[0]


class VNet(MultiDecoderVNet):
    """The plain V-Net: one decoder, transposed convolutions."""

    def __init__(
        self, in_channels: int, num_classes: int, filters: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__(in_channels, num_classes, ("transposed",), filters, dropout)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, X, Y, Z) of any size -> logits (B, K, X, Y, Z)."""
        return super().forward(images)[0]


def pads_to_stride(sizes: Sequence[int]) -> list[int]:
    """What `torch.nn.functional.pad` is told to make each axis (X, Y, Z) a multiple of 16."""
    missing = [-size % STRIDE for size in reversed(sizes)]
    return [side for m in missing for side in (m // 2, m - m // 2)]


def pad_to_stride(images: Tensor) -> Tensor:
    """Repeat the border of (B, C, X, Y, Z) until each axis is a multiple of 16."""
    pads = pads_to_stride(images.shape[2:])
    return F.pad(images, pads, mode="replicate") if any(pads) else images


def unpad(padded: Tensor, images: Tensor) -> Tensor:
    """Cut what `pad_to_stride` added to `images` off again."""
    for axis in (2, 3, 4):
        size = images.shape[axis]
        if padded.shape[axis] != size:
            padded = padded.narrow(axis, (padded.shape[axis] - size) // 2, size)
    return padded
