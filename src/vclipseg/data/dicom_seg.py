"""DICOM segmentation objects (SEG): a mask as frames that lie on the slices of a series.

highdicom writes them: of a bit a pixel and a frame for every class (`binary`), or of class indices
(`labelmap`, newer and not yet known to every viewer). Slices where nothing is are left out. Frames are
read one by one and put where they lie; nothing is said by their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vclipseg import __version__
from vclipseg.data.dicom_codes import Codes, coded
from vclipseg.data.dicom_planes import (
    Cut,
    SourceFrame,
    cuts,
    cuts_of_source,
    grid_of,
    group,
    lenient,
    naming,
    planes,
    require_dicom,
    source_frames,
)
from vclipseg.data.volume import Header, Volume
from vclipseg.errors import DataError
from vclipseg.files import replacing

if TYPE_CHECKING:
    from pydicom import Dataset

Kind = Literal["binary", "labelmap"]
SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
)  # the latter: labelmaps
NAME = "vclipseg"
SERIES = 1000
"""The series number of an object is that of its source and this."""
COLORS = ("#d98e6e", "#7db0d6", "#93c592", "#c6a0d6", "#d8c46a", "#7cc7c0", "#e08ca0", "#a9a9a9")
"""Of classes in viewers, one after the other."""
UNICODE = "ISO_IR 192"
_EMPTY_IF_MISSING = (  # what must be there, if only empty
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def write_seg(
    mask: Volume,
    series: Sequence[Path],
    path: Path,
    class_names: Sequence[str],
    kind: Kind = "binary",
    *,
    method: str = "",
    codes: Codes | None = None,
    colors: Sequence[str] = COLORS,
) -> None:
    """Write a mask as a SEG of a series, whole or not at all.

    Patient and study are those of the series, as the standard has it.

    Args:
        mask: class indices `(X, Y, Z)` on the grid of the series.
        series: the files of its images: of a slice each, or one enhanced multi-frame file.
        path: of the new file; one that is there is replaced.
        class_names: the background first.
        kind: `binary` or `labelmap`.
        method: what made the mask, written into it.
        codes: of classes; default: by their names.
        colors: of classes, "#rrggbb", taken in turns.

    Raises:
        UsageError: the extra `dicom` is not installed.
        DataError: the series is not one that an object can refer to, or the mask is not on its grid.
    """
    require_dicom("highdicom", "pydicom")
    import highdicom as hd

    with naming(series[0].parent, "its headers do not do for a DICOM object; write NIfTI instead"):
        frames = source_frames(series)
        pairs = cuts_of_source(frames, mask.affine, mask.shape)
        if frames[0].number is not None:
            pairs.sort(key=lambda pair: pair[0].number or 0)  # as they are in the file
        pixels = np.stack([place.of(mask.array).T for _, place in pairs])  # (N, rows, columns)
        headers = _one_geometry(pairs, mask.affine)
        numbers = range(1, len(class_names))
        segments = [
            _segment(n, class_names[n], colors[(n - 1) % len(colors)], method, codes)
            for n in numbers
        ]
        made = hd.seg.Segmentation(
            source_images=headers,
            pixel_array=pixels.astype(np.uint8 if len(class_names) <= 256 else np.uint16),
            segmentation_type="LABELMAP" if kind == "labelmap" else "BINARY",
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=series_number(headers[0]),
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=NAME,
            manufacturer_model_name=NAME,
            software_versions=__version__,
            device_serial_number="none",
            content_label="SEGMENTATION",
            content_description="segmented by vclipseg",
            series_description="segmented by vclipseg",
            specific_character_set=UNICODE,
        )
    with replacing(path) as unfinished, lenient():
        made.save_as(unfinished)


def _one_geometry(pairs: Sequence[tuple[SourceFrame, Cut]], affine: np.ndarray) -> list[Dataset]:
    """Headers of the sources as highdicom wants them: one orientation, and a thickness."""
    headers = list({id(frame.header): prepared(frame.header) for frame, _ in pairs}.values())
    first, place = pairs[0]
    across_mm = float(abs(affine[:3, place.order[2]] @ first.plane.affine[:3, 2]))
    if first.number is not None:
        shared, frame = group(first.header), first.header.PerFrameFunctionalGroupsSequence[0]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            if name not in shared:
                setattr(shared, name, frame[name].value)
        first.header.SharedFunctionalGroupsSequence = [shared]
        return headers
    for header in headers:
        header.ImageOrientationPatient = headers[0].ImageOrientationPatient
        header.PixelSpacing = headers[0].PixelSpacing
        header.SpacingBetweenSlices = across_mm
        if not header.get("SliceThickness"):
            header.SliceThickness = across_mm
    return headers


def prepared(header: Dataset) -> Dataset:
    """A source's header with all that an object takes over, in Unicode; dates that are none are emptied."""
    for keyword in _EMPTY_IF_MISSING:
        if keyword not in header or not _is_time(header[keyword]):
            setattr(header, keyword, "")
    header.decode()  # by the character set that it names
    for element in header:
        if element.VR == "PN" and element.value:
            element.value = str(element.value)
    header.SpecificCharacterSet = UNICODE
    return header


