"""CAML (Gao et al., MICCAI 2023; https://arxiv.org/abs/2307.06312).

    L = w_s * sum_i L_dice(p_i, y)                supervised, main branch v and auxiliary branch a
      + w_c(t) * sum_{i != j} ||p_i - s(p_j)||^2  consistency, s sharpens
      - w_o(t) * mean_n sum_m C_a log C_v         omni-correlation consistency (OCC)

p_i is the output of branch i, a V-Net of its own. The auxiliary one lets the patches of a batch attend
to each other (CMA, in the network). C_i[n, m] = softmax_m(q_i[n] . M[m] / T) relates unlabeled voxel n,
embedded by branch i as q_i[n], to a memory M of labeled voxels that both branches got right.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import permutations
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vclipseg.data.batch import Batch
from vclipseg.losses import (
    IGNORE,
    DiceForm,
    add,
    cross_entropy,
    dice_loss,
    most_likely,
    sharpen,
    sigmoid_rampup,
)
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.attention import CrossSampleAttention
from vclipseg.networks.vnet import MultiDecoderVNet, VNet, pad_to_stride, unpad


class CAMLSettings(MethodSettings):
    """Settings of CAML; steps are those of a run of 15,000 and scale with the run's length."""

    name: Literal["caml"] = "caml"
    attention: bool = True
    """Cross-sample mutual attention (CMA) in the auxiliary branch."""
    supervised_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_s of the supervised Dice losses."""
    supervised_ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of cross-entropy beside the supervised Dice loss; the paper has none."""
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight w_c of the consistency of the branches once it is ramped up."""
    correlation_weight: Annotated[float, Field(ge=0)] = 0.05
    """Weight w_o of the omni-correlation consistency once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until both have their full weight: published are 6000, 3000, 2250 for 4, 8, 16 labeled cases."""
    dice: DiceForm = "linear"
    """Form of the Dice loss."""
    sharpening_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the sharpening s; the lower, the nearer to hard labels."""
    correlation_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the correlations."""
    embedding: Annotated[int, Field(ge=1)] = 32
    """Length of the vectors that are compared."""
    queries: Annotated[int, Field(ge=2)] = 12_800
    """Unlabeled voxels of each class that are compared, the surest ones."""
    samples: Annotated[int, Field(ge=1)] = 256
    """Vectors of each class that are drawn from the memory; a class that has fewer is left out."""
    memory_slots: Annotated[int, Field(ge=1)] = 16
    """Labeled cases in the memory; of more, those seen last."""
    memory_voxels: Annotated[int, Field(ge=1)] = 1_024
    """Voxels of each class and case in the memory, a random subset; at least `samples` is sensible."""
    heads_see: Literal["agreed", "selected"] = "agreed"
    """Voxels that go through the heads, and so are normalized together: all on which the branches agree,
    as in the authors' code, or only the `queries`."""


