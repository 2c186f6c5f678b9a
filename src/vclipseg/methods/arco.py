"""ARCO (You et al., NeurIPS 2023; https://arxiv.org/abs/2302.01735): two stages, a run each.

    "pretrain":
    L = w_s * [L_dice(p, y) + CE(p, y)]                      supervised
      + w_g * KL(r(t) || r(s))                               relations of whole images
      + w_l * mean over windows KL(r(t) || r(s))             relations of pieces of the output

    "train":
    L = w_s * [L_dice(p, y) + CE(p, y)]                      supervised
      + w_u * mean_v c CE(p_v, P_v)                          pseudo-labels of mixed images
      + w_c * mean_k mean_a -log softmax_0(cos(a, n) / T)    contrast; n_0 = m_k, n_1.. from the bank of k
      + w_n * mean_j [2 - 2 cos(f, q_j)]                     revisiting of nearest neighbours

A teacher averages the student's weights. In relations, s and t are what student and teacher make of an
image; r(x) = softmax_j(cos(x, q_j) / T) over a queue of earlier t. P are the teacher's pseudo-labels of
unlabeled images, mixed like those by CutMix; c is the share of an image's voxels that it is sure of. a are
the student's embeddings of voxels of class k; m_k is the teacher's mean embedding of the class, and the
bank holds its embeddings of others. f is the whole map of embeddings of an image, pooled; q_j are those of
the pool that are nearest to the teacher's. Anchors and negatives are drawn stratified and antithetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vclipseg.contrast import ContrastSettings, Count, VoxelContrast
from vclipseg.data.batch import Batch
from vclipseg.losses import (
    IGNORE,
    DiceForm,
    cross_entropy,
    cross_entropy_by_image,
    dice_loss,
)
from vclipseg.methods.base import Ema, Loss, Method, MethodSettings, Task, Term
from vclipseg.mixing import cutmix_box
from vclipseg.networks.fusion import Fusion, LevelsVNet
from vclipseg.networks.queues import Queue
from vclipseg.networks.relation import Relation, global_relation, local_relation
from vclipseg.networks.vnet import unpad
from vclipseg.sampling import extremes
from vclipseg.views import jittered_and_blurred

Weight = Annotated[float, Field(ge=0)]


class ArcoSettings(ContrastSettings, MethodSettings):
    """Settings of ARCO."""

    name: Literal["arco"] = "arco"
    stage: Literal["pretrain", "train"] = "train"
    """Relation distillation, or contrast with pseudo-labels; the second may start from a run of the first."""
    dice: DiceForm = "multiclass"
    """Form of the Dice loss."""
    supervised_weight: Weight = 1.0
    """Weight w_s of Dice loss and cross-entropy."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the teacher keeps each step."""
    teacher_statistics: Literal["batch", "average"] = "batch"
    """What normalizes the teacher's features: its batch, with dropout, as published, or running averages,
    without."""
    queue: Count = 36
    """Images that a relation looks at, and maps that the pool of revisiting holds."""
    global_weight: Weight = 1.0
    """Pre-training: weight w_g of the relations of whole images."""
    local_weight: Weight = 1.0
    """Pre-training: weight w_l of the relations of windows."""
    relation_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Pre-training: T of a relation's softmax."""
    relation_embedding: Count = 512
    """Pre-training: numbers that an image is embedded in."""
    windows: tuple[Count, Count, Count] = (10, 10, 7)
    """Pre-training: windows along X, Y and Z, each half over the next."""
    unlabeled_weight: Weight = 1.0
    """Weight w_u of the pseudo-labels."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Probability from which the teacher is sure of a voxel."""
    contrast_weight: Weight = 0.01
    """Weight w_c of the contrast; 0: it is not computed."""
    entropy_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Unlabeled voxels that take part: this percentage with the lowest entropy for anchors, with the highest
    for negatives. It falls to 0 over the run."""
    revisiting_weight: Weight = 1.0
    """Weight w_n of the revisiting; 0: it is not computed."""
    revisiting: Literal["intended", "as_released"] = "intended"
    """The student's distance from the teacher's neighbours, or, as in the authors' code, the teacher's from
    the student's, which has no gradient: then it is logged only."""
    neighbours: Count = 5
    """Nearest maps of the pool that are revisited."""
    pooled: tuple[Count, Count, Count] = (14, 14, 10)
    """Grid that maps of embeddings are averaged on before they are compared."""


