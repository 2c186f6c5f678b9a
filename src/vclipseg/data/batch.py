"""What a training step sees, and the sampler that draws it.

Every batch is a function of (seed, step) alone: the same seed gives the same batches, and a resumed
run goes on with the batch that an unbroken one would have seen. Where several processes train together,
each takes its own rows of a joint batch that is such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vclipseg.data.augment import AugmentSettings, change_intensity, draw, place
from vclipseg.data.ignored import IGNORED
from vclipseg.data.resident import Resident
from vclipseg.ranks import own_seed

IGNORE = -1
"""Label of a voxel without a label."""


@dataclass(frozen=True)
class Batch:
    """One training batch, labeled cases first.

    The labels of unlabeled cases are not here, even where the data set has them, so that no method
    can read them by mistake.
    """

    images: Tensor  # (B, C, X, Y, Z) float
    labels: Tensor  # (L, X, Y, Z) int64, 0 is background, IGNORE unknown
    plain_images: Tensor | None = None
    """The same patches before their intensity was changed: what a teacher looks at."""
    case_ids: tuple[str, ...] = ()  # B of them
    generator: torch.Generator | None = None
    """Source of a method's own random draws; seeded by the step, so a resumed run draws the same."""
    joint_generator: torch.Generator | None = None
    """The same on all ranks, where there are several."""

    @property
    def common(self) -> torch.Generator | None:
        """Source of what is drawn once for the whole batch, the patches of other ranks included."""
        return self.joint_generator or self.generator

    @property
    def num_labeled(self) -> int:
        """L."""
        return len(self.labels)

    @property
    def labeled_images(self) -> Tensor:
        """(L, C, X, Y, Z)."""
        return self.images[: self.num_labeled]

    @property
    def unlabeled_images(self) -> Tensor:
        """(U, C, X, Y, Z)."""
        return self.images[self.num_labeled :]

    @property
    def plain(self) -> Tensor:
        """`plain_images`, or `images` where there are none."""
        return self.images if self.plain_images is None else self.plain_images

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split anything with B rows into its labeled and its unlabeled rows."""
        return x[: self.num_labeled], x[self.num_labeled :]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        plain = self.plain_images
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            plain_images=None if plain is None else plain.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PatchSampler:
    """Endless batches of augmented patches, as many labeled and unlabeled ones as a step asks for.

    Cases come in random order, each once before any comes again, the labeled and the unlabeled
    stream apart. `labels` is asked for labeled cases only.

    N ranks have a joint batch of N L labeled and N U unlabeled patches, that of one process with as many.
    Rank r takes rows r, r + N, r + 2N, ... of each: what is paired half with half, or labeled with
    unlabeled, is paired alike in the joint batch.
    """

    image: Callable[[str], np.ndarray]  # case_id -> (C, X, Y, Z)
    labels: Callable[[str], np.ndarray]  # case_id -> (X, Y, Z)
    labeled: Sequence[str]
    unlabeled: Sequence[str]
    patch: tuple[int, int, int]
    patches: Callable[[int], tuple[int, int]]  # step -> (L, U)
    augment: AugmentSettings
    seed: int
    rank: int = 0  # of `ranks` processes
    ranks: int = 1
    resident: Resident | None = None  # cuts on its device; else in memory
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm a voxel

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`."""
        num_labeled, num_unlabeled = (count * self.ranks for count in self.patches(step))
        joint = [
            *self._stream(self.labeled, num_labeled, step, stream=0),
            *self._stream(self.unlabeled, num_unlabeled, step, stream=1),
        ]
        slots = range(self.rank, len(joint), self.ranks)
        images, plain, labels = [], [], []
        for slot in slots:
            rng = np.random.default_rng((self.seed, 2, step, slot))
            case_id = joint[slot]
            image = self._volume(f"image {case_id}", partial(self.image, case_id))
            known = self.labels(case_id) if slot < num_labeled else None
            parameters = draw(self.augment, rng, image.shape[1:], self.patch, known, self.spacing)
            plain.append(place(parameters, image))
            images.append(change_intensity(parameters, plain[-1]))
            if known is not None:
                held = self._volume(f"labels {case_id}", partial(np.asarray, known))
                labels.append(place(parameters, held))
        known_labels = stack(labels).long()
        return Batch(
            stack(images),
            known_labels.masked_fill_(known_labels == IGNORED, IGNORE),
            stack(plain),
            tuple(joint[slot] for slot in slots),
            *self._generators(self.seed * 1_000_003 + step),
        )

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `first_step` to `steps` - 1."""
        return (self.batch(step) for step in range(first_step, steps))

    def _volume(self, name: str, read: Callable[[], np.ndarray]) -> Any:
        """A volume where it is cut: an array, or a tensor on the device that holds it."""
        if self.resident is None:
            return read()
        return self.resident(name, read)

    def _generators(self, seed: int) -> tuple[torch.Generator, torch.Generator]:
        """The rank's own, and the one that is alike on all; with one rank they are the same."""
        common = torch.Generator().manual_seed(seed)
        if self.ranks == 1:
            return common, common
        return torch.Generator().manual_seed(own_seed(seed, self.rank)), common

    def _stream(self, cases: Sequence[str], count: int, step: int, stream: int) -> list[str]:
        """The next `count` entries of an endless row of shuffles of `cases`."""
        if count and not cases:
            raise ValueError("a method that asks for unlabeled patches needs unlabeled cases")
        chosen = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(cases))
            order = np.random.default_rng((self.seed, stream, epoch)).permutation(len(cases))
            chosen.append(cases[order[index]])
        return chosen


def stack(patches: Sequence[Any]) -> Tensor:
    """Patches of one size, arrays or tensors, one after the other along a new first axis."""
    return torch.stack([torch.as_tensor(patch) for patch in patches])


@contextmanager
def made_ahead(batch_at: Callable[[int], Batch], steps: int) -> Iterator[Callable[[int], Batch]]:
    """`batch_at`, with the batch of the next step made in a thread while a step runs.

    Args:
        batch_at: the batch of a step; called for one step at a time, never from `steps` on.
        steps: of the run.
    """
    waiting: dict[int, Future[Batch]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:

        def next_batch(step: int) -> Batch:
            batch = waiting.pop(step, None) or thread.submit(batch_at, step)
            waiting.clear()
            if step + 1 < steps:
                waiting[step + 1] = thread.submit(batch_at, step + 1)
            return batch.result()

        yield next_batch
