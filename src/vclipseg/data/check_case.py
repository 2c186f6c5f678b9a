"""What can be wrong with one case; and the few numbers by which cases are compared."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vclipseg.data.cases import Case
from vclipseg.data.dicom import tilt
from vclipseg.data.dicom_headers import SeriesError
from vclipseg.data.dicom_labels import is_object, read_on_grid
from vclipseg.data.findings import Problem
from vclipseg.data.formats import is_series
from vclipseg.data.grids import (
    describe_difference,
    format_mm,
    has_geometry,
    header_of,
    orientation,
    overhang,
    same_grid,
    turned,
    turned_like,
)
from vclipseg.data.volume import (
    SNAP_VOXELS,
    WRITE_SUFFIXES,
    Header,
    Volume,
    corner_shift,
    image_suffix,
    read_image,
    read_labels,
    reorient,
)
from vclipseg.errors import DataError

Range = tuple[float, float, float]

_READER_CODES = {
    "3-D volume": "not-3d",
    "labels are one": "not-3d",
    "integers": "label-not-integer",
}
"""Words of the readers' errors -> code; any other error is `unreadable-file`."""


@dataclass(frozen=True)
class CaseFacts:
    """One case in numbers small enough to keep of every case.

    Attributes:
        header: Of the first image file; None if it cannot be read.
        fingerprint: Hash of the image's voxels, the same for every way to store them; None if
            it cannot be read or says nothing (all voxels equal).
        ranges: 1st, 50th and 99th percentile of each channel.
        volumes_ml: Label value -> volume; None without a readable label file.
    """

    case: Case
    problems: tuple[Problem, ...]
    header: Header | None
    fingerprint: str | None
    ranges: tuple[Range, ...]
    volumes_ml: dict[int, float] | None


@dataclass(frozen=True)
class _ImageFacts:
    header: Header
    fingerprint: str
    ranges: tuple[Range, ...]
    constant: bool


def inspect_case(
    case: Case, num_channels: int, label_values: Sequence[int], class_names: Sequence[str]
) -> CaseFacts:
    """Read the files of a case, each once, and list what is wrong with them."""
    problems: list[Problem] = []
    images = [_inspect_image(case, file, problems) for file in case.images]
    readable = [i for i in images if i]
    if len(readable) == len(images):
        problems += _channel_problems(case, readable, num_channels)
    header = images[0].header if images[0] else None
    if case.label and is_object(case.label):
        volumes = _inspect_object(case, header, label_values, class_names, problems)
    else:
        volumes = _inspect_label(case, header, label_values, problems)
    complete = len(readable) == len(images) and not all(i.constant for i in readable)
    return CaseFacts(
        case=case,
        problems=tuple(problems),
        header=header,
        fingerprint="-".join(i.fingerprint for i in readable) if complete else None,
        ranges=tuple(r for i in readable for r in i.ranges) if complete else (),
        volumes_ml=volumes,
    )


# ---- images ----------------------------------------------------------------------------


def _inspect_image(case: Case, file: Path, problems: list[Problem]) -> _ImageFacts | None:
    try:
        volume = read_image(file)
    except DataError as error:
        problems.append(_unreadable(case, file, error))
        return None
    if is_series(file) and (tilted := tilt(file)):
        problems.append(Problem("dicom-tilted", case.case_id, file, tilted, "warning"))
    finite = np.isfinite(volume.array)
    if bad := finite.size - int(np.count_nonzero(finite)):
        problems.append(_not_finite(case, file, volume, bad))
    low = volume.array.min(where=finite, initial=np.inf)
    high = volume.array.max(where=finite, initial=-np.inf)
    if low == high:
        message = f"every voxel of the image is {low:g}. Get a fresh copy, or leave the case out."
        problems.append(Problem("image-constant", case.case_id, file, message, "warning"))
    return _ImageFacts(
        header=header_of(volume),
        fingerprint=_fingerprint(volume),
        ranges=tuple(_range(channel) for channel in volume.array),
        constant=not low < high,
    )


def _not_finite(case: Case, file: Path, volume: Volume, bad: int) -> Problem:
    fixable = all(np.isfinite(c).any() for c in volume.array) and writable(file)
    advice = "A fix puts the image's smallest value there." if fixable else "Get a fresh copy."
    message = f"{bad} of {volume.array.size} voxels are NaN or infinite. {advice}"
    return Problem("nan-or-inf", case.case_id, file, message, fixable=fixable)


def _unreadable(case: Case, file: Path, error: DataError) -> Problem:
    text = str(error).removeprefix(f"{file}: ")
    if isinstance(error, SeriesError):
        return Problem(error.code, case.case_id, error.file or file, text)
    code = next((code for word, code in _READER_CODES.items() if word in text), "unreadable-file")
    if code == "not-3d" and error.__cause__:
        text = f"{error.__cause__}. Store a case as one 3-D volume, not slice by slice."
    return Problem(code, case.case_id, file, text)


def _fingerprint(volume: Volume) -> str:
    return hashlib.sha256(reorient(volume, "RAS").array.data).hexdigest()


