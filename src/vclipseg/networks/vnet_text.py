"""The network of VCLIPSeg (Li et al., MICCAI 2024): a V-Net that reads text vectors of its classes.

`VoxelPrompts` is the paper's VWPM; `Projection` maps features into the space of the text vectors for
its VTCM and is needed in training only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vclipseg.networks.batchnorm import JointBatchNorm3d
from vclipseg.networks.vnet import (
    Conv3d,
    Decoder,
    Encoder,
    Head,
    PointwiseConv3d,
    Upsampling,
    pad_to_stride,
    unpad,
)


class VoxelPrompts(nn.Module):
    """Voxel-Wise Prompts Module: each voxel is told a mixture of the classes' text vectors.

        v_s = softmax(controller(f)),  prompt = sum_c v_s^c * W t^c,  f_p = conv(cat(f, prompt))

    (eqs. 1 to 3 of the paper). `text` (K, E) is a constant and part of the state.
    """

    text: Tensor

    def __init__(self, channels: int, text: Tensor) -> None:
        super().__init__()
        num_classes, embedding = text.shape
        self.register_buffer("text", text.clone())
        self.project_text = nn.Linear(embedding, channels)
        hidden, gate = max(channels // 4, 1), max(channels // 16, 1)
        self.controller = nn.Sequential(
            Conv3d(channels, hidden, 3, padding=1),
            JointBatchNorm3d(hidden),
            nn.LeakyReLU(inplace=True),
            PointwiseConv3d(hidden, gate),
            nn.GELU(),
            PointwiseConv3d(gate, num_classes),
        )
        self.fuse = nn.Sequential(
            Conv3d(2 * channels, channels, 3, padding=1),
            JointBatchNorm3d(channels),
            nn.LeakyReLU(inplace=True),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, x, y, z) -> the same shape, with the prompts worked in."""
        semantics = self.controller(features).float().softmax(1)  # (B, K, x, y, z)
        vectors = self.project_text(self.text)  # (K, F)
        prompts = torch.einsum("bkxyz,kf->bfxyz", semantics, vectors.float())
        return self.fuse(torch.cat([features, prompts.to(features.dtype)], dim=1))


class Projection(nn.Sequential):
    """Features (B, F, x, y, z) to the space of the text vectors, (B, E, x, y, z)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__(
            PointwiseConv3d(channels, channels),
            nn.ReLU(inplace=True),
            PointwiseConv3d(channels, embedding),
        )


class TextVNetOutput(NamedTuple):
    """What a training step reads."""

    logits: list[Tensor]  # (B, K, X, Y, Z) a decoder
    fused: Tensor  # (B, F, x, y, z), the paper's f_p at 1/16 of the padded grid
    coarse: list[Tensor]  # logits like `logits`, from the maps at a quarter and at half of the grid


class TextVNet(nn.Module):
    """One encoder, the prompts, and a decoder for each of `upsamplings`, all reading the same f_p."""

    def __init__(
        self,
        in_channels: int,
        text: Tensor,
        filters: int = 16,
        dropout: float = 0.5,
        upsamplings: Sequence[Upsampling] = ("transposed", "trilinear"),
        prompts: bool = True,
        projections: int = 2,
        coarse: bool = False,
    ) -> None:
        super().__init__()
        num_classes, embedding = text.shape
        channels = 16 * filters
        self.encoder = Encoder(in_channels, filters, dropout)
        self.prompts = VoxelPrompts(channels, text) if prompts else nn.Identity()
        self.decoders = nn.ModuleList(
            Decoder(num_classes, filters, upsampling, dropout) for upsampling in upsamplings
        )
        self.projections = nn.ModuleList(
            Projection(channels, embedding) for _ in range(projections)
        )
        self.coarse = nn.ModuleList(
            Head(n * filters, num_classes) for _ in (upsamplings if coarse else ()) for n in (4, 2)
        )

    def forward(self, images: Tensor) -> TextVNetOutput:
        """(B, C, X, Y, Z) of any size -> logits of every decoder and f_p."""
        features = self.encode(images)
        if self.coarse:
            decoders = cast("list[Decoder]", self.decoders)
            maps, logits = zip(*(d.with_maps(features) for d in decoders), strict=True)
        else:
            maps, logits = (), tuple(decoder(features) for decoder in self.decoders)
        found = [x for of_decoder in maps for x in of_decoder[1:3]]
        size = logits[0].shape[2:]
        coarse = [
            F.interpolate(head(x).float(), size, mode="trilinear")
            for head, x in zip(self.coarse, found, strict=True)
        ]
        return TextVNetOutput(
            [unpad(z, images).float() for z in logits],
            features[-1],
            [unpad(z, images) for z in coarse],
        )

    def embed(self, out: TextVNetOutput) -> list[Tensor]:
        """f_p in the space of the text vectors, (B, E, x, y, z) a projection head."""
        return [project(out.fused) for project in self.projections]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Five maps, the finest first, the last with the prompts worked in."""
        features = self.encoder(pad_to_stride(images))
        features[-1] = self.prompts(features[-1])
        return features

    def predict(self, images: Tensor, decoders: int | None = None) -> Tensor:
        """Mean probabilities (B, K, X, Y, Z) of the first `decoders`, or of all; no other is run."""
        features = self.encode(images)
        probs = [unpad(d(features), images).float().softmax(1) for d in self.decoders[:decoders]]
        return torch.stack(probs).mean(0)


class TextVNets(nn.Module):
    """Several networks of one decoder each, where `TextVNet` has one encoder and two decoders.

    They see nothing of each other, and err apart. Two that upsample by transposed convolutions multiply less
    than one encoder with such a decoder and one that interpolates.
    """

    def __init__(self, members: Sequence[TextVNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> TextVNetOutput:
        """(B, C, X, Y, Z) of any size -> logits of all; their f_p one after the other, (B, nF, x, y, z)."""
        outs: list[TextVNetOutput] = [member(images) for member in self.members]
        return TextVNetOutput(
            [z for out in outs for z in out.logits],
            torch.cat([out.fused for out in outs], 1),
            [z for out in outs for z in out.coarse],
        )

    def embed(self, out: TextVNetOutput) -> list[Tensor]:
        """Each one's f_p in the space of the text vectors, (B, E, x, y, z)."""
        members = cast("list[TextVNet]", self.members)
        parts = zip(members, out.fused.chunk(len(members), 1), strict=True)
        return [project(fused) for member, fused in parts for project in member.projections]

    def predict(self, images: Tensor, decoders: int | None = None) -> Tensor:
        """Mean probabilities (B, K, X, Y, Z) of the first `decoders`, or of all; no other is run."""
        members = cast("list[TextVNet]", self.members[:decoders])
        return torch.stack([member.predict(images) for member in members]).mean(0)
