"""The slices of a DICOM series on one regular grid, or the reason why there is none.

Where a slice lies stands in its header: `ImagePositionPatient`, projected on the normal of
`ImageOrientationPatient`, gives the order of the slices and the distance between them. File names and
instance numbers are not looked at: they say nothing of it.

The slices of a tilted gantry are shifted within their planes until they lie straight above each other.
What cannot be a volume is refused: gaps, two slices in one place, slices of several grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vclipseg.data.dicom_headers import DicomFile, Frame, SeriesError
from vclipseg.data.formats import itk_affine
from vclipseg.data.volume import Header

UNEVEN = 0.1
"""Slices are evenly spaced if no distance is off the usual one by more than this share of it."""
ASKEW_PIXELS = 0.1
"""Slices lie straight above each other if none is shifted sideways by more than this."""
SAME_PLACE_MM = 1e-3
_SAME_DIRECTION = 1e-3  # of unit vectors, and of pixel spacings relative to each other


@dataclass(frozen=True, eq=False)
class Slice:
    """A frame of a file of a series."""

    file: DicomFile
    index: int
    frame: Frame

    @property
    def name(self) -> str:
        """Names it in a message."""
        several = len(self.file.frames) > 1
        return f"{self.file.path.name}{f' (frame {self.index + 1})' if several else ''}"


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a series in order, and their grid.

    Attributes:
        shifts: `(Z, 2)`, the pixels along X and Y by which each slice lies beside the grid's corner; None
            where all lie straight above each other.
    """

    slices: tuple[Slice, ...]
    header: Header
    shifts: np.ndarray | None


def stacked(path: Path, slices: Sequence[Slice]) -> Stack:
    """Slices along their normal, on the upright grid that holds all of them.

    Raises:
        SeriesError: They are no evenly spaced stack, upright or of a tilted gantry.
    """
    first = slices[0].frame
    x = first.axes[0] / np.linalg.norm(first.axes[0])
    normal = first.normal / np.linalg.norm(first.normal)
    y = np.cross(normal, x)
    slices = sorted(slices, key=lambda s: float(s.frame.position @ normal))
    positions = np.array([s.frame.position for s in slices])  # (Z, 3) mm
    steps = np.diff(positions @ normal)
    _check_steps(path, slices, steps)
    offsets = positions - positions[0]
    sideways = np.stack([offsets @ x, offsets @ y], axis=1) / first.spacing  # (Z, 2) pixels
    sideways = sideways.round(3)
    shape, origin = slices[0].file.shape, positions[0]
    shifts: np.ndarray | None = None
    if np.abs(sideways).max() > ASKEW_PIXELS:
        _check_tilt(path, sideways)
        corner = np.floor(sideways.min(axis=0))
        shifts = sideways - corner
        width, height = np.ceil(shifts.max(axis=0)).astype(int) + shape
        shape = (int(width), int(height))
        origin = origin + corner * first.spacing @ np.stack([x, y])
    affine = itk_affine(
        (*first.spacing, float(steps.mean())),
        np.stack([x, y, normal], axis=1).ravel().tolist(),
        origin.tolist(),
    )
    return Stack(tuple(slices), Header((*shape, len(slices)), 1, affine), shifts)


# ---- refusals ----------------------------------------------------------------------------


def check_one_grid(path: Path, slices: Sequence[Slice]) -> None:
    """Raises: SeriesError: slices of a series differ in size, spacing or orientation."""
    first = slices[0]
    for other in slices[1:]:
        if difference := _difference(first, other):
            raise SeriesError(
                f"{path}: its slices are not of one grid: {other.name} has {difference} as "
                f"{first.name} has. Take out what does not belong to the volume, such as an "
                "overview image.",
                "dicom-mixed-grids",
                other.file.path,
            )


def _difference(first: Slice, other: Slice) -> str:
    """What tells the grids of two slices apart, if anything does."""
    if other.file.shape != first.file.shape:
        return f"{_times(other.file.shape)} pixels, not {_times(first.file.shape)}"
    if not np.allclose(other.frame.spacing, first.frame.spacing, rtol=_SAME_DIRECTION):
        spacings = (_times(s.frame.spacing) for s in (other, first))
        return "pixels of {} mm, not of {} mm".format(*spacings)
    if not np.allclose(other.frame.axes, first.frame.axes, atol=_SAME_DIRECTION):
        return "not the same orientation"
    return ""


def _check_steps(path: Path, slices: Sequence[Slice], steps: np.ndarray) -> None:
    """Refuse two slices in one place, gaps, and uneven distances `(Z - 1,)` in mm."""
    if steps.min() < SAME_PLACE_MM:
        raise _same_place(path, *slices[int(steps.argmin()) :][:2])
    usual = float(np.median(steps))
    off = np.abs(steps - usual)
    if off.max() <= UNEVEN * usual:
        return
    at = int(off.argmax())
    where = f"from {slices[at].name} to {slices[at + 1].name} it is {steps[at]:.4g} mm"
    file = slices[at].file.path
    missing = int((np.rint(steps / usual) - 1).clip(min=0).sum())
    if missing:
        raise SeriesError(
            f"{path}: about {missing} slice(s) are missing: {where}, where {usual:.4g} mm is "
            "usual. Get the series again, whole.",
            "dicom-missing-slices",
            file,
        )
    raise SeriesError(
        f"{path}: its slices are not evenly spaced: {where}, where {usual:.4g} mm is usual. Let a "
        "converter that resamples them make a NIfTI of it, and use that.",
        "dicom-uneven-slices",
        file,
    )


def _same_place(path: Path, first: Slice, second: Slice) -> SeriesError:
    if first.file is not second.file and first.file.instance == second.file.instance:
        text = "are copies of one slice. Keep one of them."
    else:
        text = (
            "lie in the same place, as where a series holds several phases, echoes or times. Keep one "
            "acquisition of the series in the folder, each slice once."
        )
    return SeriesError(
        f"{path}: {first.name} and {second.name} {text}", "dicom-duplicate-slices", second.file.path
    )


def _check_tilt(path: Path, sideways: np.ndarray) -> None:
    """Refuse shifts `(Z, 2)` that do not grow from slice to slice as those of a tilted gantry do."""
    slices = np.arange(len(sideways))[:, None]
    expected = slices * sideways[-1] / slices[-1]
    if (off := np.abs(sideways - expected).max()) > 0.5:
        raise SeriesError(
            f"{path}: its slices are shifted sideways, unevenly, by up to {off:.2g} pixels off a "
            "straight line. Let a converter that resamples them make a NIfTI of it, and use that.",
            "dicom-shifted-slices",
        )


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
