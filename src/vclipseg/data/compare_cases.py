"""What can be wrong between the cases of a data set, seen from a few numbers of each case."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from vclipseg.data.check_case import CaseFacts
from vclipseg.data.datasets import Dataset
from vclipseg.data.findings import ClassSummary, Problem, Summary
from vclipseg.data.grids import has_geometry, orientation
from vclipseg.data.volume import Header

MIN_CASES = 5
"""With fewer cases nothing can be said to be unusual."""
MAX_OUTLIERS = 0.1
"""Where more cases than this share are unusual, the data set is diverse: one warning says so."""
SIGMAS = 6.0
"""An outlier is this many robust standard deviations off the median, and beyond a floor."""
SPACING_FLOOR = np.log(1.5)
"""A voxel is unusual if it is 1.5 times as long or short as the median at least."""
SCALE_FLOOR = np.log(4.0)
"""An image is unusual if its intensities spread 4 times as far as the median at least."""
LEVEL_FLOOR = 1.0
"""... or if its middle intensity is off by the median spread at least."""
DIVERSE_SCALES = 10.0
"""Intensities are on no common scale if the spreads of the middle 80% differ so many times."""

Check = Callable[[Dataset, Sequence[CaseFacts]], Iterator[Problem]]


def compare_cases(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    """All problems that show only when cases are put side by side."""
    checks: tuple[Check, ...] = (
        _labels_of_use,
        _shared_subjects,
        _duplicates,
        _orientations,
        _missing_spacing,
        _spacing_outliers,
        _intensity_outliers,
    )
    for check in checks:
        yield from check(dataset, facts)


def summarize(dataset: Dataset, facts: Sequence[CaseFacts]) -> Summary:
    """The data set in numbers; files that cannot be read are left out of sizes and volumes."""
    headers = [f.header for f in facts if f.header]
    shapes = np.array([_along_world(h, h.shape) for h in headers])
    spacings = np.array([_along_world(h, h.spacing) for h in headers])
    return Summary(
        name=dataset.name,
        layout=dataset.layout,
        labeled=len(dataset.labeled),
        unlabeled=len(dataset.unlabeled),
        test=len(dataset.test),
        channels=dataset.channel_names,
        orientations=dict(Counter(map(orientation, headers)).most_common()),
        spacing_mm=_span(spacings, float),
        shape=_span(shapes, int),
        classes=tuple(_class_summaries(dataset, facts)),
    )


def _span(rows: np.ndarray, number: Callable[[float], Any]) -> dict[str, tuple[Any, ...]]:
    if not len(rows):
        return {}
    least, median, most = np.percentile(rows, (0, 50, 100), axis=0)
    spans = {"min": least, "median": median, "max": most}
    return {name: tuple(number(v) for v in values) for name, values in spans.items()}


def _class_summaries(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[ClassSummary]:
    volumes = [f.volumes_ml for f in facts if f.case.split == "train" and f.volumes_ml]
    foreground = zip(dataset.class_names[1:], dataset.label_values[1:], strict=True)
    for name, value in foreground:
        ml = [v[value] for v in volumes if value in v]
        smallest, median, largest = np.percentile(ml, (0, 50, 100)).tolist() if ml else (0, 0, 0)
        yield ClassSummary(name, len(ml), smallest, median, largest)


# ---- labels and splits -----------------------------------------------------------------


def _labels_of_use(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    """There are labeled cases, and every class is in one of them."""
    if not dataset.labeled:
        message = "no training case has a label file. Annotate at least one case."
        yield Problem("no-labeled-case", "", None, message)
        return
    for summary in _class_summaries(dataset, facts):
        if not summary.cases:
            message = (
                f"the class {summary.name} is in none of the {len(dataset.labeled)} labeled "
                "cases, so that it cannot be learned. Annotate it, or remove it from the classes."
            )
            yield Problem("class-absent", "", None, message)


def _shared_subjects(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    train = {case.subject: case for case in dataset.train}
    for case in dataset.test:
        if other := train.get(case.subject):
            message = (
                f"subject {case.subject} is in training too (case {other.case_id}), so that test "
                "results would be too good. Put all cases of a subject on one side."
            )
            yield Problem("subject-in-train-and-test", case.case_id, case.images[0], message)


def _duplicates(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    """Images with the same voxels, however they are stored; a test case is the worse copy."""
    groups: dict[str, list[CaseFacts]] = defaultdict(list)
    for fact in facts:
        if fact.fingerprint:
            groups[fact.fingerprint].append(fact)
    for first, *copies in groups.values():  # training cases come first
        for copy in copies:
            yield _duplicate(first, copy)


def _duplicate(first: CaseFacts, copy: CaseFacts) -> Problem:
    case, other = copy.case, first.case
    same = f"the image has the same voxels as that of case {other.case_id}"
    if case.split != other.split:
        message = f"{same}, a training case. Take one of the two away, or test results lie."
        return Problem("duplicate-across-splits", case.case_id, case.images[0], message)
    message = f"{same}. Take one of the two away, or it counts twice."
    if first.volumes_ml and copy.volumes_ml and first.volumes_ml != copy.volumes_ml:
        message = f"{same}, their labels differ. Keep the better label of the two."
    return Problem(f"duplicate-in-{case.split}", case.case_id, case.images[0], message, "warning")


# ---- geometry --------------------------------------------------------------------------


def _orientations(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    readable = [(f.case, orientation(f.header)) for f in facts if f.header]
    counts = Counter(axes for _, axes in readable).most_common()
    if len(counts) < 2:
        return
    usual, number = counts[0]
    for case, axes in readable:
        if axes != usual:
            message = (
                f"the axes are {axes}, those of {number} of {len(readable)} cases {usual}. All are "
                "turned alike before training; look whether the header tells the truth."
            )
            yield Problem("orientation-differs", case.case_id, case.images[0], message, "warning")


def _missing_spacing(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    """One warning for all images whose affine is what a file without geometry gets."""
    missing = [f.case for f in facts if f.header and not has_geometry(f.header)]
    if missing:
        message = (
            f"{len(missing)} of {len(facts)} images have voxels of exactly 1 mm and no position, "
            "as files without geometry do. If theirs got lost, distances in mm mean nothing."
        )
        yield Problem("spacing-missing", "", missing[0].images[0], message, "warning")


def _spacing_outliers(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    readable = [(f.case, f.header) for f in facts if f.header]
    if len(readable) < MIN_CASES:
        return
    spacing = np.array([_along_world(h, h.spacing) for _, h in readable])  # (N, 3) mm
    unusual = np.any(_outliers(np.log(spacing), SPACING_FLOOR), axis=1)
    if _is_diverse(unusual):
        low, high = _triple(spacing.min(axis=0)), _triple(spacing.max(axis=0))
        message = (
            f"the voxels of {unusual.sum()} of {len(readable)} cases differ much from the others "
            f"(from {low} to {high} mm). Check that these cases belong together."
        )
        yield Problem("spacing-diverse", "", None, message, "warning")
        return
    usual = _triple(np.median(spacing, axis=0))
    for (case, _), mm, odd in zip(readable, spacing, unusual, strict=True):
        if odd:
            message = (
                f"voxels of {_triple(mm)} mm (R, A, S), where {usual} mm is usual. "
                "Check the header, or leave the case out."
            )
            yield Problem("spacing-outlier", case.case_id, case.images[0], message, "warning")


# ---- intensities -----------------------------------------------------------------------


def _intensity_outliers(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Problem]:
    usable = [f for f in facts if len(f.ranges) == len(dataset.channel_names)]
    for index, name in enumerate(dataset.channel_names):
        ranges = np.array([f.ranges[index] for f in usable])  # (N, 3): low, median, high
        if len(usable) >= MIN_CASES:
            yield from _channel_outliers(name, usable, ranges)


def _channel_outliers(
    name: str, facts: Sequence[CaseFacts], ranges: np.ndarray
) -> Iterator[Problem]:
    """Problems of one channel, given percentiles 1, 50 and 99 of each case, `(N, 3)`."""
    low, level, high = ranges.T
    spread = np.maximum(high - low, np.finfo(np.float32).tiny)
    floor = LEVEL_FLOOR * float(np.median(spread))
    unusual = _outliers(np.log(spread), SCALE_FLOOR) | _outliers(level, floor)
    tenth, ninetieth = np.percentile(spread[~unusual], (10, 90))
    if _is_diverse(unusual) or ninetieth > DIVERSE_SCALES * tenth:
        yield _no_common_scale(name, ranges[np.argsort(spread)])
        return
    typical = np.median(ranges, axis=0)
    for fact, own, odd in zip(facts, ranges, unusual, strict=True):
        if odd:
            message = (
                f"most voxels of channel {name} are from {own[0]:.4g} to {own[2]:.4g}, where "
                f"{typical[0]:.4g} to {typical[2]:.4g} is usual. Check units and content."
            )
            case = fact.case
            yield Problem("intensity-outlier", case.case_id, case.images[0], message, "warning")


def _no_common_scale(name: str, ranges: np.ndarray) -> Problem:
    """One warning for a channel, given the percentiles of the cases from narrow to wide."""
    tenth = len(ranges) // 10
    narrow, wide = (f"{r[0]:.3g} to {r[2]:.3g}" for r in (ranges[tenth], ranges[-1 - tenth]))
    message = (
        f"the intensities of channel {name} are on no common scale: most voxels are from {narrow} "
        f"in one image, from {wide} in another. Normalize each image by itself (zscore); a fixed "
        "window would not do."
    )
    return Problem("intensity-diverse", "", None, message, "warning")


# ---- robust statistics -----------------------------------------------------------------


def _outliers(values: np.ndarray, floor: float) -> np.ndarray:
    """Which values `(N, ...)` are far off the median, by the median absolute deviation.

    The floor is the distance below which nothing is unusual, however alike the others are.
    """
    if len(values) < MIN_CASES:
        return np.zeros(values.shape, dtype=bool)
    distance = np.abs(values - np.median(values, axis=0))
    sigma = 1.4826 * np.median(distance, axis=0)  # of normally distributed values
    return distance > np.maximum(SIGMAS * sigma, floor)


def _is_diverse(unusual: np.ndarray) -> bool:
    """Whether so many cases `(N,)` are unusual that there is no usual."""
    return int(unusual.sum()) > max(1, MAX_OUTLIERS * len(unusual))


def _along_world(header: Header, values: Sequence[float]) -> tuple[float, ...]:
    """Values of the three array axes in the order R, A, S of the world."""
    axes = nib.orientations.io_orientation(header.affine)[:, 0].astype(int)
    ordered = [0.0] * 3
    for value, axis in zip(values, axes, strict=True):
        ordered[axis] = value
    return tuple(ordered)


def _triple(values: Iterable[float]) -> str:
    return " x ".join(f"{v:.3g}" for v in values)