class Mixed(NamedTuple):
    """The images of a step of the second stage, labeled ones first."""

    images: Tensor  # (B, C, X, Y, Z), for the student
    plain: Tensor  # (B, C, X, Y, Z), the same for the teacher
    labels: Tensor  # (B, X, Y, Z), pseudo-labels where there are no others
    sure: Tensor  # (U,), share of an unlabeled image's voxels that the teacher is sure of


class Arco(Method):
    """Both stages of ARCO."""

    Settings = ArcoSettings
    settings: ArcoSettings
    published_steps: ClassVar[int] = 6_000
    training_only: ClassVar[tuple[str, ...]] = (
        "teacher", "whole.", "pieces.", "fusion.", "contrast.", "pool.",
    )  # fmt: skip

    def __init__(self, settings: ArcoSettings, task: Task) -> None:
        super().__init__(settings, task)
        s, k = settings, task.num_classes
        self.total_steps = task.total_steps
        self.pending: list[tuple[Queue, Tensor]] = []  # from `loss` to `after_step`
        self.network = LevelsVNet(task.in_channels, k, s.filters, s.dropout)
        self.teacher = Ema(self.network, s.ema_decay, buffers=s.teacher_statistics == "average")
        if s.stage == "pretrain":
            self.whole = global_relation(8 * s.filters, s.relation_embedding, s.queue)
            self.pieces = local_relation(k, s.windows, s.queue)
            self.teacher_whole = Ema(self.whole.head, s.ema_decay)
            self.teacher_pieces = Ema(self.pieces.head, s.ema_decay)
        else:
            self.fusion = Fusion(s.filters, s.embedding, further=2)
            self.teacher_fusion = Ema(self.fusion, s.ema_decay)
            self.contrast = VoxelContrast(s, k)
            self.pool = Queue(s.queue, (s.embedding, *s.pooled), held=s.queue)

    def loss(self, batch: Batch, step: int) -> Loss:
        """The terms of the stage."""
        self.pending = []
        if self.settings.stage == "pretrain":
            return self.pretrain(batch)
        return self.train_on(batch, step)

    def supervised(self, logits: Tensor, labels: Tensor) -> Loss:
        """Dice loss and cross-entropy, of either stage."""
        s = self.settings
        return Loss(
            dice=Term(s.supervised_weight, dice_loss(logits.softmax(1), labels, s.dice)),
            ce=Term(s.supervised_weight, cross_entropy(logits, labels)),
        )

    # The first stage

    def pretrain(self, batch: Batch) -> Loss:
        """The student sees another view than the teacher, and shall see the same relations."""
        s = self.settings
        out = self.network(jittered_and_blurred(batch.images, batch.generator))
        seen = self.teacher(batch.plain)
        loss = self.supervised(batch.split(out.logits)[0], batch.labels)
        whole = self.relate(self.whole, self.teacher_whole, out.levels[0], seen.levels[0])
        pieces = self.relate(self.pieces, self.teacher_pieces, out.logits, seen.logits)
        loss["global"] = Term(s.global_weight, whole)
        loss["local"] = Term(s.local_weight, pieces)
        return loss

    def relate(self, relation: Relation, head: Ema, student: Tensor, teacher: Tensor) -> Tensor:
        """KL of the relations; the queue will take in what the teacher made."""
        key = head(teacher)
        self.pending.append((relation.queue, key))
        return relation.divergence(
            relation.student(student), key, self.settings.relation_temperature
        )

    # The second stage

    def train_on(self, batch: Batch, step: int) -> Loss:
        """Pseudo-labels, contrast and revisiting; `facts` say how sure the teacher is."""
        s = self.settings
        mixed = self.mix(batch)
        out, seen = self.network(mixed.images), self.teacher(mixed.plain)
        (labeled, unlabeled), pseudo = batch.split(out.logits), batch.split(mixed.labels)[1]
        loss = self.supervised(labeled, batch.labels)
        followed = cross_entropy_by_image(unlabeled, pseudo, mixed.sure)
        loss["unlabeled"] = Term(s.unlabeled_weight, followed)
        loss.facts["sure_share"] = mixed.sure.sum() / max(len(mixed.sure), 1)
        student = unpad(self.fusion(out.levels, further=True), mixed.images)
        teacher = unpad(self.teacher_fusion(seen.levels), mixed.images)
        if s.contrast_weight:
            low, high = self.parts(batch.labels, pseudo, unlabeled.detach(), step)
            probs = seen.logits.softmax(1)
            contrast, classes = self.contrast(student, teacher, probs, low, batch.generator)
            loss["contrast"] = Term(s.contrast_weight, contrast)
            loss.facts["contrast_classes"] = float(classes)
            self.pending += self.contrast.intake(teacher, probs, high, batch.generator)
        if s.revisiting_weight:
            distance = self.revisit(student, teacher)
            if s.revisiting == "intended":
                loss["revisiting"] = Term(s.revisiting_weight, distance)
            else:
                loss.facts["revisiting"] = distance
        return loss

    @torch.no_grad()
    def mix(self, batch: Batch) -> Mixed:
        """Pseudo-label the unlabeled images, and put into each a box of the next."""
        images, (labeled, plain) = batch.unlabeled_images, batch.split(batch.plain)
        if not len(images):
            return Mixed(batch.images, batch.plain, batch.labels, images.new_zeros(0))
        confidence, pseudo = self.teacher(plain).logits.softmax(1).max(1)
        shape = (images.shape[2], images.shape[3], images.shape[4])
        boxes = torch.stack([cutmix_box(shape, batch.generator) for _ in images])[:, None]
        images, plain, confidence, pseudo = (
            torch.where(boxes.to(x.device), x.roll(-1, 0), x)
            for x in (images, plain, confidence[:, None], pseudo[:, None])
        )
        return Mixed(
            torch.cat([batch.labeled_images, images]),
            torch.cat([labeled, plain]),
            torch.cat([batch.labels, pseudo[:, 0]]),
            (confidence >= self.settings.threshold).float().mean((1, 2, 3, 4)),
        )

    def parts(
        self, labels: Tensor, pseudo: Tensor, logits: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Labels (B, X, Y, Z) for anchors and for negatives, `IGNORE` where a voxel takes no part.

        All labeled voxels do, and of the unlabeled ones those of lowest and of highest entropy.
        """
        percent = self.settings.entropy_percent * (1 - min(step / self.total_steps, 1))
        entropy = torch.special.entr(logits.softmax(1)).sum(1)
        low, high = (pseudo.where(mask, IGNORE) for mask in extremes(entropy, percent))
        return torch.cat([labels, low]), torch.cat([labels, high])

    def revisit(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared distance of normalized maps from the nearest of the pool."""
        s = self.settings
        theirs = F.adaptive_avg_pool3d(teacher.float(), s.pooled)
        mine = F.adaptive_avg_pool3d(student.float(), s.pooled)
        self.pending.append((self.pool, theirs))
        guide, moved = (theirs, mine) if s.revisiting == "intended" else (mine.detach(), theirs)
        held = self.pool.held.flatten(1)
        near = F.cosine_similarity(guide.flatten(1)[:, None], held, dim=2)  # (B, N)
        neighbours = held[near.topk(min(s.neighbours, len(held))).indices]
        return (2 - 2 * F.cosine_similarity(moved.flatten(1)[:, None], neighbours, dim=2)).mean()

    # Both stages

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The teacher begins as the student."""
        taken = super().start_from(weights)
        for teacher, student in self.pairs():
            teacher.copy_from(student)
        return taken

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network(images).logits.softmax(1)

    def after_step(self, step: int) -> None:
        """The memories take in what the step saw; the teacher follows."""
        for queue, rows in self.pending:
            queue.push(rows)
        self.pending = []
        for teacher, student in self.pairs():
            teacher.update(student, step)

    def pairs(self) -> list[tuple[Ema, nn.Module]]:
        """Every averaged module with what it averages."""
        pairs: list[tuple[Ema, nn.Module]] = [(self.teacher, self.network)]
        if self.settings.stage == "pretrain":
            heads = (self.teacher_whole, self.whole.head), (self.teacher_pieces, self.pieces.head)
            return [*pairs, *heads]
        return [*pairs, (self.teacher_fusion, self.fusion)]


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.01, "weights": "last"}
FAITHFUL: dict[str, Any] = {"method": {"patches": (4, 4)}, "train": {**SGD, "nesterov": True}}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "pretrain": {
        "method": {"stage": "pretrain", "patches": (1, 1), "supervised_weight": 0.5},
        "train": SGD,
    },
    "faithful": FAITHFUL,
    "as_released": {
        "method": {
            **FAITHFUL["method"],
            "negatives": "as_released",
            "revisiting": "as_released",
        },
        "train": FAITHFUL["train"],
    },
    "robust": {
        "method": {
            "dropout": 0.0,
            "warmup": 0.4,
            "dice": "linear",
            "supervised_weight": 0.5,
            "unlabeled_weight": 0.5,
            "teacher_statistics": "average",
            "revisiting_weight": 0.0,  # it makes all embeddings alike
        },
        "train": {},
    },
}
