"""Toy problems: noisy balls, small networks, few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vclipseg.data.batch import Batch
from vclipseg.methods import METHODS, method_class, presets
from vclipseg.methods.base import Loss, Method, Task
from vclipseg.training import TrainSettings, TrainState, make_machine, start, train

NAMES = ("background", "organ", "vessel", "bone")
LATE = 10**6  # a step after every ramp
RECIPES = [(name, preset) for name in METHODS for preset in presets(name)]
RECIPES_IN_TIME = [
    pytest.param(*recipe, id="-".join(recipe), marks=() if "robust" in recipe else pytest.mark.slow)
    for recipe in RECIPES
]
"""For tests that take long over all recipes: of the fast ones are those with the common settings."""

TINY = (
    "train.steps=4",
    "train.patch=[16, 16, 16]",
    "train.precision=fp32",
    "train.threads=1",
    "train.tensorboard=false",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.statistics_batches=2",
    "method.filters=2",
    "text.source=orthogonal",
    "text.dim=8",
    "predict.precision=fp32",
)
"""Overrides that make a run of a second."""


def text_vectors(num_classes: int = 2, dim: int = 8) -> Tensor:
    """Orthogonal vectors (K, E)."""
    return 3 * torch.eye(num_classes, dim)


def build(
    name: str = "vclipseg",
    preset: str = "robust",
    *,
    num_classes: int = 2,
    channels: int = 1,
    steps: int = 100,
    seed: int = 0,
    **settings: Any,
) -> Method:
    """A small method, in training mode."""
    torch.manual_seed(seed)
    cls = method_class(name)
    values = {"filters": 4, **presets(name)[preset]["method"], **settings}
    task = Task(channels, NAMES[:num_classes], steps, text_vectors(num_classes))
    return cls(cls.Settings.model_validate(values), task)


@torch.no_grad()
def make_sure(method: Method, factor: float = 30.0) -> None:
    """Let untrained networks be as sure as trained ones, so that thresholds let voxels through."""
    for name, module in method.named_modules():
        if name.endswith(".head") and isinstance(module, torch.nn.Conv3d):
            module.weight.mul_(factor)


def balls(
    generator: torch.Generator, size: Sequence[int], num_classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Image (1, X, Y, Z) of one noisy ball a class, the brighter the higher, and labels (X, Y, Z)."""
    labels = torch.zeros(tuple(size), dtype=torch.int64)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    shape = torch.tensor(size).view(3, 1, 1, 1)
    for k in range(1, num_classes):
        center = shape * (0.3 + 0.4 * torch.rand(3, 1, 1, 1, generator=generator))
        radius = min(size) * (0.2 + 0.1 * torch.rand((), generator=generator))
        labels[(grid - center).square().sum(0) < radius**2] = k
    noise = torch.randn(labels.shape, generator=generator)
    return (labels + 0.3 * noise)[None], labels


def make_batch(
    seed: int = 0,
    size: int | Sequence[int] = 16,
    *,
    patches: tuple[int, int] = (2, 2),
    num_classes: int = 2,
    channels: int = 1,
    empty: bool = False,
) -> Batch:
    """A batch of balls; `empty` ones have noise for images and background for labels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (size,) * 3 if isinstance(size, int) else size
    made = [balls(generator, sizes, 1 if empty else num_classes) for _ in range(sum(patches))]
    images = torch.stack([image.expand(channels, *sizes) for image, _ in made])
    labels = torch.stack([labels for _, labels in made[: patches[0]]])
    return Batch(images.contiguous(), labels, generator=torch.Generator().manual_seed(seed))


def batch_for(
    method: Method, seed: int = 0, size: int | Sequence[int] = 16, step: int = LATE, **kind: Any
) -> Batch:
    """A batch with as many patches as the method asks for at that step."""
    return make_batch(seed, size, patches=method.patches_at(step), **kind)


def fast(**settings: Any) -> TrainSettings:
    """Settings of a short run in full precision."""
    return TrainSettings.model_validate(
        {"precision": "fp32", "lr": 0.01, "statistics_batches": 2, **settings}
    )


def fit(
    method: Method,
    settings: TrainSettings,
    batch_at: Callable[[int], Batch] | None = None,
    on_step: Callable[[TrainState, Loss], None] = lambda state, loss: None,
    state: TrainState | None = None,
) -> TrainState:
    """Train on balls, a new batch each step, and give the state back."""
    machine = make_machine(settings)
    state = state or start(method, settings, machine)
    train(
        state,
        batch_at or (lambda step: batch_for(method, step, step=step)),
        settings,
        machine,
        on_step,
    )
    return state


def foreground_dice(probs: Tensor, labels: Tensor) -> float:
    """Dice of everything that is not background."""
    mask, reference = probs.argmax(1) > 0, labels > 0
    return float(2 * (mask & reference).sum() / (mask.sum() + reference.sum()))
