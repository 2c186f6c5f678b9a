"""AD-MT, Alternate Diverse Teaching (Zhao et al., ECCV 2024; https://arxiv.org/abs/2311.17325).

    L = [CE(z, y) + Dice(z, y)] / 2        labeled patches
      + w_u(t) * mean_{c >= tau} CE(z', q)  strong views of unlabeled patches
    p = w_1 p_1 + w_2 p_2,  w = softmax(-H(p_1), -H(p_2)),  q = argmax p,  c = max p

p_1 and p_2 are what two averaged teachers say of the weak view, H is their entropy in bits, voxel by
voxel. Where they disagree and the student is surer of another class than c, q and c are the student's.
The teachers take turns for random periods: in the first one's turn the strong view is a change of
intensity, in the second one's CutMix of the weak views; only the teacher whose turn it is follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vclipseg.data.batch import Batch
from vclipseg.losses import IGNORE, DiceForm, cross_entropy, dice_loss, most_likely, sigmoid_rampup
from vclipseg.methods.base import Ema, Loss, Method, MethodSettings, Task, Term
from vclipseg.mixing import centered_boxes, paste
from vclipseg.networks.vnet import VNet
from vclipseg.views import brightness_contrast, noise, sometimes


class ADMTSettings(MethodSettings):
    """Settings of AD-MT; steps are those of a run of 15,000 and scale with the run's length."""

    name: Literal["ad_mt"] = "ad_mt"
    dice: DiceForm = "multiclass"
    """Form of the Dice loss."""
    unlabeled_weight: Annotated[float, Field(ge=0)] = 2.0
    """Weight w_u of the unlabeled term once it is ramped up."""
    rampup_steps: Annotated[int, Field(ge=0)] = 6_000
    """Steps until the unlabeled term has its full weight."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Confidence tau from which a pseudo-label counts."""
    period: Annotated[int, Field(ge=1)] = 19
    """A teacher's turn lasts U{1, ..., period} steps; it does not scale with the run's length."""
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the teacher whose turn it is keeps each step, of weights and running statistics."""
    copy_steps: Annotated[int, Field(ge=0)] = 80
    """Steps in which the teacher whose turn it is becomes a copy of the student."""
    active_teacher: Literal["train", "eval"] = "train"
    """The teacher whose turn it is normalizes by the batch and drops out as in training, as published;
    or as in evaluation, as the other does."""
    align_student: bool = True
    """Cut and paste the student's word along with the teachers'; the authors' code does not."""


