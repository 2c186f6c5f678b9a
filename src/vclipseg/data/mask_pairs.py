"""Two folders of masks of the same scans, matched by name: volumes, or DICOM objects.

Two volumes must lie on one grid; whoever compares them sees to that. A DICOM object has none: it is read on
the grid of the volume on the other side; two objects on that of their series, where it lies nearby; two
segmentations without it on their own frames. Nothing is resampled.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vclipseg.data.cases import named_labels
from vclipseg.data.datasets import Case, Dataset
from vclipseg.data.dicom_labels import (
    frame_grid,
    is_object,
    read_on_grid,
    referenced_series,
    unnamed,
)
from vclipseg.data.dicom_tree import scan_tree
from vclipseg.data.volume import Header, Volume, read_header
from vclipseg.errors import DataError, UsageError

_FEW_SLICES = 3  # whose distances say nothing


def open_masks(
    folder: Path, class_names: Sequence[str], label_values: Sequence[int] | None = None
) -> Dataset:
    """A folder of masks as a data set whose cases are named as its files.

    Args:
        folder: Masks of any readable format; DICOM objects as files, or in a folder each.
        class_names: By class index, background first.
        label_values: What volumes store for each class; None where that is its index.

    Raises:
        UsageError: The folder is missing or holds no masks.
        DataError: Nothing in its DICOM objects is called as a class.
    """
    named = sorted(named_labels(folder), key=lambda one: one[1])
    cases = tuple(Case(name, (), path, "test", "") for name, path in named)
    if not cases:
        state = "holds no masks" if folder.is_dir() else "is no folder"
        raise UsageError(
            f"{folder}: {state}. Give a folder of .nii.gz, .nrrd or .mha files, or of DICOM segmentations."
        )
    _require_names([path for _, path in named], class_names)
    values = tuple(label_values or range(len(class_names)))
    return Dataset(folder, "folders", folder.name, (), tuple(class_names), values, cases)


def _require_names(files: Sequence[Path], class_names: Sequence[str]) -> None:
    """Refuse classes that no object names, where objects have other names: they are called otherwise."""
    if not all(map(is_object, files)):
        return
    missing, others = unnamed(files, class_names)
    if missing and others:
        raise DataError(
            f"{files[0].parent}: no segment is called {', '.join(missing)}; others are called "
            f"{', '.join(others)}. Name the classes as the segments are (class_names)."
        )


@dataclass(frozen=True)
class MaskPairs:
    """References and predictions, read two by two.

    Raises:
        DataError: A reference has no prediction, or a name stands for two masks.
    """

    references: Dataset
    predictions: Dataset

    def __post_init__(self) -> None:
        _require_predictions(self.references, self.predictions)
        for dataset in (self.references, self.predictions):
            _require_one_each(dataset, self.case_ids)

    @property
    def case_ids(self) -> list[str]:
        """The references' names, in order of their files."""
        return [case.case_id for case in self.references.cases]

    def read(self, case_id: str) -> tuple[Volume, Volume]:
        """Reference and prediction of a case: class indices uint8 `(X, Y, Z)`.

        Raises:
            DataError: One cannot be read, or there is no grid to read a DICOM object on.
        """
        sides = self.references, self.predictions
        reference, prediction = (side.case(case_id).label or Path() for side in sides)
        objects = [is_object(file) for file in (reference, prediction)]
        grid = None
        if all(objects):
            grid = self._grid(reference, prediction)
        elif any(objects):
            grid = read_header(prediction if objects[0] else reference)
        first, second = (_read(side, side.case(case_id), grid) for side in sides)
        return first, second

    def _grid(self, reference: Path, prediction: Path) -> Header:
        """The grid of the series of two objects, else that of their frames."""
        found = (self._series.get(referenced_series(file)) for file in (reference, prediction))
        series = next((path for path in found if path), None)
        grid = read_header(series) if series else frame_grid(reference, prediction)
        if grid is None:
            places = " or ".join(map(str, self._nearby))
            raise DataError(
                f"{reference}: contours have no grid of their own, so that two masks of which one is an "
                f"RTSTRUCT need their series, and it is not in {places}. Put the folder of the series "
                f"there, or make {prediction} a volume (.nii.gz) on the grid of the series."
            )
        return grid

    @cached_property
    def _series(self) -> dict[str, Path]:
        """UID and path of every series nearby."""
        trees = (scan_tree(folder) for folder in self._nearby)
        return {series.file.series: series.path for tree in trees for series in tree.series}

    @cached_property
    def _nearby(self) -> list[Path]:
        """Where series may lie: beside the masks, and in imagesTs beside labelsTs."""
        roots = [self.references.root, self.predictions.root]
        images = [root.with_name(root.name.replace("labels", "images", 1)) for root in roots]
        return [folder for folder in dict.fromkeys([*roots, *images]) if folder.is_dir()]


def _read(dataset: Dataset, case: Case, grid: Header | None) -> Volume:
    if case.label is None or grid is None or not is_object(case.label):
        return dataset.labels(case)
    labels = read_on_grid(case.label, grid, dataset.class_names)
    _require_every_slice(labels, case.label)
    return labels


def _require_every_slice(labels: Volume, path: Path) -> None:
    """Refuse a mask with regular gaps: slices between would count as background, and are unknown."""
    for axis in range(3):
        inside = labels.array.any(axis=tuple(other for other in range(3) if other != axis))
        steps = np.diff(np.flatnonzero(inside))
        if len(steps) >= _FEW_SLICES and (step := np.gcd.reduce(steps)) > 1:
            raise DataError(
                f"{path}: is on one slice in {step} of its grid only. Either the other mask has finer slices "
                "than the series, or some were not segmented. Give masks of all slices, on one grid."
            )


def _require_predictions(expected: Dataset, found: Dataset) -> None:
    there = [case.case_id for case in found.cases]
    missing = [case.case_id for case in expected.cases if case.case_id not in set(there)]
    if not missing:
        return
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    near = difflib.get_close_matches(missing[0], there, n=1, cutoff=0)
    raise DataError(
        f"{found.root}: no prediction for case {missing[0]}{more} of {len(expected.cases)} "
        f"references. A prediction has the name of its reference; the nearest here is {near[0]}."
    )


def _require_one_each(masks: Dataset, case_ids: Sequence[str]) -> None:
    counts = Counter(case.case_id for case in masks.cases)
    for case_id in case_ids:
        if counts[case_id] > 1:
            files = [c.label.name for c in masks.cases if c.label and c.case_id == case_id]
            raise DataError(
                f"{masks.root}: {', '.join(files)} are all masks of case {case_id}. Keep one of them."
            )
