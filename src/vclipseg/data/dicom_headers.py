"""What the header of a DICOM file says: what kind of object it is, of which series, and where its frames lie.

Headers are read by pydicom, pixels elsewhere. What a header says of the patient is used to tell patients
apart, and is never shown.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vclipseg.data.formats import hidden, image_suffix
from vclipseg.errors import DataError, UsageError

if TYPE_CHECKING:
    from pydicom import Dataset

Kind = Literal["image", "label", "other"]

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SCANS = {
    _STORAGE + end for end in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130")
}
"""CT, MR and PET: classic, enhanced (several frames a file) and converted to that."""
_LABELS = {_STORAGE + end for end in ("66.4", "66.7", "481.3")}
"""Segmentation, label map segmentation, structure set."""
_DOSE = _STORAGE + "481.2"
_CAPTURE = _STORAGE + "7"

_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "Modality",
    "ImageType",
    "PatientID",
    "PatientName",
    "OtherPatientIDs",
    "AccessionNumber",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
_RIGHT_ANGLE = 1e-3  # cosine


class SeriesError(DataError):
    """A series that cannot be a volume.

    Attributes:
        code: what is wrong with it, as `vclipseg check` names it.
        file: the file to look at, if it is one.
    """

    def __init__(
        self, message: str, code: str = "unreadable-file", file: Path | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.file = file


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """Where a slice lies, and what its stored values mean.

    Attributes:
        spacing: mm between pixels along X and Y.
        axes: `(2, 3)`, the directions of X and Y in DICOM's LPS world.
        position: `(3,)` mm, where the first pixel's center is in that world.
        slope: a value is this times the stored one, plus `intercept`; of enhanced files only, as GDCM
            applies that of the others.
    """

    spacing: tuple[float, float]
    axes: np.ndarray
    position: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def normal(self) -> np.ndarray:
        """`(3,)`, the direction in which slices follow each other."""
        return np.cross(*self.axes)


@dataclass(frozen=True, eq=False, slots=True)
class DicomFile:
    """What a file says of itself.

    Attributes:
        kind: `image`: slices of a scan; `label`: segments or contours of one; `other`: neither.
        note: of `other`: what it is.
        series: the UID of its series.
        study: the UID of its study.
        instance: its own UID.
        number: the number of its series in the study.
        shape: pixels along X (columns) and Y (rows).
        frames: of `image`; none if it has a `flaw`.
        flaw: why an `image` is of no use.
        secrets: what tells who the patient is; never to be shown.
    """

    path: Path
    kind: Kind
    note: str
    series: str
    study: str
    instance: str
    number: int | None
    description: str
    modality: str
    shape: tuple[int, int]
    frames: tuple[Frame, ...]
    flaw: SeriesError | None
    patient: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    def reveals(self, text: str) -> bool:
        """Whether a text has the patient's name or number in it, however it is spelled."""
        return any(secret in _squeezed(text) for secret in self.secrets)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do, or is named like one."""
    if hidden(path) or image_suffix(path) or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def is_flat(files: Sequence[DicomFile]) -> bool:
    """Whether the images of a series are one sound slice: an overview or the like."""
    return len(files) == 1 and files[0].flaw is None and len(files[0].frames) == 1


def files_below(folder: Path) -> Iterator[Path]:
    """The DICOM files in a tree of folders, in order; hidden folders are left out.

    Raises:
        UsageError: There is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder. Name one with DICOM files in it.")
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in sorted(names) if is_dicom(path := Path(place, name)))


