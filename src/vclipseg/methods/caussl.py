"""CauSSL (Miao et al., ICCV 2023, pages 21426 to 21437; https://openaccess.thecvf.com/ICCV2023).

    L = sum_i [w_d * L_dice(p_i, y) + w_c * CE(p_i, y)]  supervised, every branch
      + w_u(t) * sum_{i != j} D(p_i, p_j)                consistency of unlabeled patches
      + w_m * sum_i max_A ICM(W_i | R_i, A)              dependence of the branches

    ICM(W | R, A) = mean over layers and filters r of cos^2((A R)_r, W_r)

p_i is the output of branch i, W_i are its filters, a row each, and R_i those of the other branches, seen
as constants. Branches that are linear combinations of each other have nothing to teach: A finds the
combination that comes nearest (`before_step`), and the branches part from it. Variant "mc": three
decoders of one encoder, D = ||p_i - s(p_j)||^2, s sharpens. Variant "cps": two networks, D = CE(p_i,
argmax p_j). No gradient goes through p_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vclipseg.data.batch import Batch
from vclipseg.losses import DiceForm, add, cross_entropy, dice_loss, most_likely, sigmoid_rampup
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.vnet import MultiDecoderVNet, Upsampling, pad_to_stride, unpad

DECODERS: dict[str, tuple[Upsampling, ...]] = {
    "mc": ("transposed", "pointwise_trilinear", "pointwise_nearest"),
    "cps": ("transposed",),
}


class CauSSLSettings(MethodSettings):
    """Settings of CauSSL; steps are those of a run of 5,000 and scale with the run's length."""

    name: Literal["caussl"] = "caussl"
    variant: Literal["mc", "cps"] = "mc"
    """Branches: three decoders of one encoder, or two networks."""
    dice: DiceForm = "squared"
    """Form of the Dice loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_d of the supervised Dice losses."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_c of the supervised cross-entropies."""
    consistency_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight w_u of the consistency once it is ramped up."""
    consistency_start: Annotated[int, Field(ge=0)] = 0
    """Step from which there is consistency."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until the consistency has its full weight; a published run ends before."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """Of the sharpening s, in variant "mc"."""
    dependence_weight: Annotated[float, Field(ge=0)] = 3.0
    """Weight w_m of the dependence."""
    dependence_start: Annotated[int, Field(ge=0)] = 40
    """Step after which the first round of maximization may come."""
    icm_all_branches: bool = True
    """Whether all branches part from the others, or only the first, as the authors' "mc" does."""
    round_every: Annotated[int, Field(ge=1)] = 60
    """Steps between two rounds of maximization; scaled, but at least one."""
    round_steps: Annotated[int, Field(ge=1)] = 60
    """Steps of Adam in a round; scaled, but at least one."""
    round_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate of Adam in a round."""


class CauSSL(Method):
    """Branches that agree on unlabeled patches and are kept from becoming the same network."""

    Settings = CauSSLSettings
    settings: CauSSLSettings
    published_steps: ClassVar[int] = 5_000
    training_only: ClassVar[tuple[str, ...]] = (
        "network.decoders.1.",
        "network.decoders.2.",
        "second.",
        "adversaries.",
    )
    adversaries: Any  # a list of Adversary, one a branch that parts from the others

    def __init__(self, settings: CauSSLSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings

        def network() -> MultiDecoderVNet:
            sizes = (task.in_channels, task.num_classes)
            return MultiDecoderVNet(*sizes, DECODERS[s.variant], s.filters, s.dropout)

        self.network = network()
        self.second = network() if s.variant == "cps" else None
        self.adversaries = nn.ModuleList(
            Adversary([(len(w), len(r)) for w, r in zip(own, others, strict=True)], s.round_lr)
            for own, others in self.filters()
        )
        self.round_every = max(1, round(s.round_every * self.scale))
        self.round_steps = max(1, round(s.round_steps * self.scale))
        before = int(s.dependence_start * self.scale / self.round_every)
        self.first_round = (before + 1) * self.round_every

    def loss(self, batch: Batch, step: int) -> Loss:
        """Supervision, consistency, and the dependence that the last round found."""
        s = self.settings
        networks = [self.network] if self.second is None else [self.network, self.second]
        logits = [z for network in networks for z in network(batch.images)]
        labeled, unlabeled = zip(*map(batch.split, logits), strict=True)
        ramp = sigmoid_rampup(step, s.rampup_steps * self.scale)
        ramp *= step >= s.consistency_start * self.scale
        parting = step >= self.first_round
        return Loss(
            dice=Term(
                s.dice_weight, add(dice_loss(z.softmax(1), batch.labels, s.dice) for z in labeled)
            ),
            ce=Term(s.ce_weight, add(cross_entropy(z, batch.labels) for z in labeled)),
            consistency=Term(s.consistency_weight * ramp, self.inconsistency(unlabeled)),
            dependence=Term(s.dependence_weight * parting, self.dependence()),
        )

    def inconsistency(self, logits: Sequence[Tensor]) -> Tensor:
        """Sum over ordered pairs of branches of D, from their logits (U, K, X, Y, Z); 0 for U = 0."""
        s, pairs = self.settings, permutations(logits, 2)
        if not len(logits[0]):
            return logits[0].new_zeros(())
        if s.variant == "cps":
            return add(cross_entropy(z, most_likely(other)) for z, other in pairs)
        # softmax(z / T) = p^(1/T) / sum_c p_c^(1/T)
        return add(
            F.mse_loss(z.softmax(1), (other.detach() / s.temperature).softmax(1))
            for z, other in pairs
        )

    def dependence(self) -> Tensor:
        """Sum of the branches' ICM, each with its A as it is."""
        return add(
            icm(own, others, adversary.matrices(adversary.values))
            for (own, others), adversary in zip(self.filters(), self.adversaries, strict=True)
        )

    def filters(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Of each branch that parts from the others: its own filters and theirs, a matrix a layer.

        A row is a filter, (G, F) with F = in_channels * kernel; the others' are stacked, (N G, F). For
        decoders the upsampling is left out, as what it does differs between them.
        """
        if self.second is None:
            branches = [filter_matrices(d, without="ups") for d in self.network.decoders]
        else:
            branches = [filter_matrices(self.network), filter_matrices(self.second)]
        pairs = []
        for i, own in enumerate(branches if self.settings.icm_all_branches else branches[:1]):
            rest = zip(*(branch for j, branch in enumerate(branches) if j != i), strict=True)
            pairs.append((own, [torch.cat(layer).detach() for layer in rest]))
        return pairs

    def before_step(self, step: int) -> None:
        """A round of maximization over A, the networks as they are."""
        if step < self.first_round or step % self.round_every:
            return
        for (own, others), adversary in zip(self.filters(), self.adversaries, strict=True):
            fixed = [w.detach() for w in own]
            adversary.maximize(lambda a, w=fixed, r=others: icm(w, r, a), self.round_steps)

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z), of the first branch."""
        features = self.network.encoder(pad_to_stride(images))
        return unpad(self.network.decoders[0](features), images).float().softmax(1)


class Adversary(nn.Module):
    """Matrices A, one a layer, that climb an objective by Adam (Kingma & Ba, ICLR 2015).

    Matrices and moments lie end to end in vectors, and are state: rounds go on where the last ended.
    """

    values: Tensor  # (N,)
    mean: Tensor  # (N,) of the gradient
    square: Tensor  # (N,)
    steps: Tensor

    def __init__(self, shapes: Sequence[tuple[int, int]], lr: float) -> None:
        super().__init__()
        self.shapes, self.lr = shapes, lr
        size = sum(map(prod, shapes))
        self.register_buffer("values", 1e-3 * torch.randn(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def matrices(self, values: Tensor) -> list[Tensor]:
        """(N,) -> one matrix a layer."""
        parts = values.split([prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def maximize(self, objective: Callable[[list[Tensor]], Tensor], steps: int) -> None:
        """Some steps of Adam with its usual constants."""
        for _ in range(steps):
            values = self.values.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(self.matrices(values)), values)
            self.steps += 1
            self.mean.lerp_(gradient, 1 - 0.9)
            self.square.lerp_(gradient.square(), 1 - 0.999)
            mean = self.mean / (1 - 0.9**self.steps)
            square = self.square / (1 - 0.999**self.steps)
            self.values += self.lr * mean / (square.sqrt() + 1e-8)


def icm(own: Sequence[Tensor], others: Sequence[Tensor], a: Sequence[Tensor]) -> Tensor:
    """Mean over layers and rows of cos^2((A R)_r, W_r): W (G, F), R (N G, F), A (G, N G)."""
    with torch.autocast(own[0].device.type, enabled=False):
        cosines = [
            F.cosine_similarity(a_l @ r, w, dim=1, eps=1e-12)
            for w, r, a_l in zip(own, others, a, strict=True)
        ]
    return torch.stack([c.square().mean() for c in cosines]).mean()


def filter_matrices(network: nn.Module, without: str = "") -> list[Tensor]:
    """The weights of all convolutions but those of one part, each as rows along its first axis."""
    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    parts = [part for name, part in network.named_children() if name != without]
    return [m.weight.flatten(1) for part in parts for m in part.modules() if isinstance(m, kinds)]


PUBLISHED = {
    "optimizer": "sgd",
    "lr": 0.01,
    "lr_power": 0.0,
    "lr_drop_every": 0.5,
    "weights": "last",
}
CPS: dict[str, Any] = {
    "variant": "cps",
    "consistency_weight": 0.03,
    "consistency_start": 400,
    "dependence_start": 500,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0, "dice": "linear", "warmup": 0.4}, "train": {}},
    "faithful": {"method": {}, "train": PUBLISHED},
    "mc": {"method": {}, "train": PUBLISHED},
    "cps": {"method": CPS, "train": PUBLISHED},
}
