"""VCLIPSeg-X: VCLIPSeg on deformed patches, labeled by a teacher that sees them as they lie.

    x' = x o d,  y' = y o d,  P = (sum_i w_i teacher_i(x)) o d      d: a smooth random deformation
    L = sum_i [w_s L_dice(p_i, y') + w_ce CE(p_i, y')]              supervised, every network
      + w_d * sum_ij [L_dice(p_ij, y') + CE(p_ij, y')]              deep supervision
      + w_u(t) * sum_i [CE(p_i, P) + L_dice(p_i, P)]                dynamic labeling (DLB)
      + w_r * mean_k [-log softmax_k(cos(v_k, t - mean t) / tau)]   vision-text consistency (VTCM)

p_i is what network i makes of x', p_ij its output at a coarser scale j. Four labeled scans show the
anatomy of four people; deformed, they show more. A network that says of a deformed scan what the
teachers say of the plain one learns from shapes that nobody labeled. And two networks that share nothing but
what they label together are meant to err less alike than two decoders on one encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.losses import add, cross_entropy, dice_loss
from vclipseg.methods.base import Loss, Term
from vclipseg.methods.vclipseg import ROBUST, SGD, VCLIPSeg, VCLIPSegSettings
from vclipseg.networks.vnet_text import TextVNet, TextVNetOutput, TextVNets
from vclipseg.ranks import across
from vclipseg.warping import Warp, random_warp


class VCLIPSegXSettings(VCLIPSegSettings):
    """Settings of VCLIPSeg-X: those of VCLIPSeg, and a switch for each of what is new."""

    name: Literal["vclipseg_x"] = "vclipseg_x"  # type: ignore[assignment]
    deformation: Annotated[float, Field(ge=0, le=0.2)] = 0.0
    """Largest displacement in a deformed patch, as a share of its side; 0: none."""
    deformed_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the patches that are deformed; resampled once more, they are less sharp than the others."""
    networks: Annotated[int, Field(ge=1, le=8)] = 1
    """Networks that share nothing but the data and what they label together, of one decoder each; 1: one
    network of two decoders."""
    deep_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight w_d of the coarser outputs, beside `supervised_weight`; 0: there are none."""
    least_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the pseudo-labels of each class that count in any case, the surest, however far below
    `threshold`: a small class is rarely sure of itself."""
    contrast_temperature: Annotated[float, Field(ge=0)] = 0.0
    """tau: prototypes tell the centered text vectors apart; 0: each is drawn to its own, as published."""


UNUSED = ("projections", "coarse")  # in prediction


@dataclass(frozen=True, kw_only=True)
class Deformed(Batch):
    """A batch of deformed patches that knows where they came from."""

    natural: Batch
    warp: Warp


class VCLIPSegX(VCLIPSeg):
    """VCLIPSeg whose network sees deformed patches."""

    Settings = VCLIPSegXSettings  # type: ignore[assignment]
    settings: VCLIPSegXSettings

    @property
    def training_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The teacher, projections and coarser outputs."""
        several = (f"members.{i}." for i in range(self.settings.networks))
        parts = (f"network.{of}{part}." for of in ("", *several) for part in UNUSED)
        return ("teacher.", *parts)

    def make_network(self, in_channels: int, text: Tensor) -> TextVNet | TextVNets:
        """With coarser outputs, or several."""
        s = self.settings
        sizes = (in_channels, text, s.filters, s.dropout)
        network = partial(TextVNet, *sizes, prompts=s.prompts, coarse=s.deep_weight > 0)
        heads = s.heads if s.alignment else 0
        if s.networks == 1:
            return network(projections=heads)
        single = partial(network, upsamplings=("transposed",), projections=min(heads, 1))
        return TextVNets([single() for _ in range(s.networks)])

    def loss(self, batch: Batch, step: int) -> Loss:
        """The terms of VCLIPSeg on deformed patches."""
        return super().loss(self.deform(batch), step)

    def deform(self, batch: Batch) -> Batch:
        """Each patch with its own deformation."""
        s, images = self.settings, batch.images
        if not s.deformation:
            return batch
        shape, drawn = images.shape[2:], (batch.generator, images.device)
        warp = random_warp(len(images), shape, s.deformation, *drawn, s.deformed_share)
        seen = {"images": warp(images), "labels": warp.rows(0, batch.num_labeled)(batch.labels)}
        return Deformed(**(vars(batch) | seen), natural=batch, warp=warp)

    def teach(self, batch: Batch, first: int = 0) -> list[Tensor]:
        """What the teacher says of the plain patches, deformed like these."""
        if not isinstance(batch, Deformed):
            return super().teach(batch, first)
        warp = batch.warp.rows(first, len(batch.images))
        return [warp(p) for p in super().teach(batch.natural, first)]

    def sure(self, confidence: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        """Those above the threshold, which is lowered for a class in tenths until enough of it count."""
        s = self.settings
        if not s.least_share:
            return super().sure(confidence, labels, taught)
        tenths = torch.arange(11, device=labels.device)
        tried = s.threshold * tenths / 10  # from none up to all of it
        highest = torch.bucketize(confidence, tried, right=True) - 1  # that each voxel reaches
        bins = (labels * len(tried) + highest).flatten()
        counts = confidence.new_zeros(len(self.text) * len(tried))
        counts = across(counts.scatter_add(0, bins, taught.float().flatten()))
        reached = counts.view(-1, len(tried)).flip(1).cumsum(1).flip(1)  # (K, 11)
        enough = reached >= s.least_share * reached[:, :1]
        return confidence >= tried[enough.sum(1) - 1][labels]

    def supervise(self, out: TextVNetOutput, known: Tensor) -> dict[str, Term]:
        """And the coarser outputs."""
        s = self.settings
        terms = super().supervise(out, known)
        if s.deep_weight:
            misses = [
                dice_loss(z.softmax(1), known, s.dice) + cross_entropy(z, known) for z in out.coarse
            ]
            terms["deep"] = Term(s.deep_weight, add(misses))
        return terms

    def gaps(self, prototypes: Tensor) -> Tensor:
        """How far each prototype (K, E) is from its text vector, by the others if they contrast, (K,)."""
        tau = self.settings.contrast_temperature
        if not tau:
            return super().gaps(prototypes)
        text = F.normalize(self.text - self.text.mean(0), dim=1)
        likeness = F.normalize(prototypes, dim=1) @ text.T / tau
        return F.cross_entropy(
            likeness, torch.arange(len(text), device=text.device), reduction="none"
        )


X: dict[str, Any] = {
    "networks": 2,
    "deformation": 0.08,
    "deformed_share": 0.5,
    "threshold": 0.9,
    "least_share": 0.7,
}
TEACHER: dict[str, Any] = {
    "teacher_decay": 0.99,
    "dlb_apply_to": "unlabeled",
    "predict_with": "mean",
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {**ROBUST, **X}, "train": {}},
    "faithful": {"method": {**TEACHER, **X}, "train": SGD},
}