class ADMT(Method):
    """A student V-Net and two teachers that take turns."""

    Settings = ADMTSettings
    settings: ADMTSettings
    training_only: ClassVar[tuple[str, ...]] = ("teachers.", "turns.")
    teachers: Sequence[Ema]

    def __init__(self, settings: ADMTSettings, task: Task) -> None:
        super().__init__(settings, task)
        s = settings
        self.network, *others = (
            VNet(task.in_channels, task.num_classes, s.filters, s.dropout) for _ in range(3)
        )
        teachers = [Ema(network, s.teacher_decay, buffers=True) for network in others]
        self.teachers = nn.ModuleList(teachers)  # type: ignore[assignment]
        self.turns = Turns(s.period)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Both terms; `facts` say how often the teachers disagree and how many pseudo-labels count."""
        s = self.settings
        if batch.num_labeled == len(batch.images):
            logits = self.network(batch.labeled_images)
            return Loss(supervised=Term(1.0, self.supervised(logits, batch.labels)))
        _, weak = batch.split(batch.plain)
        guess = fuse(*self.teach(weak))
        strong, cut = self.strong_view(weak, batch.generator)
        logits = self.network(torch.cat([batch.labeled_images, weak, strong]))
        labeled, unlabeled, changed = logits.split([batch.num_labeled, len(weak), len(weak)])
        own = unlabeled.detach().softmax(1).max(1)
        pseudo, confidence = arbitrate(
            *map(cut, guess), *(map(cut, own) if s.align_student else own)
        )
        counts = confidence >= s.threshold
        weight = s.unlabeled_weight * sigmoid_rampup(step, s.rampup_steps * self.scale)
        return Loss(
            facts={"conflict": guess[2].float().mean(), "pseudo_share": counts.float().mean()},
            supervised=Term(1.0, self.supervised(labeled, batch.labels)),
            unlabeled=Term(weight, cross_entropy(changed, pseudo.where(counts, IGNORE))),
        )

    def supervised(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Half cross-entropy, half Dice."""
        dice = dice_loss(logits.softmax(1), labels, self.settings.dice)
        return 0.5 * (cross_entropy(logits, labels) + dice)

    def teach(self, images: Tensor) -> list[Tensor]:
        """What each teacher says of images, (N, K, X, Y, Z)."""
        for index, teacher in enumerate(self.teachers):
            active = index == self.turns.whose and self.settings.active_teacher == "train"
            teacher.network.train(self.training and active)
        return [teacher(images).softmax(1) for teacher in self.teachers]

    def strong_view(
        self, weak: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The student's view of the turn, and what it does to anything of its rows (N, ..., X, Y, Z)."""
        if self.turns.whose == 0:
            changed = sometimes(brightness_contrast(weak, generator), weak, 0.8, generator)
            return sometimes(noise(changed, generator), changed, 0.2, generator), lambda x: x
        boxes = centered_boxes(len(weak), weak.shape[2:], generator)
        partner = torch.randperm(len(weak), generator=generator)
        boxes, partner = (t.to(weak.device, non_blocking=True) for t in (boxes, partner))

        def cut(x: Tensor) -> Tensor:
            return paste(x, x[partner], boxes)

        return cut(weak), cut

    def after_step(self, step: int) -> None:
        """The teacher whose turn it is follows; then the clock goes on."""
        late = step - self.settings.copy_steps * self.scale
        # it follows in half of the steps
        self.teachers[self.turns.whose].update(self.network, max(int(late // 2), 0))
        self.turns.tick()

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Both teachers begin as the network."""
        taken = super().start_from(weights)
        for teacher in self.teachers:
            teacher.copy_from(self.network)
        return taken

    def predict(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.network(images).softmax(1)


class Turns(nn.Module):
    """Whose turn it is, for a random number of steps up to `longest`; all of it is state.

    It stays on the CPU, where it is read: nothing waits for the device.
    """

    state: Tensor  # whose turn, steps of it that are done, steps of it

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.register_buffer("state", torch.tensor([0, 0, self.draw()]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    @property
    def whose(self) -> int:
        """0 or 1."""
        return int(self.state[0])

    def tick(self) -> None:
        """A step is done."""
        whose, done, period = self.state.tolist()
        done += 1
        turn = (whose, done, period) if done < period else (1 - whose, 0, self.draw())
        self.state.copy_(torch.tensor(turn))

    def draw(self) -> int:
        """The length of a turn."""
        return int(torch.randint(1, self.longest + 1, ()))


def fuse(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two teachers' probabilities (N, K, X, Y, Z) to labels, confidence and where the two disagree."""
    both = torch.stack([first, second])
    entropy = -(both * (both + 1e-10).log2()).sum(2, keepdim=True)
    confidence, labels = ((-entropy).softmax(0) * both).sum(0).max(1)
    return labels, confidence, most_likely(first) != most_likely(second)


def arbitrate(
    labels: Tensor, confidence: Tensor, conflict: Tensor, own_confidence: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels and confidence, the student's where the teachers disagree and it is surer of another class."""
    better = conflict & (labels != own) & (own_confidence > confidence)
    return own.where(better, labels), own_confidence.where(better, confidence)


SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.9, "weights": "last"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "robust": {"method": {"dropout": 0.0, "warmup": 0.4}, "train": {}},
    "faithful": {"method": {}, "train": SGD},
    "code": {"method": {"align_student": False}, "train": SGD},
}
