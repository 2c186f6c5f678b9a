"""DICOM: the slices of one series, as a volume.

Which files those are is said here. `dicom_stack` puts them in order by where they lie, and refuses what
cannot be a volume; `dicom_pixels` reads their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vclipseg.data.dicom_headers import (
    DicomFile,
    SeriesError,
    files_below,
    is_dicom,
    is_flat,
    read_file,
)
from vclipseg.data.dicom_pixels import read_pixels, straightened
from vclipseg.data.dicom_stack import Slice, Stack, check_one_grid, stacked
from vclipseg.data.volume import Volume


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
    pixels = read_pixels(stack.slices)  # (Z, Y, X)
    if stack.shifts is not None:
        pixels = straightened(pixels, stack.shifts, stack.header.shape)
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
    check_one_grid(path, slices)
    return stacked(path, slices)


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
