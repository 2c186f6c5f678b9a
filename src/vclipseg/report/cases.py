"""Which cases a report shows, and their voxels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.data.volume import Volume, read_labels, reorient
from vclipseg.errors import UsageError
from vclipseg.report.reading import Run

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ShownCase:
    """One case, every array on one grid with RAS axes.

    Attributes:
        title: why it is shown: "best", "median", "worst".
        spacing: mm.
        affine: (4, 4), voxel -> RAS+ mm.
        image: (X, Y, Z) first channel, or None where the data is out of reach.
        reference: (X, Y, Z) class indices, or None.
        predictions: run index -> (X, Y, Z) class indices.
    """

    title: str
    case_id: str
    spacing: tuple[float, float, float]
    affine: np.ndarray
    image: np.ndarray | None
    reference: np.ndarray | None
    predictions: dict[int, np.ndarray]


def choose_cases(run: Run) -> list[tuple[str, str]]:
    """("best" | "median" | "worst", case_id) by mean Dice; an unscored run's first predictions."""
    dice = {case: value for case, value in run.per_case("dice").items() if math.isfinite(value)}
    ranked = sorted(dice, key=lambda case: (-dice[case], case))
    if not ranked:
        found = sorted((run.folder / "predictions").glob("*.nii.gz"))[:3]
        return [("not evaluated", path.name.removesuffix(".nii.gz")) for path in found]
    if len(ranked) < 3:
        return list(zip(("best", "worst") if len(ranked) == 2 else ("only",), ranked, strict=True))
    return [("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])]


def open_data(runs: Sequence[Run], data_root: Path | None, notes: list[str]) -> Dataset | None:
    """The data set of the first run, or None and a note of why not."""
    recorded = runs[0].setting("data", "root")
    root = Path(data_root or recorded) if data_root or recorded else None
    if root is None:
        notes.append("The run does not say where its data is, so images are not shown.")
        return None
    return attempt(notes, "Images and references are not shown", lambda: _opened(root, runs[0]))


def load_case(
    title: str, case_id: str, runs: Sequence[Run], dataset: Dataset | None, notes: list[str]
) -> ShownCase | None:
    """What can be read of one case; None when there is nothing of it to outline."""
    found: dict[str | int, Volume] = {}
    for key, what, read in _sources(case_id, runs, dataset):
        volume = attempt(notes, f"{case_id}: no {what}", partial(_turned, read))
        if volume is None:
            continue
        grid = next(iter(found.values()), volume)
        if volume.shape != grid.shape:
            shapes = f"{_times(volume.shape)} voxels instead of {_times(grid.shape)}"
            notes.append(f"{case_id}: the {what} is on another grid, {shapes}.")
        else:
            found[key] = volume
    image, reference = found.pop("image", None), found.get("reference")
    if not found:
        return None
    grid = next(iter(found.values()))
    return ShownCase(
        title=title,
        case_id=case_id,
        spacing=grid.spacing,
        affine=grid.affine,
        image=image.array[0] if image else None,
        reference=reference.array if reference else None,
        predictions={key: mask.array for key, mask in found.items() if isinstance(key, int)},
    )


def _sources(
    case_id: str, runs: Sequence[Run], dataset: Dataset | None
) -> Iterator[tuple[str | int, str, Callable[[], Volume]]]:
    """(key, what it is, how to read it) of every volume of a case."""
    if dataset:
        yield "image", "image", lambda: dataset.image(dataset.case(case_id))
        yield "reference", "reference", lambda: dataset.labels(dataset.case(case_id))
    for index, run in enumerate(runs):
        path = run.prediction(case_id)
        yield index, f"prediction of {run.name}", partial(read_labels, path)


def _turned(read: Callable[[], Volume]) -> Volume:
    return reorient(read(), "RAS")


def attempt(notes: list[str], why: str, read: Callable[[], T]) -> T | None:
    """`read()`, or None and a note: a report is made of what is left, whatever is damaged."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{why}: {str(error) or type(error).__name__}")
        return None


def _opened(root: Path, run: Run) -> Dataset:
    if not root.exists():
        raise UsageError(f"{root} is not there; say where it is now with --data FOLDER")
    return open_dataset(root, classes=run.classes)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