class CAML(Method):
    """A V-Net and an attentive V-Net that also agree on what resembles the labeled voxels."""

    Settings = CAMLSettings
    settings: CAMLSettings
    training_only: ClassVar[tuple[str, ...]] = (
        "auxiliary.",
        "projections.",
        "predictions.",
        "memory.",
    )

    def __init__(self, settings: CAMLSettings, task: Task) -> None:
        super().__init__(settings, task)
        s, channels, self.num_classes = settings, task.in_channels, task.num_classes
        self.network = VNet(channels, self.num_classes, s.filters, s.dropout)
        self.auxiliary = MultiDecoderVNet(
            channels, self.num_classes, ("trilinear",), s.filters, s.dropout
        )
        if s.attention:
            blocks = self.auxiliary.encoder.blocks
            blocks[3] = nn.Sequential(
                blocks[3], CrossSampleAttention(8 * s.filters, dropout=s.dropout)
            )
            self.auxiliary.encoder.draws = s.dropout > 0
        self.projections = nn.ModuleList(Head(s.filters, s.embedding) for _ in range(2))
        self.predictions = nn.ModuleList(Head(s.embedding, s.embedding) for _ in range(2))
        self.memory = VoxelMemory(s.memory_slots, self.num_classes, s.memory_voxels, s.embedding)

    def loss(self, batch: Batch, step: int) -> Loss:
        """The three terms; the memory takes in the labeled patches before it is read."""
        s = self.settings
        networks = (self.network, self.auxiliary)
        logits, maps = zip(*(embed(n, batch.images) for n in networks), strict=True)
        probs = [z.softmax(1) for z in logits]
        dices = [dice_loss(batch.split(p)[0], batch.labels, s.dice) for p in probs]
        loss = Loss(supervised=Term(s.supervised_weight, add(dices)))
        if s.supervised_ce_weight:
            ce = add(cross_entropy(batch.split(z)[0], batch.labels) for z in logits)
            loss["supervised_ce"] = Term(s.supervised_ce_weight, ce)
        ramp = sigmoid_rampup(step, s.rampup_steps * self.scale)
        pairs = permutations(probs, 2)
        gap = add(F.mse_loss(p, sharpen(q, s.sharpening_temperature)) for p, q in pairs)
        loss["consistency"] = Term(s.consistency_weight * ramp, gap)
        first, second = (most_likely(p) for p in probs)
        known, pseudo = batch.split(first.where(first == second, IGNORE))  # agreed on
        self.remember(batch, maps, known.where(known == batch.labels, IGNORE), step)
        confidence = batch.split(probs[0].detach().amax(1))[1]
        miss = self.miscorrelation([batch.split(m)[1] for m in maps], pseudo, confidence)
        loss["correlation"] = Term(s.correlation_weight * ramp, miss)
        if len(pseudo):
            loss.facts["agreement"] = (pseudo != IGNORE).float().mean()
        return loss

    @torch.no_grad()
    def remember(self, batch: Batch, maps: Sequence[Tensor], right: Tensor, step: int) -> None:
        """Give each labeled case's slot of the memory the voxels that both branches got right.

        Args:
            batch: whose cases they are; patches without a name are cases of their own.
            maps: of both branches, (B, F, X, Y, Z).
            right: labels (L, X, Y, Z) where both branches say the same, `IGNORE` elsewhere.
            step: for the memory to know which case it has not seen for longest.
        """
        names = batch.case_ids or tuple(map(str, range(len(right))))
        self.projections.eval()
        for row, name in enumerate(names[: len(right)]):
            slot = self.memory.open(zlib.crc32(name.encode()), step)
            for k in range(self.num_classes):
                voxels = (right[row].flatten() == k).nonzero()[:, 0]
                order = torch.randperm(len(voxels), device=voxels.device)
                drawn = voxels[order[: self.memory.voxels]]
                vectors = [
                    head(rows(m[row : row + 1])[drawn])
                    for head, m in zip(self.projections, maps, strict=True)
                ]
                self.memory.write(slot, k, torch.stack(vectors).mean(0), len(voxels))
        self.projections.train(self.training)

    def miscorrelation(self, maps: Sequence[Tensor], pseudo: Tensor, confidence: Tensor) -> Tensor:
        """-mean_n sum_m C_a log C_v; 0 where there is nothing to compare.

        Args:
            maps: of both branches, (U, F, X, Y, Z).
            pseudo: the class on which both agree, `IGNORE` elsewhere, (U, X, Y, Z).
            confidence: the main branch's probability of its class, (U, X, Y, Z).
        """
        s = self.settings
        memory = self.memory.sample(s.samples)  # (M, E)
        voxels, surest = choose_queries(pseudo, confidence, self.num_classes, s.queries)
        if not len(memory) or not len(voxels):
            return confidence.new_zeros(())
        if s.heads_see == "selected":
            voxels, surest = voxels[surest], torch.arange(len(surest), device=voxels.device)
        first, second = (
            predict(project(rows(m)[voxels]))[surest]
            for project, predict, m in zip(self.projections, self.predictions, maps, strict=True)
        )
        return correlation_loss(first, second, memory, s.correlation_temperature)

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z), of the main branch."""
        return self.network(images).softmax(1)


class Head(nn.Sequential):
    """Vectors (N, F) to (N, E), in float32."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__(
            nn.Linear(channels, embedding),
            nn.BatchNorm1d(embedding),
            nn.ReLU(inplace=True),
            nn.Linear(embedding, embedding),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class VoxelMemory(nn.Module):
    """Vectors of voxels of known class, a slot for each of the cases seen last.

    Of all voxels that a case offers, a slot keeps `voxels` of each class, and how many there were.
    """

    vectors: Tensor  # (slots, K * voxels, E)
    offered: Tensor  # (slots, K)
    cases: Tensor  # (slots,), -1 where none is
    opened: Tensor  # (slots,) the step of it, -1 where never

    def __init__(self, slots: int, num_classes: int, voxels: int, embedding: int) -> None:
        super().__init__()
        self.voxels = voxels
        self.register_buffer("vectors", torch.zeros(slots, num_classes * voxels, embedding))
        self.register_buffer("offered", torch.zeros(slots, num_classes, dtype=torch.int64))
        self.register_buffer("cases", torch.full((slots,), -1))
        self.register_buffer("opened", torch.full((slots,), -1))

    def open(self, case: int, step: int) -> Tensor:
        """The slot of a case: its own, else the one that was not opened for longest."""
        slot = self.opened.masked_fill(self.cases == case, -2).argmin()
        self.cases[slot], self.opened[slot] = case, step
        return slot

    def write(self, slot: Tensor, k: int, vectors: Tensor, offered: int) -> None:
        """Overwrite the vectors of class k, at most `voxels` of the `offered` ones, (N, E)."""
        start = k * self.voxels
        self.vectors[slot, start : start + len(vectors)] = vectors
        self.offered[slot, k] = offered

    def sample(self, count: int) -> Tensor:
        """(M, E): `count` vectors of each class that has as many, class after class.

        A case is drawn from in proportion to the voxels that it offered.
        """
        held = self.offered.clamp(max=self.voxels)  # (slots, K)
        places = torch.arange(self.voxels, device=held.device)
        stands_for = (self.offered / held.clamp(min=1))[..., None]
        weights = stands_for * (places < held[..., None])  # (slots, K, voxels)
        slots, num_classes = held.shape
        vectors = self.vectors.view(slots, num_classes, self.voxels, -1)
        drawn = [self.vectors[:0, 0]]
        for k in (held.sum(0) >= count).nonzero()[:, 0].tolist():
            chosen = torch.multinomial(weights[:, k].flatten(), count)
            drawn.append(vectors[:, k].flatten(0, 1)[chosen])
        return torch.cat(drawn)


