"""RTSTRUCT: a mask as closed contours on the slices of a series, and back.

Contours run along the edges of pixels and join holes by keyholes (see `contours`), so that a mask comes back
as it was. Read are contours of any software: in a slice, what lies within an odd number of a structure's
contours is inside, and pixels whose centers lie on a contour are. So holes may be keyholes or contours of
their own. Slices without a contour stay empty; nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vclipseg import __version__
from vclipseg.data.contours import filled, outlines
from vclipseg.data.dicom_codes import Codes, coded
from vclipseg.data.dicom_planes import (
    OFF_VOXELS,
    Cut,
    SourceFrame,
    cuts_of_source,
    lenient,
    naming,
    require_dicom,
    source_frames,
    to_lps,
)
from vclipseg.data.dicom_seg import COLORS, NAME, UNICODE, prepared, refers_to, series_number
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError
from vclipseg.files import replacing

if TYPE_CHECKING:
    from pydicom import Dataset

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # retired, yet what a referenced study is to be called
_TAKEN_OVER = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "StudyDescription"),
)
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def write_rtstruct(
    mask: Volume,
    series: Sequence[Path],
    path: Path,
    class_names: Sequence[str],
    colors: Sequence[str] = COLORS,
    *,
    method: str = "",
    codes: Codes | None = None,
) -> None:
    """Write a mask as the RTSTRUCT of a series, whole or not at all.

    Args:
        mask: class indices `(X, Y, Z)` on the grid of the series.
        series: the files of its images: of a slice each, or one enhanced multi-frame file.
        path: of the new file; one that is there is replaced.
        class_names: the background first.
        colors: of classes, "#rrggbb", taken in turns.
        method: what made the mask, written into it.
        codes: of classes; default: by their names.

    Raises:
        UsageError: the extra `dicom` is not installed.
        DataError: the series is not one that an object can refer to, or the mask is not on its grid.
    """
    require_dicom()
    with naming(series[0].parent, "its headers do not do for a DICOM object; write NIfTI instead"):
        pairs = cuts_of_source(source_frames(series), mask.affine, mask.shape)
        made = _structure_set([frame for frame, _ in pairs])
        frame_of_reference = made.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID
        for index, name in enumerate(class_names[1:], start=1):
            color = colors[(index - 1) % len(colors)]
            made.StructureSetROISequence.append(_roi(index, name, frame_of_reference, method))
            contours = _contours(mask.array == index, pairs)
            made.ROIContourSequence.append(_roi_contour(index, color, contours))
            made.RTROIObservationsSequence.append(_observation(index, name, codes))
    with replacing(path) as unfinished, lenient():
        made.save_as(unfinished, enforce_file_format=True)


def _structure_set(frames: Sequence[SourceFrame]) -> Dataset:
    """A structure set of these slices, without a structure."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    source, now = prepared(frames[0].header), datetime.now()
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SpecificCharacterSet = UNICODE
    for keyword in _TAKEN_OVER:
        if keyword in source:
            setattr(made, keyword, source[keyword].value)
    made.SOPClassUID, made.SOPInstanceUID = SOP_CLASS, generate_uid()
    made.SeriesInstanceUID, made.SeriesNumber = generate_uid(), series_number(source)
    made.InstanceNumber = 1
    made.Modality, made.SeriesDescription = "RTSTRUCT", "segmented by vclipseg"
    made.OperatorsName = ""
    made.Manufacturer = made.ManufacturerModelName = NAME
    made.SoftwareVersions = __version__
    made.InstanceCreationDate = made.SeriesDate = made.StructureSetDate = f"{now:%Y%m%d}"
    made.InstanceCreationTime = made.SeriesTime = made.StructureSetTime = f"{now:%H%M%S}"
    made.StructureSetLabel = NAME
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_referenced(source, frames)]
    made.StructureSetROISequence = []
    made.ROIContourSequence = []
    made.RTROIObservationsSequence = []
    return made


