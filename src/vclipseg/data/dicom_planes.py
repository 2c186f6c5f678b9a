"""Where the frames of DICOM objects lie, and which voxels of a volume they are.

Frames and volumes are compared by their places in the world, never by their numbers. pydicom is imported
when it is needed: it comes with the extra `dicom`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vclipseg.data.volume import Header
from vclipseg.errors import DataError, UsageError

if TYPE_CHECKING:
    from pydicom import Dataset

OFF_VOXELS = 0.25
"""A frame is a slice of a volume if its corners are no further than this from voxels, in voxels."""
_ASKEW_PIXELS = 0.1
"""Frames lie straight above each other if none is shifted sideways by more than this."""
_BETWEEN_VOXELS = 0.6
"""Those of a tilted gantry lie anywhere between voxels, sideways; and headers round."""
_SAME_PLACE_MM = 1e-2
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_BROKEN = (AttributeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError)
_settings = threading.RLock()


def to_lps(points: np.ndarray) -> np.ndarray:
    """Points `(N, 3)` from RAS+ to DICOM's LPS, or back."""
    return points * (-1.0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a frame lies.

    Attributes:
        shape: pixels along X (columns) and Y (rows).
        affine: `(4, 4)`, pixels along X and Y and mm along the normal -> RAS+ mm.
    """

    shape: tuple[int, int]
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Cut:
    """The voxels of a volume that are the pixels of a plane.

    Attributes:
        order: the volume's axes along X and Y of the plane, and across it.
        along: the voxels' indices on those axes: `(X,)`, `(Y,)`, `(1,)`.
    """

    order: tuple[int, int, int]
    along: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def slice(self) -> tuple[int, int]:
        """The axis across, and the index on it."""
        return self.order[2], int(self.along[2][0])

    def of(self, array: np.ndarray) -> np.ndarray:
        """The pixels `(X, Y)` of an array `(X, Y, Z)`."""
        return array.transpose(self.order)[np.ix_(*self.along)][..., 0]

    def put(self, array: np.ndarray, pixels: np.ndarray, value: int) -> None:
        """Set an array `(X, Y, Z)` to a value where pixels `(X, Y)` are True."""
        whole = array.transpose(self.order)
        at = np.nonzero(pixels)
        whole[self.along[0][at[0]], self.along[1][at[1]], self.along[2][0]] = value


def cuts(frames: Sequence[Plane], affine: np.ndarray, shape: Sequence[int]) -> list[Cut | None]:
    """The slice of a volume that each frame is; None if it is none.

    The frames of a tilted gantry are shifted against each other, and an upright volume has them between its
    voxels: the nearest are taken.
    """
    sideways = _BETWEEN_VOXELS if _askew(frames) else OFF_VOXELS
    return [cut(frame, affine, shape, sideways) for frame in frames]


def _askew(frames: Sequence[Plane]) -> bool:
    """Whether frames do not lie straight above each other, which those of one place cannot say."""
    places = np.array([frame.affine[:, 3] for frame in frames])  # (N, 4) mm
    x, y, height, _ = np.ptp(places @ np.linalg.inv(frames[0].affine).T, axis=0)
    return bool(max(x, y) > _ASKEW_PIXELS or height < _SAME_PLACE_MM)


def cut(
    plane: Plane, affine: np.ndarray, shape: Sequence[int], sideways: float = OFF_VOXELS
) -> Cut | None:
    """The slice of a volume that a plane is; None if it is none.

    `sideways` is how far its pixels may lie from voxels in their plane, in voxels.
    """
    to_voxels = np.linalg.inv(affine) @ plane.affine
    steps = np.rint(to_voxels[:3, :2])  # voxels from pixel to pixel
    if not (np.abs(steps).sum(axis=0) == 1).all() or (np.abs(steps).sum(axis=1) > 1).any():
        return None
    x, y = np.abs(steps).argmax(axis=0)
    order = (int(x), int(y), int(3 - x - y))
    ends = np.array([n - 1 for n in plane.shape])
    corners = np.array([[0, 0], [ends[0], 0], [0, ends[1]], ends], dtype=float)
    exact = corners @ to_voxels[:3, :2].T + to_voxels[:3, 3]
    first = np.rint(exact[0])
    off = np.abs(exact - (corners @ steps.T + first)).max(axis=0)
    if off[order[2]] > OFF_VOXELS or off.max() > sideways:
        return None
    along = [first[a] + steps[a, i] * np.arange(plane.shape[i]) for i, a in enumerate(order[:2])]
    along.append(first[[order[2]]])
    if any(i.min() < 0 or i.max() >= shape[a] for i, a in zip(along, order, strict=True)):
        return None
    i, j, k = (a.astype(int) for a in along)
    return Cut(order, (i, j, k))


def planes(dataset: Dataset) -> list[Plane]:
    """Of each frame of an image; classic images have one.

    Raises:
        KeyError: it does not say where a frame lies.
    """
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        return [_plane(dataset, dataset, dataset, dataset)]
    shared = group(dataset)
    places = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    return [
        _plane(dataset, *(_macro(place, frame, shared) for place in places))
        for frame in dataset.PerFrameFunctionalGroupsSequence
    ]


def grid_of(frames: Sequence[Plane], others: Sequence[Plane], told_mm: float) -> Header:
    """The upright grid of frames in any order, with slices for others too.

    Slices that are nobody's may lie between. Whether all frames are slices of it is for `cuts` to say.

    Args:
        frames: of the grid's pixels and distance.
        others: which may lie above and below.
        told_mm: the distance between slices that is taken where all frames lie in one place.

    Raises:
        KeyError: it is needed, and is 0.
    """
    affine = frames[0].affine.copy()
    to_mm = np.linalg.inv(affine)[2]  # along the normal
    heights = [to_mm @ frame.affine[:, 3] for frame in (*frames, *others)]
    own = np.unique(heights[: len(frames)])
    steps = np.diff(own)[np.diff(own) > _SAME_PLACE_MM]
    step = np.ptp(own) / np.rint(np.ptp(own) / steps.min()) if len(steps) else told_mm
    if not step:
        raise KeyError("SpacingBetweenSlices")
    low, high = (int(np.rint(end / step)) for end in (min(heights), max(heights)))
    affine[:, 2] *= step
    affine[:, 3] += low * affine[:, 2]
    return Header((*frames[0].shape, high - low + 1), 1, affine)


def group(dataset: Dataset) -> Dataset:
    """What the frames of an image share."""
    from pydicom import Dataset

    found = dataset.get("SharedFunctionalGroupsSequence")
    return found[0] if found else Dataset()


def _macro(name: str, *groups: Dataset) -> Dataset:
    """The one item of a functional group, where a frame or all frames have it."""
    for holder in groups:
        if holder.get(name):
            return holder[name][0]
    raise KeyError(name)


def _plane(image: Dataset, position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    x, y = np.reshape(_numbers(orientation["ImageOrientationPatient"]), (2, 3))
    row_mm, column_mm = _numbers(measures["PixelSpacing"])  # from row to row comes first
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = x * column_mm, y * row_mm, np.cross(x, y)
    affine[:3, 3] = _numbers(position["ImagePositionPatient"])
    return Plane((int(image.Columns), int(image.Rows)), _LPS_TO_RAS @ affine)


def _numbers(element: Any) -> list[float]:
    return [float(value) for value in element.value]


# ---- the series that an object is of -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """A slice of the series that an object refers to.

    Attributes:
        header: of the file that holds it; without pixels.
        number: of the frame in the file, from 1; None if the file is one slice.
    """

    header: Dataset
    number: int | None
    plane: Plane


def source_frames(files: Sequence[Path]) -> list[SourceFrame]:
    """The slices of a series: of files of one each, or of one enhanced multi-frame file.

    Raises:
        UsageError: the extra `dicom` is not installed.
        DataError: a file cannot be read, does not say where it lies or in which frame of reference, or
            they are of several series.
    """
    with lenient():
        frames = [frame for file in files for frame in _frames_of(file)]
    one = {(f.header.SeriesInstanceUID, f.header.FrameOfReferenceUID) for f in frames}
    if len(one) != 1:
        raise DataError(
            f"{files[0].parent if files else 'series'}: {len(one)} series or frames of reference, not one"
        )
    return frames


def _frames_of(file: Path) -> list[SourceFrame]:
    header = read_dicom(file, pixels=False)
    try:
        found = planes(header)
        for need in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
            header[need]
    except _BROKEN as error:
        raise DataError(
            f"{file}: does not say where its slices lie, or what it is. A DICOM object can be made "
            "for original images of CT, MR and the like; write NIfTI instead."
        ) from error
    if not header.get("FrameOfReferenceUID"):
        raise DataError(
            f"{file}: has no FrameOfReferenceUID, so that no viewer could lay an object over it. "
            "Export the series again, as original images, or write NIfTI instead."
        )
    many = "PerFrameFunctionalGroupsSequence" in header
    numbers: Sequence[int | None] = range(1, len(found) + 1) if many else [None]
    return [SourceFrame(header, n, p) for n, p in zip(numbers, found, strict=True)]


def cuts_of_source(
    frames: Sequence[SourceFrame], affine: np.ndarray, shape: Sequence[int]
) -> list[tuple[SourceFrame, Cut]]:
    """A series' slices with the voxels of a mask that lie there, in the order of the latter.

    Raises:
        DataError: slices of the mask are none of the series, or the other way round.
    """
    found = cuts([frame.plane for frame in frames], affine, shape)
    placed = [
        (frame, place) for frame, place in zip(frames, found, strict=True) if place is not None
    ]
    slices = {place.slice for _, place in placed}
    axes = {axis for axis, _ in slices}
    if len(slices) != len(frames) or len(axes) != 1 or len(slices) != shape[axes.pop()]:
        raise DataError(
            f"the mask's grid is not that of the series: {len(slices)} of the series' {len(frames)} "
            "slices are slices of the mask. A DICOM object needs a mask on the grid of the images; write "
            "NIfTI for others."
        )
    return sorted(placed, key=lambda pair: pair[1].slice)


# ---- pydicom -----------------------------------------------------------------------------


def require_dicom(*packages: str) -> None:
    """Raises: UsageError: the extra `dicom` is not installed."""
    missing = [name for name in packages or ("pydicom",) if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; pip install 'vclipseg[dicom]'")


def read_dicom(path: Path, *, pixels: bool = True) -> Dataset:
    """A file as pydicom reads it.

    Raises:
        UsageError: there is no such file, or the extra `dicom` is not installed.
        DataError: it is no DICOM file.
    """
    require_dicom()
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with lenient():
            return dcmread(path, stop_before_pixels=not pixels)
    except (InvalidDicomError, OSError, EOFError, *_BROKEN) as error:
        raise DataError(
            f"{path}: cannot be read as a DICOM file; get a fresh copy of it"
        ) from error


@contextmanager
def lenient() -> Iterator[None]:
    """Take headers as scanners wrote them, and repeat nothing of them on the terminal.

    pydicom refuses or warns of values that the standard does not allow, and its words hold those values.
    """
    from pydicom import config

    with _settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = config.settings.reading_validation_mode, config.settings.writing_validation_mode
        config.settings.reading_validation_mode = config.IGNORE
        config.settings.writing_validation_mode = config.IGNORE
        try:
            yield
        finally:
            config.settings.reading_validation_mode = before[0]
            config.settings.writing_validation_mode = before[1]


@contextmanager
def naming(path: Path, reason: str) -> Iterator[None]:
    """Turn what pydicom raises into a `DataError` that names the file and repeats no header."""
    try:
        with lenient():
            yield
    except _BROKEN as error:
        raise DataError(f"{path}: {reason} ({type(error).__name__})") from error
