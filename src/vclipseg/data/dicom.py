"""DICOM: the slices of one series, as a volume.

Where a slice lies stands in its header: `ImagePositionPatient`, projected on the normal of
`ImageOrientationPatient`, gives the order of the slices and the distance between them. File names and
instance numbers are not looked at: they say nothing of it. GDCM, through SimpleITK, decodes the
pixels; each file's own rescale slope and intercept, or each frame's, are applied, so that CT is in
Hounsfield units.

The slices of a tilted gantry are shifted within their planes until they lie straight above each other.
What cannot be a volume is refused: gaps, two slices in one place, slices of several grids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from vclipseg.data.dicom_headers import (
    DicomFile,
    Frame,
    SeriesError,
    files_below,
    is_dicom,
    is_flat,
    quietly,
    read_file,
    unreadable,
)
from vclipseg.data.formats import itk_affine
from vclipseg.data.volume import Header, Volume

if TYPE_CHECKING:
    from pydicom import Dataset

UNEVEN = 0.1
"""Slices are evenly spaced if no distance is off the usual one by more than this share of it."""
ASKEW_PIXELS = 0.1
"""Slices lie straight above each other if none is shifted sideways by more than this."""
SAME_PLACE_MM = 1e-3
_SAME_DIRECTION = 1e-3  # of unit vectors, and of pixel spacings relative to each other
_IO = "GDCMImageIO"
_PIXELS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelData",
)


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


def dicom_files(folder: str | Path) -> list[Path]:
    """The DICOM files of a folder, not of those in it.

    Raises:
        DataError: It has none.
    """
    folder = Path(folder)
    files = sorted(filter(is_dicom, folder.iterdir())) if folder.is_dir() else []
    if not files:
        raise _no_files(folder)
    return files


def series_folders(root: str | Path) -> list[Path]:
    """Every folder in a tree, the root included, that has DICOM files in it.

    Raises:
        UsageError: There is no such folder.
    """
    return sorted({path.parent for path in files_below(Path(root))})


def series_files(path: str | Path) -> list[DicomFile]:
    """The files of a series, in no order: of the only one in a tree of folders, or of that of a file.

    Raises:
        DataError: There is no series or more than one, or a file beside its files cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise _no_files(path)
    if path.is_dir():
        found = [read_file(file) for file in files_below(path)]
        wanted = _volumes(f for f in found if f.kind == "image")
    else:
        one = read_file(path)
        found = [read_file(file) for file in dicom_files(path.parent)]
        wanted = {one.series: one} if one.kind == "image" else {}
        found = [f for f in found if f.series == one.series]
    if len(wanted) > 1:
        raise _several_series(path, list(wanted.values()))
    if not wanted:
        raise _no_series(path, found) if found else _no_files(path)
    return [f for f in found if f.kind == "image" and f.series in wanted]


def _volumes(images: Iterable[DicomFile]) -> dict[str, DicomFile]:
    """The series of some images, by a file of each; those of one slice only where there is no other."""
    series: dict[str, list[DicomFile]] = {}
    for file in images:
        series.setdefault(file.series, []).append(file)
    thick = {uid: files[0] for uid, files in series.items() if not is_flat(files)}
    return thick or {uid: files[0] for uid, files in series.items()}


def stored_series(path: Path) -> tuple[Path, ...]:
    """The files of a series, in the order of their own numbers; a segmentation's file as it is.

    Raises:
        DataError: As `series_files`.
    """
    if path.is_file() and read_file(path).kind == "label":
        return (path,)
    return tuple(f.path for f in sorted(series_files(path), key=lambda f: (f.instance, f.path)))


def read_series(path: str | Path) -> Volume:
    """Read a series as float32 `(1, X, Y, Z)`: the only one of a folder, or that of a file.

    X runs along the columns of the slices, Y along their rows, Z from slice to slice.

    Raises:
        DataError: There is no series or more than one, or its slices are not those of one regular
            grid; the message names the folder and what to do.
    """
    stack = read_stack(path)
    pixels = _pixels(stack.slices)  # (Z, Y, X)
    if stack.shifts is not None:
        pixels = _straightened(pixels, stack.shifts, stack.header.shape)
    return Volume(pixels.T[None], stack.header.affine)


def read_stack(path: str | Path) -> Stack:
    """The slices of a series in order and their grid, without pixels.

    Raises:
        DataError: As `read_series`.
    """
    path = Path(path)
    files = series_files(path)
    if flaw := next((f.flaw for f in files if f.flaw), None):
        raise SeriesError(str(flaw), flaw.code, flaw.file)
    slices = [Slice(f, n, frame) for f in files for n, frame in enumerate(f.frames)]
    if len(slices) < 2:
        raise SeriesError(
            f"{path}: has a single slice. A volume needs two at least.", "dicom-single-slice"
        )
    _check_one_grid(path, slices)
    return _stacked(path, slices)


