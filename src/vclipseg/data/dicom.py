"""DICOM: the slices of one series in a folder, as a volume.

Where a slice lies stands in its header: `ImagePositionPatient`, projected on the normal of
`ImageOrientationPatient`, gives the order of the slices and the distance between them. File names and
instance numbers are not looked at: they say nothing of it. GDCM, through SimpleITK, decodes the
pixels and applies each file's own rescale slope and intercept, so that CT is in Hounsfield units.

What one affine cannot say is refused: gaps, two slices in one place, a tilted gantry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from vclipseg.data.cases import hidden
from vclipseg.data.formats import itk_affine
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError, UsageError

UNEVEN = 0.1
"""Slices are evenly spaced if no distance is off the usual one by more than this share of it."""
ASKEW_PIXELS = 0.1
"""Slices lie straight above each other if none is shifted sideways by more than this."""
SAME_PLACE_MM = 1e-3
_SAME_DIRECTION = 1e-3  # of unit vectors, and of pixel spacings relative to each other
_IO = "GDCMImageIO"
_SERIES, _DESCRIPTION = "0020|000e", "0008|103e"
_POSITION, _ORIENTATION, _SPACING = "0020|0032", "0020|0037", "0028|0030"


@dataclass(frozen=True, eq=False)
class Slice:
    """What the header of a file says.

    Attributes:
        series: the UID of its series.
        description: what the scanner called the series.
        shape: pixels along X (columns) and Y (rows).
        spacing: mm between pixels along X and Y.
        axes: `(2, 3)`, the directions of X and Y in DICOM's LPS world.
        position: `(3,)` mm, where the first pixel's center is in that world.
    """

    path: Path
    series: str
    description: str
    shape: tuple[int, int]
    spacing: tuple[float, float]
    axes: np.ndarray
    position: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """`(3,)`, the direction in which slices follow each other."""
        return np.cross(*self.axes)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do, or is named like one."""
    if hidden(path) or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def series_folders(root: str | Path) -> list[Path]:
    """Every folder in a tree, the root included, that has DICOM files in it.

    Raises:
        UsageError: There is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: there is no such folder. Name one with DICOM files in it.")
    walked = os.walk(root, followlinks=True)
    return sorted(
        Path(folder) for folder, _, names in walked if any(is_dicom(Path(folder, n)) for n in names)
    )


def dicom_files(folder: str | Path) -> list[Path]:
    """The DICOM files of a folder, not of those in it.

    Raises:
        DataError: It has none.
    """
    folder = Path(folder)
    files = sorted(filter(is_dicom, folder.iterdir())) if folder.is_dir() else []
    if not files:
        raise DataError(
            f"{folder}: has no DICOM files. Name the folder that holds a series' files."
        )
    return files


def read_series(folder: str | Path) -> Volume:
    """Read the one series of a folder as float32 `(1, X, Y, Z)`.

    X runs along the columns of the slices, Y along their rows, Z from slice to slice.

    Raises:
        DataError: There is no series or more than one, or its slices are not those of one regular
            grid; the message names the folder and what to do.
    """
    folder = Path(folder)
    slices = [read_header(path) for path in dicom_files(folder)]
    _check_one_series(folder, slices)
    _check_one_grid(folder, slices)
    slices, step_mm = _ordered(folder, slices)
    pixels = np.stack([_read_pixels(s.path) for s in slices])  # (Z, Y, X)
    return Volume(pixels.T[None], _affine(slices[0], step_mm))


def read_header(path: Path) -> Slice:
    """Read where a slice lies, not its pixels.

    Raises:
        DataError: The file is no DICOM image of one slice, or does not say where it lies.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_IO)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    columns, rows, *frames = reader.GetSize()
    if frames not in ([], [1]) or reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{path}: is not one gray slice. Series of several frames a file and color images are "
            "not read; convert it to NIfTI."
        )
    try:
        x, y, z = _numbers(_tag(reader, _POSITION))
        axes = np.reshape(_numbers(_tag(reader, _ORIENTATION)), (2, 3))
        row_mm, column_mm = _numbers(_tag(reader, _SPACING))  # from row to row comes first
    except ValueError as error:
        raise DataError(
            f"{path}: does not say where its slice lies (ImagePositionPatient, "
            "ImageOrientationPatient, PixelSpacing). Export the series again, as original images."
        ) from error
    if not np.allclose(axes @ axes.T, np.eye(2), atol=_SAME_DIRECTION):
        raise DataError(f"{path}: its rows and columns are not at right angles. Export it again.")
    return Slice(
        path=path,
        series=_tag(reader, _SERIES),
        description=_tag(reader, _DESCRIPTION),
        shape=(columns, rows),
        spacing=(column_mm, row_mm),
        axes=axes,
        position=np.array([x, y, z]),
    )