def _is_time(element: Any) -> bool:
    """False for dates and times that cannot be read."""
    from pydicom.valuerep import DA, TM

    reads = {"DA": DA, "TM": TM}.get(element.VR)
    try:
        return reads is None or not element.value or reads(element.value) is not None
    except ValueError:
        return False


def series_number(header: Dataset) -> int:
    """Of an object of this series."""
    return int(header.get("SeriesNumber") or 0) + SERIES


def _segment(number: int, name: str, color: str, method: str, codes: Codes | None) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes as known

    what = coded(name, codes)
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=what.category,
        segmented_property_type=what.type,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=NAME,
            version=__version__,
            family=known.DCM.ArtificialIntelligence,
            parameters={"method": method} if method else None,
        ),
        tracking_id=name[:64],
        tracking_uid=hd.UID(),
        display_color=hd.color.CIELabColor.from_rgb(*rgb),
    )


# ---- reading -----------------------------------------------------------------------------


def seg_names(dataset: Dataset) -> dict[int, str]:
    """Segment number -> name, without the background of labelmaps."""
    padding = dataset.get("PixelPaddingValue") if _is_labelmap(dataset) else None
    return {
        int(segment.SegmentNumber): str(segment.get("SegmentLabel", "")).strip()
        for segment in dataset.SegmentSequence
        if int(segment.SegmentNumber) != padding
    }


def seg_labels(
    dataset: Dataset, path: Path, image: Volume, classes: Sequence[tuple[int, Sequence[int]]]
) -> np.ndarray:
    """Class indices `(X, Y, Z)` on an image's grid; of classes that overlap the last one stays.

    Args:
        dataset: a SEG with its pixels. Where it is fractional, half of the maximum and more is inside.
        path: of its file.
        image: on whose grid.
        classes: class index and the numbers of its segments, in order.

    Raises:
        DataError: it lies on another grid.
    """
    class_of = {number: index for index, numbers in classes for number in numbers}
    places = cuts(planes(dataset), image.affine, image.shape)
    owners = None if _is_labelmap(dataset) else _owners(dataset)
    half = dataset.get("MaximumFractionalValue", 1) / 2
    labels = np.zeros(image.shape, dtype=np.uint8 if max(class_of.values()) < 256 else np.uint16)
    for n, (place, frame) in enumerate(zip(places, _frames(dataset), strict=True)):
        if owners is None:
            found = [(class_of[v], frame == v) for v in np.unique(frame).tolist() if v in class_of]
        elif owners[n] in class_of:
            found = [(class_of[owners[n]], frame >= max(half, 0.5))]
        else:
            found = []
        for index, pixels in found:
            if not pixels.any():
                continue
            if place is None:
                raise DataError(
                    f"{path}: frame {n + 1} lies on no slice of the image; an object and its image must "
                    "share one grid. Is it of another series?"
                )
            later = place.of(labels) > index
            place.put(labels, pixels.T & ~later, index)
    return labels


def seg_grid(dataset: Dataset, other: Dataset) -> Header:
    """The upright grid of a SEG's frames, with slices for those of another.

    Raises:
        KeyError: one does not say where its frames lie, or how far slices are apart.
    """
    frames = planes(dataset)
    holder = group(dataset)
    if "PixelMeasuresSequence" not in holder:
        holder = dataset.PerFrameFunctionalGroupsSequence[0]
    measures = holder.PixelMeasuresSequence[0]
    told = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0)
    return grid_of(frames, planes(other), told)


def _frames(dataset: Dataset) -> Iterable[np.ndarray]:
    """Pixels `(Y, X)` of each frame. Frames of bits need not begin with a byte: those are read at once."""
    from pydicom.pixels import iter_pixels

    if dataset.BitsAllocated > 1:
        return iter_pixels(dataset)
    return dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)


def _is_labelmap(dataset: Dataset) -> bool:
    return dataset.get("SegmentationType") == "LABELMAP"


def _owners(dataset: Dataset) -> list[int]:
    """The segment number of each frame."""
    shared = group(dataset)
    found = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        holder = frame if frame.get("SegmentIdentificationSequence") else shared
        item = holder.SegmentIdentificationSequence[0]
        found.append(int(item.ReferencedSegmentNumber))
    return found


def seg_series(dataset: Dataset) -> str:
    """The UID of the series that a SEG refers to; empty if it does not say."""
    found = dataset.get("ReferencedSeriesSequence")
    return str(found[0].SeriesInstanceUID) if found else ""


def refers_to(frame: SourceFrame) -> Dataset:
    """The item that names a slice in another object."""
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = frame.header.SOPClassUID
    item.ReferencedSOPInstanceUID = frame.header.SOPInstanceUID
    if frame.number is not None:
        item.ReferencedFrameNumber = frame.number
    return item
