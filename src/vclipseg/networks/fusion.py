"""Voxel embeddings made of all levels of a decoder, as ARCO has them (You et al., NeurIPS 2023).

The decoder's five maps f_0 .. f_4 (the sums of upsampled map and skip at 1/8, 1/4, 1/2 and 1 of the grid,
and the last map) are fused by 1x1x1 convolutions without bias,

    h_0 = W_0 f_0 + f_0,   h_i = W_i [up(h_i-1), f_i] + [up(h_i-1), f_i]  (i = 1, 2, 3)
    h   = W_4 [h_3, f_4]

All of it is linear, and upsampling commutes with what mixes channels alone. So the same h is

    h = A_4 f_4 + A_3 f_3 + up(A_2 f_2 + up(A_1 f_1 + up(A_0 f_0)))

with matrices A_i that are products of the W_i: no wide map is ever made at full resolution. Linear layers
after the fusion are worked into the A_i as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vclipseg.networks.vnet import Decoder, MultiDecoderVNet, pad_to_stride, unpad


class LevelsVNetOutput(NamedTuple):
    """What `LevelsVNet` gives."""

    logits: Tensor  # (B, K, X, Y, Z)
    levels: list[Tensor]  # f_0 .. f_4, each axis of the padded image or 1/8, 1/4, 1/2 of it


class LevelsVNet(MultiDecoderVNet):
    """The plain V-Net that also gives its decoder's levels; its weights are those of `VNet`."""

    def __init__(
        self, in_channels: int, num_classes: int, filters: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__(in_channels, num_classes, ("transposed",), filters, dropout)

    def forward(self, images: Tensor) -> LevelsVNetOutput:  # type: ignore[override]
        """(B, C, X, Y, Z) of any size -> logits and levels."""
        decoder = self.decoders[0]
        assert isinstance(decoder, Decoder)
        levels = decoder_levels(decoder, self.encoder(pad_to_stride(images)))
        logits = decoder.head(decoder.dropout(levels[-1]))
        return LevelsVNetOutput(unpad(logits, images).float(), levels)


def decoder_levels(decoder: Decoder, features: Sequence[Tensor]) -> list[Tensor]:
    """The encoder's five maps, the finest first -> f_0 .. f_4 of the decoder, the coarsest first."""
    levels, x = [], features[-1]
    for up, block, skip in zip(decoder.ups, decoder.blocks, reversed(features[:-1]), strict=True):
        levels.append(up(x) + skip)
        x = block(levels[-1])
    return [*levels, x]


class Fusion(nn.Module):
    """Levels of a decoder to one embedding a voxel.

    Args:
        filters: channels of the finest level; the coarsest has 8 times as many.
        embedding: E, channels of the result.
        further: linear layers that a student adds, and its teacher does not.
    """

    def __init__(self, filters: int, embedding: int, further: int = 0) -> None:
        super().__init__()
        self.widths = [filters * factor for factor in (8, 4, 2, 1, 1)]
        totals = [sum(self.widths[: i + 1]) for i in range(5)]
        self.mixes = nn.ModuleList(nn.Linear(n, n, bias=False) for n in totals[:-1])  # W_0 .. W_3
        self.last = nn.Linear(totals[-1], embedding, bias=False)  # W_4
        self.further = nn.ModuleList(
            nn.Linear(embedding, embedding, bias=False) for _ in range(further)
        )

    def forward(self, levels: Sequence[Tensor], further: bool = False) -> Tensor:
        """f_0 .. f_4 -> (B, E, X, Y, Z), through the further layers if asked."""
        h, *rest = (mix(f, a) for f, a in zip(levels, self.matrices(further), strict=True))
        for term in rest:
            if h.shape != term.shape:
                h = F.interpolate(h, term.shape[2:], mode="trilinear", align_corners=True)
            h = h + term
        return h

    def matrices(self, further: bool = False) -> list[Tensor]:
        """A_0 .. A_4, each (E, F) for the F channels of its level."""
        matrix, found = self.last.weight, []
        with torch.autocast(matrix.device.type, enabled=False):
            for layer in self.further if further else ():
                matrix = layer(matrix.T).T
            for width, layer in zip(self.widths[:0:-1], reversed(self.mixes), strict=True):
                matrix, own = matrix.split([matrix.shape[1] - width, width], 1)
                found.append(own)
                matrix = matrix @ layer.weight + matrix
        return [matrix, *reversed(found)]


def mix(x: Tensor, matrix: Tensor) -> Tensor:
    """Channels (B, F, x, y, z) -> (B, E, x, y, z) by a matrix (E, F)."""
    return F.linear(x.movedim(1, -1), matrix).movedim(-1, 1)


def places(mask: Tensor) -> Tensor:
    """Where a mask (B, X, Y, Z) is true: (N,) voxels, counted in scan order."""
    return mask.flatten().nonzero()[:, 0]


def pick(maps: Tensor, voxels: Tensor) -> Tensor:
    """Vectors (N, E), float32, of a map (B, E, X, Y, Z) at N voxels, counted as `places` does."""
    return maps.movedim(1, -1).flatten(0, -2).index_select(0, voxels).float()