def embed(network: MultiDecoderVNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K, X, Y, Z) and the maps before the last convolution, (B, F, X, Y, Z)."""
    features = network.encoder(pad_to_stride(images))
    decoder: Any = network.decoders[0]
    maps = decoder.dropout(decoder.maps(features)[-1])
    return unpad(decoder.head(maps), images).float(), unpad(maps, images)


def rows(maps: Tensor) -> Tensor:
    """(B, F, X, Y, Z) -> (B X Y Z, F)."""
    return maps.movedim(1, -1).flatten(0, -2)


def choose_queries(
    pseudo: Tensor, confidence: Tensor, num_classes: int, most: int
) -> tuple[Tensor, Tensor]:
    """The voxels that have a class, (N,), and which of them are the `most` surest of theirs, (n,).

    A class of a single voxel is left out.
    """
    pseudo, confidence = pseudo.flatten(), confidence.flatten()
    voxels, surest, count = [pseudo[:0]], [pseudo[:0]], 0
    for k in range(num_classes):
        of_class = (pseudo == k).nonzero()[:, 0]
        if len(of_class) > 1:
            best = confidence[of_class].topk(min(most, len(of_class))).indices
            voxels.append(of_class)
            surest.append(best + count)
            count += len(of_class)
    return torch.cat(voxels), torch.cat(surest)


def correlation_loss(first: Tensor, second: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """-mean_n sum_m C_a log C_v of main (N, E) and auxiliary vectors (N, E) with the memory's (M, E)."""
    with torch.autocast(first.device.type, enabled=False):
        main, auxiliary = ((q @ memory.T / temperature).softmax(1) for q in (first, second))
    return -(auxiliary * (main + 1e-8).log()).sum(1).mean()


SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {
        "method": {"dropout": 0.0, "supervised_ce_weight": 0.5, "warmup": 0.4},
        "train": {},
    },
    "faithful": {"method": {}, "train": SGD},
}
