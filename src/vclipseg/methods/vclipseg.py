"""VCLIPSeg (Li et al., MICCAI 2024; https://doi.org/10.1007/978-3-031-72114-4_66).

    L = w_s * sum_i L_dice(p_i, y)                   supervised, every decoder
      + w_u(t) * sum_i [CE(p_i, P) + L_dice(p_i, P)] dynamic labeling (DLB)
      + w_r * mean_k [1 - cos(v_k, t_k)]             vision-text consistency (VTCM)

p_i is the output of decoder i. P = sum_i w_i p_i, w = softmax(1 - sigmoid(L_dice(p_i, y))), is one
pseudo-label for both. v_k is the prototype of class k: the mean embedding of the voxels that the label
and every decoder call k; t_k is the text vector of the class name. The voxel-wise prompts (VWPM) are in
the network. Beyond the paper: an averaged teacher may make P, as in the preset `robust`, and labeled
and unlabeled patches may exchange a box (copy-paste), so that each decoder sees both in one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.labeling import fuse, largest_components
from vclipseg.losses import (
    IGNORE,
    DiceForm,
    add,
    cross_entropy,
    dice_loss,
    most_likely,
    one_hot,
    sharpen,
    sigmoid_rampup,
    soft_cross_entropy,
    soft_dice_loss,
)
from vclipseg.methods.base import Ema, Loss, Method, MethodSettings, Task, Term
from vclipseg.mixing import random_box, swap
from vclipseg.networks.vnet import STRIDE, pads_to_stride
from vclipseg.networks.vnet_text import TextVNet, TextVNetOutput, TextVNets
from vclipseg.ranks import across


class VCLIPSegSettings(MethodSettings):
    """Settings of VCLIPSeg; steps are those of a run of 15,000 and scale with the run's length."""

    name: Literal["vclipseg"] = "vclipseg"
    prompts: bool = True
    """Voxel-wise prompts (VWPM)."""
    alignment: bool = True
    """Vision-text consistency (VTCM)."""
    dlb: bool = True
    """Dynamic labeling; without it the decoders teach each other as in MC-Net."""
    supervised_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_s of the supervised Dice losses."""
    supervised_ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of cross-entropy beside the supervised Dice loss; the paper has none."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight w_u of the unlabeled term once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until the unlabeled term has its full weight."""
    alignment_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight w_r of the vision-text term."""
    alignment_rampup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps until the vision-text term has its full weight; 0: from the start, as published."""
    dice: DiceForm = "linear"
    """Form of every Dice loss."""
    pseudo_labels: Literal["hard", "soft"] = "hard"
    """The paper writes soft mixtures, the authors' code takes their argmax."""
    dlb_weighting: Literal["dynamic", "equal", "voxel_entropy"] = "dynamic"
    """How decoders count in a pseudo-label: by their Dice loss, alike, or voxel by voxel."""
    dlb_apply_to: Literal["all", "unlabeled"] = "all"
    """Patches that pseudo-labels supervise; the authors' code takes the labeled ones too."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pseudo-labels below this probability are left out."""
    largest_component: bool = False
    """Pseudo-labels of a class outside its largest connected piece become background: for organs that are
    in one piece, as BCP does. Only hard pseudo-labels."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the sharpening that replaces dynamic labeling where it is off."""
    heads: Literal[1, 2] = 2
    """Projection heads: one in the paper, one a decoder in the authors' code."""
    norm_axis: Literal["channel", "last_spatial"] = "channel"
    """Axis of the projection's l2 normalization; the authors' code takes the last spatial one."""
    prototype_grid: Literal[4, 8, 16] = 16
    """Every how many voxels a label takes part in a prototype."""
    prototype_pooling: Literal["strided", "majority"] = "strided"
    """Label of a grid cell: that of its first voxel, as published, or of more than half of it."""
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that an averaged teacher keeps each step; 0: the network labels for itself."""
    teacher_statistics: Literal["running", "batch"] = "running"
    """What the teacher normalizes by: the running average of the network's statistics, which are of mixed
    patches in changed contrast, or the statistics of the plain patches that it labels (dropout then acts in
    it too)."""
    copy_paste: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Side of the box that labeled and unlabeled patches exchange, as a share of the patch; 0: none."""
    predict_with: Literal["first", "mean"] = "first"
    """The first decoder, as published, or the mean of both."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.copy_paste and self.patches[1] and self.patches[0] != self.patches[1]:
            raise ValueError(
                f"copy_paste exchanges boxes between as many labeled as unlabeled patches, and patches is "
                f"{list(self.patches)}; make both equal, or set copy_paste = 0"
            )
        return self


class VCLIPSeg(Method):
    """VCLIPSeg and, without prompts and alignment, MC-Net with dynamic labeling."""

    Settings = VCLIPSegSettings
    settings: VCLIPSegSettings
    training_only: ClassVar[tuple[str, ...]] = ("teacher.", "network.projections.")
    text: Tensor  # (K, E)

    def __init__(self, settings: VCLIPSegSettings, task: Task) -> None:
        if task.text_vectors is None:
            raise ValueError("VCLIPSeg needs a text vector for each class name")
        super().__init__(settings, task)
        s = settings
        self.class_names = task.class_names
        self.register_buffer("text", task.text_vectors.clone())
        self.network = self.make_network(task.in_channels, task.text_vectors)
        running = s.teacher_statistics == "running"
        self.teacher = (
            Ema(self.network, s.teacher_decay, buffers=running) if s.teacher_decay else None
        )

    def make_network(self, in_channels: int, text: Tensor) -> TextVNet | TextVNets:
        """One encoder and two decoders."""
        s = self.settings
        heads = s.heads if s.alignment else 0
        return TextVNet(
            in_channels, text, s.filters, s.dropout, prompts=s.prompts, projections=heads
        )

    def loss(self, batch: Batch, step: int) -> Loss:
        """The three terms; `facts` say how many pseudo-labels count and which class had a prototype."""
        s = self.settings
        images, known, guided = self.view(batch)
        out = self.network(images)
        probs = [z.softmax(1) for z in out.logits]
        dices = torch.stack([dice_loss(p, known, s.dice) for p in probs])
        loss = Loss(supervised=Term(s.supervised_weight, dices.sum()))
        loss.update(self.supervise(out, known))
        weight = s.unlabeled_weight * sigmoid_rampup(step, s.rampup_steps * self.scale)
        if s.dlb:
            pseudo, kept = self.pseudo_labels(self.guides(batch, probs), dices.detach(), guided)
            loss["dlb"] = Term(weight, self.follow(out.logits, probs, pseudo, kept))
            unlabeled = guided & (known == IGNORE)
            loss.facts["pseudo_share"] = (kept * unlabeled).sum() / unlabeled.sum().clamp(min=1)
        else:
            pairs = permutations(probs, 2)
            agreement = add(F.mse_loss(p, sharpen(q, s.temperature)) for p, q in pairs)
            loss["mutual"] = Term(weight, agreement)
        if s.alignment:
            gap, counts = self.misalignment(out, known)
            ramp = sigmoid_rampup(step, s.alignment_rampup_steps * self.scale)
            loss["alignment"] = Term(s.alignment_weight * ramp, gap)
            for name, count in zip(self.class_names, counts, strict=True):
                loss.facts[f"prototype {name}"] = (count > 0).float()
        return loss

    def supervise(self, out: TextVNetOutput, known: Tensor) -> dict[str, Term]:
        """What labels teach beside the Dice losses."""
        if not self.settings.supervised_ce_weight:
            return {}
        ce = add(cross_entropy(z, known) for z in out.logits)
        return {"supervised_ce": Term(self.settings.supervised_ce_weight, ce)}

    def view(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The images that the network sees, and the labels known of them, `IGNORE` elsewhere.

        The third is where pseudo-labels may teach: not in labeled patches, even where nobody knows the
        class, unless all are asked for; where mixed, in the unlabeled part.
        """
        labels, unlabeled = batch.labels, batch.unlabeled_images
        unknown = labels.new_full((len(unlabeled), *labels.shape[1:]), IGNORE)
        known = torch.cat([labels, unknown])
        if not self.settings.copy_paste or not len(unlabeled):
            guided = torch.ones_like(known, dtype=torch.bool)
            guided[: len(labels)] = self.settings.dlb_apply_to == "all"
            return batch.images, known, guided
        shape = tuple(labels.shape[1:])
        box = random_box(shape, self.settings.copy_paste, batch.common, labels.device)
        return (
            torch.cat(swap(batch.labeled_images, unlabeled, box)),
            torch.cat(swap(labels, unknown, box)),
            torch.stack([box] * len(labels) + [~box] * len(unlabeled)),
        )

    @torch.no_grad()
    def guides(self, batch: Batch, probs: list[Tensor]) -> list[Tensor]:
        """The probabilities that pseudo-labels are made of, one a decoder, rows as in `view`."""
        if self.teacher is None or batch.num_labeled == len(batch.images):
            return [p.detach() for p in probs]
        s = self.settings
        if not s.copy_paste and s.dlb_apply_to == "all":
            return self.teach(batch)
        unlabeled = self.teach(batch, batch.num_labeled)
        if not s.copy_paste:  # of labeled patches nothing counts
            blank = unlabeled[0].new_zeros(batch.num_labeled, *unlabeled[0].shape[1:])
            return [torch.cat([blank, p]) for p in unlabeled]
        # row i and row L + i of the view show the same unlabeled patch, outside and inside the box
        return [p.repeat(2, 1, 1, 1, 1) for p in unlabeled]

    def teach(self, batch: Batch, first: int = 0) -> list[Tensor]:
        """What each decoder of the teacher says of the patches from the `first` on."""
        assert self.teacher is not None
        return [z.softmax(1) for z in self.teacher(batch.plain[first:]).logits]

    @torch.no_grad()
    def pseudo_labels(
        self, guides: list[Tensor], dices: Tensor, taught: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Targets (B, K, X, Y, Z) for every decoder, and which of the voxels `taught` by them count.

        Both masks are (B, X, Y, Z).
        """
        s = self.settings
        mixture = fuse(guides, dices, s.dlb_weighting)
        confidence, labels = mixture.max(1)
        if s.largest_component:
            labels = largest_components(labels)
        kept = taught * self.sure(confidence, labels, taught).float()
        soft = s.pseudo_labels == "soft"
        return (mixture if soft else one_hot(labels, mixture.shape[1])), kept

    def sure(self, confidence: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        """Which pseudo-labels are probable enough, (B, X, Y, Z)."""
        return confidence >= self.settings.threshold

    def follow(
        self, logits: list[Tensor], probs: list[Tensor], pseudo: Tensor, kept: Tensor
    ) -> Tensor:
        """Cross-entropy and Dice of every decoder against the pseudo-labels."""
        form = self.settings.dice
        return add(soft_cross_entropy(z, pseudo, kept) for z in logits) + add(
            soft_dice_loss(p, pseudo, kept, form) for p in probs
        )

    def misalignment(self, out: TextVNetOutput, known: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cos(v_k, t_k), averaged over the classes that have a prototype in this batch.

        Returns:
            The scalar, 0 where no class has one, and the number of voxels of each prototype, (K,).
        """
        s = self.settings
        agreed = known
        for logits in out.logits:
            agreed = agreed.where(most_likely(logits) == agreed, IGNORE)
        agreed = F.pad(agreed, pads_to_stride(agreed.shape[1:]), value=IGNORE)
        members = prototype_members(agreed, len(self.text), s.prototype_grid, s.prototype_pooling)
        axis = 1 if s.norm_axis == "channel" else -1
        heads = [F.normalize(e.float(), dim=axis) for e in self.network.embed(out)]
        vectors = torch.stack(heads).mean(0)  # (B, E, x, y, z)
        vectors = F.interpolate(vectors, scale_factor=STRIDE // s.prototype_grid)
        counts = across(members.sum((0, 2, 3, 4)))
        of_class = [(m[:, None] * vectors).sum((0, 2, 3, 4)) for m in members.unbind(1)]  # (E,)
        sums = across(torch.stack(of_class))  # an einsum would be bf16
        present = (counts > 0).float()
        gaps = self.gaps(sums) * present  # of sums as of means
        return gaps.sum() / present.sum().clamp(min=1), counts

    def gaps(self, prototypes: Tensor) -> Tensor:
        """How far each prototype (K, E) is from its text vector, (K,)."""
        return 1 - F.cosine_similarity(prototypes, self.text, dim=1)

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The teacher begins as the network."""
        taken = super().start_from(weights)
        if self.teacher is not None:
            self.teacher.copy_from(self.network)
        return taken

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network.predict(images, None if self.settings.predict_with == "mean" else 1)

    def opinions(self, images: Tensor) -> list[Tensor]:
        """Of every decoder."""
        return [z.softmax(1) for z in self.network(images).logits]

    def after_step(self, step: int) -> None:
        """The teacher follows."""
        if self.teacher is not None:
            self.teacher.update(self.network, step)


def prototype_members(agreed: Tensor, num_classes: int, grid: int, pooling: str) -> Tensor:
    """Labels (B, X, Y, Z) to one-hot cells (B, K, X/grid, Y/grid, Z/grid), all zero where none holds.

    A cell has the label of its first voxel ("strided") or that of more than half of it ("majority").
    """
    if pooling == "strided":
        return one_hot(agreed[:, ::grid, ::grid, ::grid], num_classes)
    return (F.avg_pool3d(one_hot(agreed, num_classes), grid) > 0.5).float()


SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}
ROBUST: dict[str, Any] = {
    "dropout": 0.0,
    "supervised_ce_weight": 0.5,
    "dlb_apply_to": "unlabeled",
    "unlabeled_weight": 0.5,
    "teacher_decay": 0.99,
    "teacher_statistics": "batch",
    "warmup": 0.4,
    "prototype_grid": 8,
    "predict_with": "mean",
}
PAPER: dict[str, Any] = {
    "pseudo_labels": "soft",
    "dlb_apply_to": "unlabeled",
    "supervised_weight": 1.0,
    "heads": 1,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "faithful": {"method": {}, "train": SGD},
    "code": {"method": {"norm_axis": "last_spatial"}, "train": SGD},
    "paper": {"method": PAPER, "train": SGD, "text": {"template": "paper"}},
    "mcnet_dlb": {"method": {"prompts": False, "alignment": False}, "train": SGD},
    "robust": {"method": ROBUST, "train": {}},
    "robust_without_unlabeled": {"method": {**ROBUST, "unlabeled_weight": 0.0}, "train": {}},
}
