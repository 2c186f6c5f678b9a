"""What a method is: the networks it owns and the loss its paper writes down; all else is the loop's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vclipseg.data.batch import Batch
from vclipseg.settings import Settings


@dataclass(frozen=True)
class Task:
    """All that a method learns about the data and the run."""

    in_channels: int
    class_names: tuple[str, ...]  # index 0 is background
    total_steps: int
    text_vectors: Tensor | None = None  # (K, E), one for each class name

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.class_names)


class MethodSettings(Settings):
    """What every method can be told."""

    filters: Annotated[int, Field(ge=1)] = 16
    """Channels of the first block; the deepest has 16 times as many."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """`Dropout3d` at the bottleneck and before the last convolution. 0.5 is for 16 filters; narrow
    networks lose whole classes to it."""
    patches: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = (2, 2)
    """Labeled and unlabeled patches of a step; their sum is the method's budget."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run in which all patches of a step are labeled, so that the first pseudo-labels are
    good ones."""


class Term(NamedTuple):
    """One summand of a loss."""

    weight: float
    value: Tensor  # scalar


class Loss(dict[str, Term]):
    """L = sum of weight * value, kept term by term so that logs, tests and reports see each one.

    `facts` are numbers worth a column in the log that carry no gradient.
    """

    def __init__(self, facts: dict[str, float | Tensor] | None = None, **terms: Term) -> None:
        super().__init__(terms)
        self.facts = facts or {}

    @property
    def total(self) -> Tensor:
        """The scalar to differentiate."""
        return torch.stack([weight * value for weight, value in self.values()]).sum()


class Method(nn.Module, ABC):
    """A way to train a segmentation network.

    One file a method. `loss` reads like the paper's equations and changes no trained parameter; what
    the paper updates outside backpropagation (a teacher, a memory) goes into `after_step`. All state
    is in `state_dict()`, so any method is saved and resumed the same way.
    """

    published_steps: ClassVar[int] = 15_000
    """Steps of a published run; a paper's step constants are scaled from it to this run's length."""

    training_only: ClassVar[tuple[str, ...]] = ()
    """Starts of the names of weights that prediction does not need; a model is shipped without."""

    def __init__(self, settings: MethodSettings, task: Task) -> None:
        super().__init__()
        self.settings = settings
        self.warmup_steps = int(settings.warmup * task.total_steps)
        self.scale = task.total_steps / self.published_steps

    def patches_at(self, step: int) -> tuple[int, int]:
        """Labeled and unlabeled patches of this step: labeled ones only while it warms up."""
        labeled, unlabeled = self.settings.patches
        return (labeled + unlabeled, 0) if step < self.warmup_steps else (labeled, unlabeled)

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over the weights of an earlier run that have a name and shape of this method's own.

        Methods with a teacher override it to let the teacher begin there too.

        Returns:
            The names that were taken over.
        """
        own = self.state_dict()
        taken = [n for n, w in weights.items() if n in own and own[n].shape == w.shape]
        self.load_state_dict({name: weights[name] for name in taken}, strict=False)
        return taken

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> Loss:
        """The loss of one batch at optimizer step `step` (0 is the first)."""

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities: (B, C, X, Y, Z) of any size -> (B, K, X, Y, Z)."""

    def opinions(self, images: Tensor) -> list[Tensor]:
        """What each of the networks or decoders of a finished model says, as `predict` does.

        Where they differ, a person should look. Methods whose model has several override it.
        """
        return [self.predict(images)]

    def before_step(self, step: int) -> None:
        """Inner optimization of the method's own, ahead of `loss`; most methods have none."""

    def after_step(self, step: int) -> None:
        """Updates outside backpropagation, once the optimizer has stepped."""


class Ema(nn.Module):
    """A copy of a network that follows it: w <- a w + (1 - a) w_student, a = min(1 - 1/(t+1), decay).

    With `buffers`, the running statistics of batch normalization are averaged too; else the copy's
    own are left as they are.
    """

    def __init__(self, student: nn.Module, decay: float, buffers: bool = False) -> None:
        super().__init__()
        self.decay = decay
        self.buffers_too = buffers
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Ema:
        """With averaged `buffers` the copy always predicts as in evaluation."""
        return super().train(mode and not self.buffers_too)

    def copy_from(self, student: nn.Module) -> None:
        """Begin anew as an exact copy."""
        self.network.load_state_dict(student.state_dict())

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """One step of the average; `step` counts from 0, and the first makes an exact copy."""
        keep = min(1 - 1 / (step + 1), self.decay)
        pairs = zip(self._followed(self.network), self._followed(student), strict=True)
        let_follow(list(pairs), 1 - keep)

    def _followed(self, network: nn.Module) -> list[Tensor]:
        return [*network.parameters(), *(network.buffers() if self.buffers_too else ())]

    @torch.no_grad()
    def forward(self, images: Tensor):  # noqa: ANN201  (whatever the network returns)
        """The copy's output, without gradient."""
        return self.network(images)


@torch.no_grad()
def let_follow(pairs: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
    """Let m <- (1 - s) m + s w for each pair (m, w), in one call on a GPU; whole numbers are copied."""
    floating = [(m, w) for m, w in pairs if m.is_floating_point()]
    if floating:
        torch._foreach_lerp_([m for m, _ in floating], [w for _, w in floating], share)
    for m, w in pairs:
        if not m.is_floating_point():
            m.copy_(w)
