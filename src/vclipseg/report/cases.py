"""Which cases a report shows, and their voxels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.data.volume import Volume, read_labels, reorient
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
        notes.append("The run does not say where its data is; give the folder to see the images.")
        return None
    why = f"The data cannot be read from {root}, so images and references are not shown"
    return attempt(notes, why, lambda: _opened(root, runs[0]))


def load_case(
    title: str, case_id: str, runs: Sequence[Run], dataset: Dataset | None, notes: list[str]
) -> ShownCase | None:
    """What can be read of one case; None when there is nothing of it to draw."""
    image = reference = None
    if dataset:
        data = dataset
        why = f"{case_id}: no image"
        image = attempt(notes, why, lambda: reorient(data.image(data.case(case_id)), "RAS"))
        why = f"{case_id}: no reference"
        reference = attempt(notes, why, lambda: reorient(data.labels(data.case(case_id)), "RAS"))
    predictions: dict[int, Volume] = {}
    for index, run in enumerate(runs):
        path = run.prediction(case_id)
        why = f"{case_id}: no prediction of {run.name}"
        if not path.is_file():
            notes.append(f"{why}: {path} is not there")
            continue
        found = attempt(notes, why, lambda path=path: reorient(read_labels(path), "RAS"))
        if found:
            predictions[index] = found
    volumes = [volume for volume in (image, reference, *predictions.values()) if volume]
    if not volumes or not (reference or predictions):
        return None
    grid = volumes[0]
    for index in [i for i, volume in predictions.items() if volume.shape != grid.shape]:
        shapes = f"{predictions.pop(index).shape} against {grid.shape} voxels"
        notes.append(
            f"{case_id}: the prediction of {runs[index].name} is on another grid: {shapes}"
        )
    return ShownCase(
        title=title,
        case_id=case_id,
        spacing=grid.spacing,
        affine=grid.affine,
        image=image.array[0] if image else None,
        reference=reference.array if reference else None,
        predictions={index: volume.array for index, volume in predictions.items()},
    )


def attempt(notes: list[str], why: str, read: Callable[[], T]) -> T | None:
    """`read()`, or None and a note: a report is made of what is left, whatever is damaged."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{why}: {error or type(error).__name__}.")
        return None


def _opened(root: Path, run: Run) -> Dataset:
    if not root.exists():
        raise FileNotFoundError(f"{root} is not there; give the data folder to see them")
    told = run.setting("settings", "data") or {}
    return open_dataset(
        root, class_names=told.get("class_names"), label_values=told.get("label_values")
    )
