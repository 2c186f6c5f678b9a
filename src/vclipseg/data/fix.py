"""Mending a copy of a data set; the original is only read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vclipseg.data.cases import Case
from vclipseg.data.check_case import label_geometry
from vclipseg.data.datasets import Dataset
from vclipseg.data.findings import Findings, Problem
from vclipseg.data.formats import stored_files
from vclipseg.data.grids import fit_labels, orientation
from vclipseg.data.layouts import list_cases
from vclipseg.data.reviews import FOLDER as REVIEWS
from vclipseg.data.reviews import all_reviews
from vclipseg.data.volume import Volume, read_header, read_image, read_labels, reorient, write
from vclipseg.errors import DataError, UsageError

RECORD = "fixes.json"
"""File of the copy that says where it came from and what was mended."""
SPLITS = "splits.json"


def fix_copy(findings: Findings, target: str | Path) -> tuple[Problem, ...]:
    """Copy a data set and mend in the copy what can be mended without guessing.

    A label that differs from its image by rounding in the header gets the image's affine; one
    with its axes turned another way is turned; one on another grid that covers the image is
    resampled to it (nearest neighbour). A channel is turned, or gets the first channel's
    affine, likewise. NaN and infinite voxels become the smallest finite value of their
    channel, as that is background in most scans. All else is for a person to decide.

    What people decided about cases comes along. A reviewed mask that does not lie on its image is
    put there as a label would be, ignored voxels too.

    Files are copied, not linked: a later edit of the copy must not reach the original.

    Args:
        findings: What `check_dataset` found.
        target: A folder that does not exist yet, or is empty. It appears when it is complete.

    Returns:
        The problems that were mended, those of reviewed masks last.

    Raises:
        UsageError: The target is not empty or lies inside the data set, the data set uses files
            outside its folder, or a reviewed case would have another name in the copy.
        DataError: The cases could not be listed, a file has changed since the check, or a
            reviewed mask cannot be put onto its image without guessing.
    """
    target, dataset = Path(target).resolve(), findings.dataset
    if dataset is None:
        raise DataError(f"{findings.root}: cannot be copied before its errors are corrected.")
    files = _files(dataset)
    _check_target(dataset.root, target)
    mended = (*(p for p in findings.problems if p.fixable), *_off_grid_reviews(dataset))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        copy = Path(folder) / target.name
        for file in files:
            place = copy / file.relative_to(dataset.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
        moved = _moved(dataset, copy)
        _check_complete(moved, dataset.root)
        _mend_all(moved, mended, dataset.root, copy)
        _write_record(dataset.root, copy, mended)
        if target.exists():
            target.rmdir()
        os.replace(copy, target)
    return mended


def _check_target(root: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: exists already. Name a new folder for the mended copy.")
    if target.is_relative_to(root.resolve()):
        raise UsageError(
            f"{target}: lies inside the data set. Name a folder elsewhere for the mended copy."
        )


def _files(dataset: Dataset) -> list[Path]:
    """All files of the folder; of a data set listed in a CSV, that, what it names, and reviews of it.

    Raises:
        UsageError: A case has a file outside the folder, which a copy would not have.
    """
    own = {file for path in _case_files(dataset.cases) for file in stored_files(path)}
    for file in sorted(own):
        inside = file.is_relative_to(dataset.root)
        if not inside or ".." in file.relative_to(dataset.root).parts:
            raise UsageError(
                f"{file}: lies outside of {dataset.root}, so that a copy of the folder would "
                "lack it. Put all files of the data set into one folder."
            )
    if dataset.layout == "csv":
        listing = {dataset.root / f"{dataset.name}.csv", dataset.root / SPLITS}
        reviews = {f for c in dataset.cases for f in (dataset.root / REVIEWS / c.case_id).glob("*")}
        return sorted(own | {f for f in listing | reviews if f.is_file()})
    walked = os.walk(dataset.root, followlinks=True)
    return sorted(Path(folder) / name for folder, _, names in walked for name in names)


def _off_grid_reviews(dataset: Dataset) -> list[Problem]:
    """Reviewed masks, of any revision, that have to be put onto their image.

    Raises:
        DataError: One cannot be, or cannot be read.
    """
    problems: list[Problem] = []
    for case in dataset.cases:
        masks = [r.label for r in all_reviews(dataset.root, case.case_id) if r.label]
        if masks:
            image = read_header(case.images[0])
            for mask in masks:
                problems += label_geometry(case, mask, image, read_header(mask))
    for problem in problems:
        if not problem.fixable:
            raise DataError(
                f"{problem.file}: a reviewed mask that does not fit its image, so that a mended copy "
                f"would train on wrong labels: {problem.message} Or move the folder of case "
                f"{problem.case_id} out of {dataset.root / REVIEWS}, and review the case anew."
            )
    return problems


def _moved(dataset: Dataset, copy: Path) -> Dataset:
    """The same data set in another folder."""

    def move(file: Path) -> Path:
        return copy / file.relative_to(dataset.root)

    cases = tuple(
        replace(c, images=tuple(map(move, c.images)), label=move(c.label) if c.label else None)
        for c in dataset.cases
    )
    return replace(dataset, root=copy, cases=cases)


def _check_complete(copy: Dataset, root: Path) -> None:
    """Refuse a copy whose listing leads back to files of the original, or loses what was decided."""
    listed = list_cases(copy.root / f"{copy.name}.csv" if copy.layout == "csv" else copy.root)
    if _case_files(listed.cases) != _case_files(copy.cases):
        raise UsageError(
            f"{root}: names files by their absolute path, so that a copy would still use the "
            "original ones. Write all paths relative to the folder."
        )
    lost = {c.case_id for c in copy.cases if c.review} - {c.case_id for c in listed.cases}
    if lost:
        raise UsageError(
            f"{copy.root.name}: the case {min(lost)} is named as its folder, so that decisions about it "
            f"would be lost here. Name the copy {root.resolve().name}, in another place."
        )


def _case_files(cases: Sequence[Case]) -> set[Path]:
    return {p for c in cases for p in (*c.images, c.label) if p}


def _mend_all(dataset: Dataset, problems: Sequence[Problem], root: Path, copy: Path) -> None:
    """In any order: no mend moves a case's first image, which the others refer to."""
    for problem in problems:
        if problem.file:
            mend = MENDS[problem.code]
            mend(dataset.case(problem.case_id), copy / problem.file.relative_to(root))


