"""Contrast of voxels by class, with banks of negatives.

    L = mean_k mean_a -log softmax_0(cos(a, n_i) / T),   n_0 = m_k,   n_1 .. n_M from the bank of class k

a are the student's embeddings of some voxels of class k, m_k is the teacher's mean embedding of all of
them, and the bank of class k holds teacher's embeddings of voxels of other classes (ReCo, Liu et al., ICLR
2022; U2PL, Wang et al., CVPR 2022; drawn with less variance by ARCO, You et al., NeurIPS 2023).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vclipseg.losses import IGNORE, info_nce
from vclipseg.networks.fusion import pick, places
from vclipseg.networks.queues import Queue
from vclipseg.sampling import Sampler, draw
from vclipseg.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ContrastSettings(Settings):
    """How voxels are contrasted."""

    sampler: Sampler = "sag"
    """How anchors and negatives are drawn: uniformly, stratified, or stratified and antithetic."""
    negatives: Literal["intended", "as_released"] = "intended"
    """What fills the banks: voxels of other classes or, by a slip of the authors' code, nothing."""
    embedding: Count = 16
    """Numbers that a voxel is embedded in."""
    anchors: Count = 256
    """Anchors of each class in a step."""
    negatives_per_anchor: Count = 512
    """Drawn from the bank of the anchor's class."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """T of the contrast."""
    anchor_probability: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """An anchor's class has more than this probability for the teacher."""
    negative_probability: Annotated[float, Field(gt=0, le=1)] = 0.97
    """A voxel goes into the bank of a class that has less than this probability for the teacher."""
    banks: tuple[Count, Count] = (50_000, 30_000)
    """Embeddings held for the background, and for each other class."""
    bank_intake: Count = 4_000
    """Embeddings that each bank takes in a step."""


class VoxelContrast(nn.Module):
    """The loss and the banks that it reads.

    Embeddings are (B, E, X, Y, Z), the teacher's probs (B, K, X, Y, Z), labels (B, X, Y, Z) with `IGNORE`
    where a voxel takes no part.
    """

    def __init__(self, settings: ContrastSettings, num_classes: int) -> None:
        super().__init__()
        self.settings = s = settings
        sizes = (s.banks[min(k, 1)] for k in range(num_classes))
        self.banks = nn.ModuleList(Queue(size, (s.embedding,), held=1) for size in sizes)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        probs: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, int]:
        """Mean over the classes that are there, 0 if fewer than two are; and how many are."""
        s = self.settings
        losses, nothing = [], student[0, 0, 0, 0, 0].float() * 0
        for k, bank in enumerate(self.all_banks()):
            members = labels == k
            if not members.any():
                continue
            candidates = places(members & (probs[:, k] > s.anchor_probability))
            if not len(candidates):
                losses.append(nothing)
                continue
            chosen = draw(s.sampler, len(candidates), s.anchors, generator).to(labels.device)
            anchors = pick(student, candidates[chosen])
            positive = pick(teacher, places(members)).mean(0)
            losses.append(
                info_nce(anchors, positive, self.negatives_from(bank, generator), s.temperature)
            )
        return torch.stack(losses).mean() if len(losses) > 1 else nothing, len(losses)

    def negatives_from(self, bank: Queue, generator: torch.Generator | None) -> Tensor:
        """(anchors, negatives of each, E)."""
        s, held = self.settings, bank.held
        chosen = draw(s.sampler, len(held), s.anchors * s.negatives_per_anchor, generator)
        return held[chosen.to(held.device)].view(s.anchors, s.negatives_per_anchor, -1)

    def intake(
        self, teacher: Tensor, probs: Tensor, labels: Tensor, generator: torch.Generator | None
    ) -> list[tuple[Queue, Tensor]]:
        """What to push into which bank: some voxels that are not of its class, drawn uniformly."""
        s, taken = self.settings, []
        if s.negatives == "as_released":
            return []
        for k, bank in enumerate(self.all_banks()):
            others = (labels != IGNORE) & (labels != k) & (probs[:, k] < s.negative_probability)
            found = places(others)
            if len(found):
                chosen = draw("uniform", len(found), s.bank_intake, generator).to(labels.device)
                taken.append((bank, pick(teacher, found[chosen])))
        return taken

    def all_banks(self) -> list[Queue]:
        """One a class."""
        return [bank for bank in self.banks if isinstance(bank, Queue)]
