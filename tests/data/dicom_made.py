"""DICOM for tests: series written slice by slice or in one enhanced file, and what lies about beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from scipy.spatial.transform import Rotation

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PATIENT, PATIENT_ID = "SOMEBODY^SECRET", "MRN-4711-0815"
STORAGE = "1.2.840.10008.5.1.4.1.1."
AXIAL = np.diag([-0.7, -0.9, 2.0, 1.0])
"""Voxel to RAS+ mm of a usual scan: X runs to the left, Y to the back, Z upwards."""


def oblique(angles: Sequence[float] = (8.0, -5.0, 12.0)) -> np.ndarray:
    """The same, turned by some degrees and moved."""
    affine = AXIAL.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ AXIAL[:3, :3]
    affine[:3, 3] = (31.5, -12.25, 104.0)
    return affine


def write_slice(
    path: Path,
    pixels: np.ndarray,
    affine: np.ndarray,
    number: int = 1,
    series: str = "1.2.3.4",
    description: str = "Pancreas",
    compressor: str = "",
    **tags: str,
) -> Path:
    """One file: pixels `(X, Y)` in HU, whose first one the affine (RAS+ mm) puts at its origin.

    `tags` such as t0008_0060="OT" are laid over those of a CT. Compressors are those of GDCM: JPEG2000, JPEG.
    """
    lps = RAS_TO_LPS @ affine
    x_mm, y_mm = np.linalg.norm(lps[:3, :2], axis=0)
    image = sitk.GetImageFromArray(np.rint(pixels).astype(np.int16).T[None])
    image.SetSpacing((x_mm, y_mm, 1.0))
    values = {
        "0008|0060": "CT",
        "0008|103e": description,
        "0010|0010": PATIENT,
        "0010|0020": PATIENT_ID,
        "0020|000d": "1.2.3",
        "0020|000e": series,
        "0020|0013": str(number),
        "0020|0052": f"{series}.5",
        "0020|0032": _spell(lps[:3, 3]),
        "0020|0037": _spell([*lps[:3, 0] / x_mm, *lps[:3, 1] / y_mm]),
        "0028|1052": "-1024",
        "0028|1053": "1",
        **{key[1:].replace("_", "|"): text for key, text in tags.items()},
    }
    for key, text in values.items():
        image.SetMetaData(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    if compressor:
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
    writer.Execute(image)
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    slices: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    sideways_mm: float = 0.0,
    series: str = "1.2.3.4",
    **more: str,
) -> Path:
    """A folder of slices of an array `(X, Y, Z)` in HU.

    Args:
        folder: where to.
        array: the volume.
        affine: voxel to RAS+ mm.
        slices: those to write; default: all.
        names: of the files, by slice.
        numbers: instance numbers, by slice.
        sideways_mm: how far each slice is shifted along Y against the one before.
        series: UID.
        more: of `write_slice`.
    """
    depth = array.shape[2]
    names = names or [f"1-{k + 1:03}.dcm" for k in range(depth)]
    numbers = numbers or [k + 1 for k in range(depth)]
    shift = sideways_mm * affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    for k in range(depth) if slices is None else slices:
        moved = affine.copy()
        moved[:3, 3] += k * (affine[:3, 2] + shift)
        write_slice(folder / names[k], array[:, :, k], moved, numbers[k], series, **more)
    return folder


def write_enhanced(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    order: Sequence[int] | None = None,
    slopes: Sequence[float] | None = None,
    sop: str = "2.1",
    series: str = "1.2.3.5",
) -> Path:
    """One file of many frames (Enhanced CT), an array `(X, Y, Z)` in it.

    Args:
        path: the file.
        array: the volume, multiples of the slopes from -1024 on.
        affine: voxel to RAS+ mm.
        order: in which the frames are stored.
        slopes: of each slice, for a rescaling of its own.
        sop: the end of its SOP class.
        series: UID.
    """
    lps = RAS_TO_LPS @ affine
    x_mm, y_mm = np.linalg.norm(lps[:3, :2], axis=0)
    depth = array.shape[2]
    slopes = slopes or [1.0] * depth
    object_ = _object(sop, series)
    object_.Columns, object_.Rows, object_.NumberOfFrames = *array.shape[:2], depth
    object_.SamplesPerPixel, object_.PhotometricInterpretation = 1, "MONOCHROME2"
    object_.BitsAllocated, object_.BitsStored, object_.HighBit = 16, 16, 15
    object_.PixelRepresentation = 0
    shared = Dataset()
    shared.PixelMeasuresSequence = [_with(PixelSpacing=[y_mm, x_mm])]
    axes = [*lps[:3, 0] / x_mm, *lps[:3, 1] / y_mm]
    shared.PlaneOrientationSequence = [_with(ImageOrientationPatient=axes)]
    object_.SharedFunctionalGroupsSequence = [shared]
    frames, stored = [], []
    for k in range(depth) if order is None else order:
        frame = Dataset()
        place = (lps @ [0, 0, k, 1])[:3]
        frame.PlanePositionSequence = [_with(ImagePositionPatient=list(place))]
        rescale = _with(RescaleIntercept=-1024, RescaleSlope=slopes[k], RescaleType="HU")
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
        stored.append(np.rint((array[:, :, k] + 1024) / slopes[k]).astype(np.uint16).T)
    object_.PerFrameFunctionalGroupsSequence = frames
    object_.PixelData = np.stack(stored).tobytes()
    return save(object_, path)


def write_object(
    path: Path, sop: str = "88.33", series: str = "1.2.3.9", about: str = "", **values: object
) -> Path:
    """Something that is no scan: a report ("88.33"), a segmentation ("66.4") of the series `about`..."""
    object_ = _object(sop, series)
    if about:
        object_.ReferencedSeriesSequence = [_with(SeriesInstanceUID=about)]
    for key, value in values.items():
        setattr(object_, key, value)
    return save(object_, path)


def edit(path: Path, **values: object) -> Path:
    """Set elements of a file; None takes one away."""
    object_ = pydicom.dcmread(path)
    for key, value in values.items():
        delattr(object_, key) if value is None else setattr(object_, key, value)
    object_.save_as(path)
    return path


def save(object_: Dataset, path: Path) -> Path:
    """Write an object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    object_.save_as(path, enforce_file_format=True)
    return path


def _object(sop: str, series: str) -> Dataset:
    object_ = _with(
        SOPClassUID=STORAGE + sop,
        SOPInstanceUID=pydicom.uid.generate_uid(),
        SeriesInstanceUID=series,
        StudyInstanceUID="1.2.3",
        Modality="CT",
        PatientName=PATIENT,
        PatientID=PATIENT_ID,
    )
    object_.file_meta = FileMetaDataset()
    object_.file_meta.MediaStorageSOPClassUID = STORAGE + sop
    object_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    return object_


def _with(**values: object) -> Dataset:
    dataset = Dataset()
    for key, value in values.items():
        setattr(dataset, key, _decimals(value) if isinstance(value, list) else value)
    return dataset


def _decimals(values: list) -> list:
    return [f"{float(v):.9f}"[:16] if not isinstance(v, Dataset) else v for v in values]


def _spell(values: Iterable[float]) -> str:
    """Decimals as DICOM holds them, 16 characters at most."""
    return "\\".join(f"{value:.9f}" for value in values)