def read_file(path: Path) -> DicomFile:
    """Read what a file says of itself, not its pixels.

    Raises:
        SeriesError: It is no DICOM file, or is cut off.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(path) from error
    return _read(path, stat.st_size, stat.st_mtime_ns)


def unreadable(path: Path) -> SeriesError:
    """What to say of a file that is no whole DICOM object."""
    return SeriesError(
        f"{path}: cannot be read as a DICOM image. It may be truncated, or hold no image: get a "
        "fresh copy of the series, or take the file out of the folder.",
        "unreadable-file",
        path,
    )


@lru_cache(maxsize=2**18)
def _read(path: Path, size: int, changed: int) -> DicomFile:
    """Size and time of the last change make the memory forget files that were rewritten."""
    import pydicom

    with quietly():
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            return _describe(path, header)
        except SeriesError:
            raise
        except Exception as error:  # of pydicom, of any kind where a file is damaged
            raise unreadable(path) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Within it, pydicom does not tell of odd values, as it would quote them."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before


def _describe(path: Path, header: Dataset) -> DicomFile:
    sop = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    series = _text(header, "SeriesInstanceUID")
    if not sop or not series or (sop in _SCANS and not header.get("Rows")):
        raise unreadable(path)
    kind, note = _kind(sop, header)
    frames, flaw = _frames(path, header) if kind == "image" else ((), None)
    number = _text(header, "SeriesNumber")
    return DicomFile(
        path=path,
        kind=kind,
        note=note,
        series=series,
        study=_text(header, "StudyInstanceUID"),
        instance=_text(header, "SOPInstanceUID"),
        number=int(number) if number.isdecimal() else None,
        description=_text(header, "SeriesDescription"),
        modality=_text(header, "Modality"),
        shape=(int(header.get("Columns") or 0), int(header.get("Rows") or 0)),
        frames=frames,
        flaw=flaw,
        patient=_text(header, "PatientID") or _text(header, "PatientName"),
        secrets=_secrets(header),
    )


def _text(header: Dataset, key: str) -> str:
    """The text of an element; empty where it is missing. Other character sets lose what has no place."""
    text = str(header.get(key) if header.get(key) is not None else "").strip(" \0")
    return text.encode(errors="replace").decode()


def _secrets(header: Dataset) -> tuple[str, ...]:
    """Words that name the patient, in lower case."""
    texts = [_text(header, key) for key in ("PatientID", "PatientName", "AccessionNumber")]
    texts.append(_text(header, "OtherPatientIDs"))
    words = [*texts, *_text(header, "PatientName").replace("^", " ").replace("=", " ").split()]
    return tuple(dict.fromkeys(_squeezed(word) for word in words if len(_squeezed(word)) > 2))


def _squeezed(text: str) -> str:
    """Letters and digits alone, in lower case: `DOE^John` and `doe_john` are one."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _kind(sop: str, header: Dataset) -> tuple[Kind, str]:
    """What an object is and, where it is of no use, in words."""
    from pydicom.uid import UID

    if sop in _LABELS:
        return "label", ""
    if not header.get("Rows"):
        return "other", UID(sop).name.removesuffix(" Storage")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "other", "localizer"
    if sop in _SCANS:
        return "image", ""
    if sop == _DOSE:
        return "other", "dose"
    placed = header.get("ImagePositionPatient") and header.get("ImageOrientationPatient")
    if placed and header.get("PixelSpacing") and _one_gray(header):
        return "image", ""  # as some programs store what they made of a scan
    if sop == _CAPTURE or sop.startswith(f"{_CAPTURE}."):
        return "other", "secondary capture"
    return "other", f"{UID(sop).name.removesuffix(' Storage')} without a place in the patient"


def _one_gray(header: Dataset) -> bool:
    return int(header.get("NumberOfFrames") or 1) == 1 and header.get("SamplesPerPixel", 1) == 1


# ---- where frames lie --------------------------------------------------------------------


def _frames(path: Path, header: Dataset) -> tuple[tuple[Frame, ...], SeriesError | None]:
    """The frames of an image, or what is wrong with it."""
    if header.get("SamplesPerPixel", 1) != 1:
        message = f"{path}: is a color image. Only gray ones are read: export the original series."
        return (), SeriesError(message, "dicom-color", path)
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    count = int(header.get("NumberOfFrames") or 1)
    if count != (len(groups) or 1):
        message = (
            f"{path}: has {count} frames, of which {len(groups)} say where they lie. Export the "
            "series again, as enhanced or as single slices."
        )
        return (), SeriesError(message, "dicom-no-place", path)
    try:
        if not groups:
            return (_frame(header, header, header),), None
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        return tuple(_enhanced_frame(group, shared) for group in groups), None
    except (ValueError, TypeError, AttributeError, OverflowError):
        message = (
            f"{path}: does not say where its slice lies (ImagePositionPatient, "
            "ImageOrientationPatient, PixelSpacing). Export the series again, as original images."
        )
        return (), SeriesError(message, "dicom-no-place", path)


def _enhanced_frame(group: Dataset, shared: Dataset | None) -> Frame:
    """A frame of an enhanced file; what all frames have in common stands in `shared`."""

    def item(name: str) -> Any:
        sequences = (holder.get(name) for holder in (group, shared) if holder is not None)
        return next((sequence[0] for sequence in sequences if sequence), None)

    return _frame(
        item("PixelMeasuresSequence"),
        item("PlaneOrientationSequence"),
        item("PlanePositionSequence"),
        item("PixelValueTransformationSequence"),
    )


def _frame(spacing: Any, orientation: Any, position: Any, rescale: Any = None) -> Frame:
    """A frame from the parts of a header that say so; TypeError, ValueError... where one does not."""
    row_mm, column_mm = (float(mm) for mm in spacing.PixelSpacing)  # from row to row comes first
    axes = np.reshape([float(n) for n in orientation.ImageOrientationPatient], (2, 3))
    x, y, z = (float(mm) for mm in position.ImagePositionPatient)
    place = np.array([x, y, z])
    if (
        not np.isfinite([*place, *axes.flat, row_mm, column_mm]).all()
        or min(row_mm, column_mm) <= 0
    ):
        raise ValueError("no finite numbers")
    if not np.allclose(axes @ axes.T, np.eye(2), atol=_RIGHT_ANGLE):
        raise ValueError("rows and columns are not at right angles")
    slope = 1.0 if rescale is None else float(rescale.get("RescaleSlope", 1))
    intercept = 0.0 if rescale is None else float(rescale.get("RescaleIntercept", 0))
    return Frame((column_mm, row_mm), axes, place, slope, intercept)