def _fill(case: Case, file: Path) -> None:
    """Put the smallest finite value of a channel where it has none."""
    volume = read_image(file)
    array = volume.array.copy()
    for channel in array:
        finite = np.isfinite(channel)
        channel[~finite] = channel[finite].min()
    write(Volume(array, volume.affine), file)


def _snap(case: Case, file: Path) -> None:
    """Turn a channel's axes like those of the case's first one, and give it that one's affine."""
    first = read_header(case.images[0])
    channel = reorient(read_image(file), orientation(first))
    write(Volume(channel.array, first.affine), file)


def _fit(case: Case, file: Path) -> None:
    """Put a label onto the grid of its image."""
    write(fit_labels(read_labels(file), read_header(case.images[0])), file)


MENDS: dict[str, Callable[[Case, Path], None]] = {
    "nan-or-inf": _fill,
    "channel-geometry-differs": _snap,
    "label-geometry-differs": _fit,
    "label-orientation-differs": _fit,
    "label-shape-differs": _fit,
}
"""Code of a fixable problem -> what mends its file."""


def _write_record(root: Path, copy: Path, mended: Sequence[Problem]) -> None:
    fixes = [
        {"file": p.file.relative_to(root).as_posix(), "code": p.code, "found": p.message}
        for p in mended
        if p.file
    ]
    record = {"version": 1, "source": str(root.resolve()), "fixes": fixes}
    (copy / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