def _referenced(source: Dataset, frames: Sequence[SourceFrame]) -> Dataset:
    """The frame of reference, and the study, series and files that lie in it."""
    series = _dataset(
        SeriesInstanceUID=source.SeriesInstanceUID,
        ContourImageSequence=list({f.header.SOPInstanceUID: _file(f) for f in frames}.values()),
    )
    study = _dataset(
        ReferencedSOPClassUID=_STUDY_COMPONENT,
        ReferencedSOPInstanceUID=source.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _dataset(
        FrameOfReferenceUID=source.FrameOfReferenceUID, RTReferencedStudySequence=[study]
    )


def _file(frame: SourceFrame) -> Dataset:
    return refers_to(SourceFrame(frame.header, None, frame.plane))


def _dataset(**elements: object) -> Dataset:
    from pydicom import Dataset

    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def _roi(number: int, name: str, frame_of_reference: str, method: str) -> Dataset:
    return _dataset(
        ROINumber=number,
        ReferencedFrameOfReferenceUID=frame_of_reference,
        ROIName=name[:64],
        ROIGenerationAlgorithm="AUTOMATIC",
        ROIGenerationDescription=f"{NAME} {__version__} {method}".strip()[:64],
    )


def _roi_contour(number: int, color: str, contours: list[Dataset]) -> Dataset:
    made = _dataset(
        ReferencedROINumber=number, ROIDisplayColor=[int(color[i : i + 2], 16) for i in (1, 3, 5)]
    )
    if contours:
        made.ContourSequence = contours
    return made


def _observation(number: int, name: str, codes: Codes | None) -> Dataset:
    what = coded(name, codes).type
    code = _dataset(
        CodeValue=what.value,
        CodingSchemeDesignator=what.scheme_designator,
        CodeMeaning=what.meaning,
    )
    return _dataset(
        ObservationNumber=number,
        ReferencedROINumber=number,
        RTROIIdentificationCodeSequence=[code],
        RTROIInterpretedType="",
        ROIInterpreter="",
    )


def _contours(mask: np.ndarray, pairs: Sequence[tuple[SourceFrame, Cut]]) -> list[Dataset]:
    """Contours of a mask `(X, Y, Z)`, slice by slice, in mm."""
    found: list[Dataset] = []
    for frame, place in pairs:
        pixels = place.of(mask)
        if not pixels.any():
            continue
        affine = frame.plane.affine
        for polygon in outlines(pixels):
            points = to_lps(polygon @ affine[:3, :2].T + affine[:3, 3])
            found.append(
                _dataset(
                    ContourNumber=len(found) + 1,
                    ContourImageSequence=[refers_to(frame)],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{value:.4f}" for value in points.ravel()],
                )
            )
    return found


# ---- reading -----------------------------------------------------------------------------


def rt_names(dataset: Dataset) -> dict[int, str]:
    """ROI number -> name."""
    return {
        int(roi.ROINumber): str(roi.get("ROIName", "")).strip()
        for roi in dataset.StructureSetROISequence
    }


def rt_labels(
    dataset: Dataset, path: Path, image: Volume, classes: Sequence[tuple[int, Sequence[int]]]
) -> np.ndarray:
    """Class indices `(X, Y, Z)` on an image's grid; of classes that overlap the last one stays.

    Args:
        dataset: an RTSTRUCT.
        path: of its file.
        image: on whose grid.
        classes: class index and the numbers of its ROIs, in order.

    Raises:
        DataError: a contour is not closed, or lies in no slice of the image.
    """
    contours = {
        int(roi.ReferencedROINumber): roi.get("ContourSequence") or []
        for roi in dataset.get("ROIContourSequence") or []
    }
    to_voxels = np.linalg.inv(image.affine)
    labels = np.zeros(image.shape, dtype=np.uint8 if classes[-1][0] < 256 else np.uint16)
    for index, numbers in classes:
        for number in numbers:
            slices: dict[tuple[int, int], list[np.ndarray]] = {}
            for contour in contours.get(number, []):
                if contour.ContourGeometricType == "POINT":
                    continue
                if contour.ContourGeometricType not in _CLOSED:
                    raise DataError(
                        f"{path}: has contours of type {contour.ContourGeometricType}; only closed "
                        "planar contours have an inside"
                    )
                points = to_lps(np.reshape(np.array(contour.ContourData, dtype=float), (-1, 3)))
                voxels = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
                axis, at = _slice(voxels, path, image.shape)
                slices.setdefault((axis, at), []).append(np.delete(voxels, axis, axis=1))
            for (axis, at), polygons in slices.items():
                plane = np.moveaxis(labels, axis, 2)[..., at]
                plane[filled(polygons, plane.shape)] = index
    return labels


def _slice(voxels: np.ndarray, path: Path, shape: Sequence[int]) -> tuple[int, int]:
    """The axis across a contour `(N, 3)`, and its slice."""
    axis = int(np.ptp(voxels, axis=0).argmin())
    at = int(np.rint(voxels[:, axis].mean()))
    if np.abs(voxels[:, axis] - at).max() > OFF_VOXELS or not 0 <= at < shape[axis]:
        raise DataError(
            f"{path}: a contour lies in no slice of the image. Give the image of the series that it was "
            "drawn on, on that series' own grid."
        )
    return axis, at


def rt_series(dataset: Dataset) -> str:
    """The UID of the series that an RTSTRUCT refers to; empty if it does not say."""
    found = dataset
    for name in (
        "ReferencedFrameOfReferenceSequence",
        "RTReferencedStudySequence",
        "RTReferencedSeriesSequence",
    ):
        items = found.get(name)
        if not items:
            return ""
        found = items[0]
    return str(found.SeriesInstanceUID)