def _range(channel: np.ndarray) -> Range:
    """Percentiles 1, 50 and 99 over the finite voxels of a regular sample of a channel."""
    x, y, z = (slice(None, None, max(1, n // 40)) for n in channel.shape)
    sample = channel[x, y, z]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return (0.0, 0.0, 0.0)
    low, median, high = np.percentile(sample, (1, 50, 99))
    return float(low), float(median), float(high)


def _channel_problems(
    case: Case, images: Sequence[_ImageFacts], num_channels: int
) -> Iterator[Problem]:
    """Too few or many channels, and channels that do not lie where the first one does."""
    found = sum(i.header.channels for i in images)
    if found != num_channels:
        message = (
            f"the image has {found} channels, the data set {num_channels}. "
            "Add or remove channel files; a series over time is not one image."
        )
        yield Problem("wrong-channels", case.case_id, case.images[0], message)
    first = images[0].header
    for file, image in zip(case.images[1:], images[1:], strict=True):
        if not same_grid(first, image.header):
            yield _channel_moved(case, file, first, image.header)


def _channel_moved(case: Case, file: Path, first: Header, header: Header) -> Problem:
    turned_channel = turned(header, orientation(first))
    mm, voxels = corner_shift(first, turned_channel)
    fixable = first.shape == turned_channel.shape and voxels < SNAP_VOXELS and writable(file)
    advice = (
        "A fix gives it the first channel's geometry, its axes turned alike."
        if fixable
        else "Resample it onto the first channel's grid."
    )
    message = f"{describe_difference('channel', header, 'the first channel', first, mm)}. {advice}"
    return Problem("channel-geometry-differs", case.case_id, file, message, fixable=fixable)


# ---- labels ----------------------------------------------------------------------------


def _inspect_label(
    case: Case, image: Header | None, label_values: Sequence[int], problems: list[Problem]
) -> dict[int, float] | None:
    """Volume in ml of each value in the label; None without a readable one."""
    if not (file := case.label):
        return None
    try:
        volume = read_labels(file)
    except DataError as error:
        problems.append(_unreadable(case, file, error))
        return None
    if image and is_series(case.images[0]):
        volume = turned_like(volume, image)
    if image:
        problems += label_geometry(case, file, image, header_of(volume))
    counts = _count_values(volume.array)
    problems += _label_values(case, file, counts, label_values)
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    return {value: voxels * voxel_ml for value, voxels in counts.items()}


def _inspect_object(
    case: Case,
    image: Header | None,
    label_values: Sequence[int],
    class_names: Sequence[str],
    problems: list[Problem],
) -> dict[int, float] | None:
    """As `_inspect_label`, of a DICOM object, which has no grid but its image's."""
    if not (file := case.label) or not image:
        return None
    try:
        labels = read_on_grid(file, image, class_names)
    except DataError as error:
        problems.append(_unreadable(case, file, error))
        return None
    counts = {label_values[k]: n for k, n in _count_values(labels.array).items()}
    problems += _label_values(case, file, counts, label_values)
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    return {value: voxels * voxel_ml for value, voxels in counts.items()}


def _count_values(array: np.ndarray) -> dict[int, int]:
    """Value -> voxels, plane by plane to need no memory beyond the array's own."""
    counts: Counter[int] = Counter()
    for plane in array:
        if plane.dtype == np.uint8:  # all but labels with exotic values; much faster
            voxels = np.bincount(plane.ravel(), minlength=256)
            values = np.flatnonzero(voxels)
            voxels = voxels[values]
        else:
            values, voxels = np.unique(plane, return_counts=True)
        counts.update(dict(zip(values.tolist(), voxels.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def _label_values(
    case: Case, file: Path, counts: dict[int, int], label_values: Sequence[int]
) -> Iterator[Problem]:
    if unknown := {v: n for v, n in counts.items() if v not in label_values}:
        found = ", ".join(f"{value} ({n} voxels)" for value, n in list(unknown.items())[:5])
        known = ", ".join(map(str, label_values))
        message = (
            f"the label holds values that are no class: {found}; the classes are {known}. "
            "Correct the label, or name these values in dataset.json."
        )
        yield Problem("label-value-unknown", case.case_id, file, message)
    if not counts.keys() - {label_values[0]}:
        message = (
            "the label has no voxel of any class. If nobody annotated the case, take the file "
            "away: the case then counts as unlabeled."
        )
        yield Problem("label-empty", case.case_id, file, message, "warning")


def label_geometry(case: Case, file: Path, image: Header, label: Header) -> Iterator[Problem]:
    """At most one problem: how the label's grid differs from the image's."""
    if same_grid(image, label):
        return
    turned_label = turned(label, orientation(image))
    mm, voxels = corner_shift(image, turned_label)
    if turned_label.shape != image.shape:
        code = "label-shape-differs"
        fixable, advice = _can_resample(image, label)
    elif voxels >= SNAP_VOXELS:
        code, fixable, advice = "label-geometry-differs", False, _which_header(label)
    elif orientation(label) != orientation(image):
        code, fixable = "label-orientation-differs", True
        advice = "A fix turns the label's axes without loss."
    else:
        code, fixable = "label-geometry-differs", True
        advice = "A fix gives the label the image's geometry."
    if fixable and not writable(file):
        fixable, advice = False, "Export the label again, on the image's grid."
    message = f"{describe_difference('label', label, 'the image', image, mm)}. {advice}"
    yield Problem(code, case.case_id, file, message, fixable=fixable)


def _can_resample(image: Header, label: Header) -> tuple[bool, str]:
    if not has_geometry(label):
        return False, (
            "The label's header says nothing about its place: export it again, on the image's grid."
        )
    if outside := overhang(image, label):
        return False, (
            f"The image reaches {format_mm(outside)} mm beyond the label, so that what is there is "
            "unknown: export the label again, on the image's grid."
        )
    return True, "A fix resamples the label onto the image's grid (nearest neighbour)."


def _which_header(label: Header) -> str:
    if not has_geometry(label):
        return (
            "The label's header says nothing about its place: if the two match voxel by voxel, "
            "copy the image's geometry into it."
        )
    return (
        "Voxel by voxel the two may match, in the world they do not, and only a person can see "
        "which header is right: look at both, then correct one."
    )


def writable(file: Path) -> bool:
    """Whether a mended copy of a file can be written in its own format."""
    return image_suffix(file) in WRITE_SUFFIXES