def _tag(reader: sitk.ImageFileReader, key: str) -> str:
    """The text of an element; empty where it is missing."""
    text = reader.GetMetaData(key).strip(" \0") if reader.HasMetaDataKey(key) else ""
    return text.encode("utf-8", "replace").decode("utf-8")  # of unknown character sets


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("\\")]


def _read_pixels(path: Path) -> np.ndarray:
    """Rescaled values `(Y, X)`, float32."""
    try:
        image = sitk.ReadImage(str(path), sitk.sitkFloat32, _IO)
    except RuntimeError as error:
        raise _unreadable(path) from error
    pixels = sitk.GetArrayFromImage(image)
    return pixels.reshape(pixels.shape[-2:])


def _unreadable(path: Path) -> DataError:
    return DataError(
        f"{path}: cannot be read as a DICOM image. It may be truncated, or hold no image: get a "
        "fresh copy of the series, or take the file out of the folder."
    )


# ---- one series, one grid ----------------------------------------------------------------


def _check_one_series(folder: Path, slices: Sequence[Slice]) -> None:
    found = {s.series: s.description or "unnamed" for s in slices}
    if len(found) > 1:
        names = ", ".join(f"{name} (...{uid[-8:]})" for uid, name in sorted(found.items()))
        raise DataError(
            f"{folder}: holds {len(found)} series: {names}. Put each into a folder of its own."
        )


def _check_one_grid(folder: Path, slices: Sequence[Slice]) -> None:
    first = slices[0]
    for other in slices[1:]:
        if difference := _difference(first, other):
            raise DataError(
                f"{folder}: its slices are not of one grid: {other.path.name} has {difference} as "
                f"{first.path.name} has. Take out what does not belong to the volume, such as an "
                "overview image."
            )


def _difference(first: Slice, other: Slice) -> str:
    """What tells the grids of two slices apart, if anything does."""
    if other.shape != first.shape:
        return f"{_times(other.shape)} pixels, not {_times(first.shape)}"
    if not np.allclose(other.spacing, first.spacing, rtol=_SAME_DIRECTION):
        return f"pixels of {_times(other.spacing)} mm, not of {_times(first.spacing)} mm"
    if not np.allclose(other.axes, first.axes, atol=_SAME_DIRECTION):
        return "not the same orientation"
    return ""


def _ordered(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], float]:
    """The slices along their normal, and the mm from each to the next."""
    if len(slices) < 2:
        raise DataError(f"{folder}: has a single slice. A volume needs two at least.")
    normal = slices[0].normal
    slices = sorted(slices, key=lambda s: float(s.position @ normal))
    positions = np.array([s.position for s in slices])  # (Z, 3) mm
    steps = np.diff(positions @ normal)
    _check_steps(folder, slices, steps)
    offsets = positions - positions[0]
    sideways = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1).max()
    if sideways > ASKEW_PIXELS * min(slices[0].spacing):
        raise DataError(
            f"{folder}: its slices are shifted sideways, by {sideways:.2g} mm over the volume, as "
            "with a tilted gantry. Let a converter that straightens them make a NIfTI of it "
            "(dcm2niix does), and use that."
        )
    return slices, float(steps.mean())


def _check_steps(folder: Path, slices: Sequence[Slice], steps: np.ndarray) -> None:
    """Refuse two slices in one place, gaps, and uneven distances `(Z - 1,)` in mm."""
    if steps.min() < SAME_PLACE_MM:
        at = int(steps.argmin())
        raise DataError(
            f"{folder}: {slices[at].path.name} and {slices[at + 1].path.name} lie in the same "
            "place. Keep one acquisition of the series in the folder, each slice once."
        )
    usual = float(np.median(steps))
    off = np.abs(steps - usual)
    if off.max() <= UNEVEN * usual:
        return
    at = int(off.argmax())
    where = f"from {slices[at].path.name} to {slices[at + 1].path.name} it is {steps[at]:.4g} mm"
    missing = int((np.rint(steps / usual) - 1).clip(min=0).sum())
    if missing:
        raise DataError(
            f"{folder}: about {missing} slice(s) are missing: {where}, where {usual:.4g} mm is "
            "usual. Get the series again, whole."
        )
    raise DataError(
        f"{folder}: its slices are not evenly spaced: {where}, where {usual:.4g} mm is usual. Let a "
        "converter that resamples them make a NIfTI of it, and use that."
    )


def _affine(first: Slice, step_mm: float) -> np.ndarray:
    """Voxel to RAS+ mm; the axes are made exactly orthonormal."""
    x = first.axes[0] / np.linalg.norm(first.axes[0])
    normal = first.normal / np.linalg.norm(first.normal)
    direction = np.stack([x, np.cross(normal, x), normal], axis=1)  # columns are axes
    return itk_affine(
        (*first.spacing, step_mm), direction.ravel().tolist(), first.position.tolist()
    )


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