def tilt(path: str | Path) -> str:
    """What to know of a series with a tilted gantry; empty for others."""
    stack = read_stack(path)
    if stack.shifts is None:
        return ""
    mm = np.ptp(stack.shifts, axis=0) * stack.header.spacing[:2]
    return (
        f"the slices are shifted sideways, by {np.linalg.norm(mm):.2g} mm over the volume, as with a "
        "tilted gantry. They are moved to lie straight above each other; masks lie on that grid."
    )


# ---- refusals ----------------------------------------------------------------------------


def _no_files(path: Path) -> SeriesError:
    return SeriesError(
        f"{path}: has no DICOM files. Name the folder that holds a series' files.",
        "dicom-no-series",
    )


def _no_series(path: Path, found: Sequence[DicomFile]) -> SeriesError:
    notes = ", ".join(dict.fromkeys(f.note or "segmentation" for f in found))
    return SeriesError(
        f"{path}: holds no slices of a scan, only: {notes}. Name the folder of an original series.",
        "dicom-no-series",
    )


def _several_series(folder: Path, firsts: Sequence[DicomFile]) -> SeriesError:
    names = sorted(f"{_unrevealing(f)} (...{f.series[-8:]})" for f in firsts)
    return SeriesError(
        f"{folder}: holds {len(firsts)} series: {', '.join(names)}. Put each into a folder of its own.",
        "dicom-several-series",
    )


def _unrevealing(file: DicomFile) -> str:
    """What the scanner called a series, unless it called it by the patient."""
    known = file.description and not file.reveals(file.description)
    return file.description if known else "unnamed"


def _check_one_grid(path: Path, slices: Sequence[Slice]) -> None:
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


# ---- the grid ----------------------------------------------------------------------------


def _stacked(path: Path, slices: Sequence[Slice]) -> Stack:
    """Slices along their normal, on the upright grid that holds all of them."""
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


def _straightened(pixels: np.ndarray, shifts: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Slices `(Z, Y, X)` shifted by `(Z, 2)` pixels into a wider grid; around them is the least value."""
    x, y, z = shape
    least = pixels.min()
    wide = np.full((z, y, x), least, dtype=np.float32)
    wide[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    for image, (right, down) in zip(wide, shifts, strict=True):
        image[:] = ndimage.shift(image, (down, right), order=1, mode="constant", cval=least)
    return wide


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


# ---- pixels ------------------------------------------------------------------------------


def _pixels(slices: Sequence[Slice]) -> np.ndarray:
    """Rescaled values `(Z, Y, X)`, float32; a file of many frames is decoded once."""
    images: list[np.ndarray] = []
    many: dict[Path, np.ndarray] = {}
    for s in slices:
        path = s.file.path
        if len(s.file.frames) == 1:
            images.append(_decoded(path, path)[0])
            continue
        if path not in many:
            many[path] = _stored(path)
        if s.index >= len(many[path]):
            raise unreadable(path)
        images.append(many[path][s.index] * s.frame.slope + s.frame.intercept)
    return np.stack(images).astype(np.float32, copy=False)


def _stored(path: Path) -> np.ndarray:
    """Stored values `(N, Y, X)` of all frames of a file.

    GDCM would rescale all frames as the first: it is given the pixels alone.
    """
    import pydicom

    with quietly(), TemporaryDirectory() as folder:
        file = Path(folder) / "frames.dcm"
        try:
            _bare(pydicom.dcmread(path)).save_as(file, enforce_file_format=True)
        except Exception as error:  # of pydicom, of any kind where a file is damaged
            raise unreadable(path) from error
        return _decoded(file, path)


def _bare(source: Dataset) -> Dataset:
    """Nothing but the pixels of a file, as they are stored there."""
    import pydicom

    bare = pydicom.Dataset()
    for name in _PIXELS:
        bare[name] = source[name]
    bare.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"  # any images of several frames
    bare.SOPInstanceUID = pydicom.uid.generate_uid()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID
    bare.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
    return bare


def _decoded(file: Path, path: Path) -> np.ndarray:
    """Rescaled values `(N, Y, X)` of a file, float32; `path` is what to call it."""
    try:
        image = sitk.ReadImage(str(file), sitk.sitkFloat32, _IO)
    except RuntimeError as error:
        raise unreadable(path) from error
    pixels = sitk.GetArrayFromImage(image)
    return pixels.reshape(-1, *pixels.shape[-2:])
