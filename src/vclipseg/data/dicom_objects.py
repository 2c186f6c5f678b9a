"""Masks as DICOM objects: segmentations (SEG) and structure sets (RTSTRUCT), out and in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vclipseg.data.dicom_codes import Codes
from vclipseg.data.dicom_planes import naming, read_dicom, require_dicom, source_frames
from vclipseg.data.dicom_seg import (
    SOP_CLASSES,
    seg_grid,
    seg_labels,
    seg_names,
    seg_series,
    write_seg,
)
from vclipseg.data.dicom_seg import Kind as SegKind
from vclipseg.data.rtstruct import SOP_CLASS, rt_labels, rt_names, rt_series, write_rtstruct
from vclipseg.data.volume import Header, Volume
from vclipseg.errors import DataError, UsageError

if TYPE_CHECKING:
    from pydicom import Dataset

KINDS = ("seg", "seg-labelmap", "rtstruct")
SUFFIX = ".dcm"

Writer = Callable[[Volume, Path], None]
"""Writes class indices `(X, Y, Z)` to a file."""


def dicom_writer(
    kind: str,
    series: Sequence[Path],
    class_names: Sequence[str],
    *,
    method: str = "",
    codes: Codes | None = None,
) -> Writer:
    """What writes masks of a series as one of `KINDS`. It looks at the series now, before work is done.

    Raises:
        UsageError: there is no such kind, or the extra `dicom` is not installed.
        DataError: the series is not one that an object can refer to.
    """
    check_kind(kind)
    source_frames(series)

    def write(mask: Volume, path: Path) -> None:
        if kind == "rtstruct":
            write_rtstruct(mask, series, path, class_names, method=method, codes=codes)
        else:
            form: SegKind = "labelmap" if kind == "seg-labelmap" else "binary"
            write_seg(mask, series, path, class_names, form, method=method, codes=codes)

    return write


def check_kind(kind: str) -> None:
    """Raises: UsageError: there is no such kind of object, or what writes it is not installed."""
    if kind not in KINDS:
        raise UsageError(f"{kind}: no kind of DICOM object; there are {', '.join(KINDS)}")
    require_dicom(*(["pydicom"] if kind == "rtstruct" else ["highdicom", "pydicom"]))


# ---- reading -----------------------------------------------------------------------------


def read_labels(
    path: Path, image: Volume, class_names: Sequence[str], *, allow_missing: bool = False
) -> Volume:
    """Class indices `(X, Y, Z)` on an image's grid, of a SEG or an RTSTRUCT.

    Segments are found by their names, in small or capital letters, with spaces or underscores; others are
    left out. Where classes overlap, the later one in `class_names` has the voxel: a tumor after its organ.
    Fractional segments are inside from half of their maximum on.

    Args:
        path: of the object.
        image: on whose grid; a frame or contour must lie on one of its slices.
        class_names: the background first, which is no segment.
        allow_missing: whether classes without a segment are taken as absent.

    Raises:
        UsageError: there is no such file, or the extra `dicom` is not installed.
        DataError: it is neither SEG nor RTSTRUCT, has no segment of a class, or lies on another grid.
    """
    dataset, seg = _read(path)
    with naming(path, "is no whole SEG or RTSTRUCT; export it again"):
        names = seg_names(dataset) if seg else rt_names(dataset)
        classes = _classes(path, names, class_names, allow_missing)
        array = np.zeros(image.shape, dtype=np.uint8)
        if classes:
            array = (seg_labels if seg else rt_labels)(dataset, path, image, classes)
    return Volume(array, image.affine)


def segment_names(path: Path) -> list[str]:
    """What the segments or structures of an object are called, in its order.

    Raises:
        UsageError: there is no such file, or the extra `dicom` is not installed.
        DataError: it is neither SEG nor RTSTRUCT.
    """
    dataset, seg = _read(path, pixels=False)
    with naming(path, "is no whole SEG or RTSTRUCT; export it again"):
        return list((seg_names(dataset) if seg else rt_names(dataset)).values())


def referenced_series(path: Path) -> str:
    """The SeriesInstanceUID of the images that an object is of; empty if it does not say.

    Raises:
        UsageError: there is no such file, or the extra `dicom` is not installed.
        DataError: it is neither SEG nor RTSTRUCT.
    """
    dataset, seg = _read(path, pixels=False)
    with naming(path, "is no whole SEG or RTSTRUCT; export it again"):
        return seg_series(dataset) if seg else rt_series(dataset)


def frame_grid(first: Path, second: Path) -> Header | None:
    """The upright grid of the frames of a SEG, with slices for those of another; None if one is no SEG.

    Raises:
        UsageError: there is no such file, or the extra `dicom` is not installed.
        DataError: one is neither SEG nor RTSTRUCT, or does not say where its frames lie.
    """
    (one, is_seg), (other, both) = (_read(path, pixels=False) for path in (first, second))
    if not (is_seg and both):
        return None
    with naming(first, f"or {second} does not say where its frames lie; export it again"):
        return seg_grid(one, other)


def unnamed(names: Sequence[str], class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Classes, without the background, that no segment has the name of; and names that are no class."""
    found, classes = ({plain_name(name): name for name in known} for known in (names, class_names))
    missing = [name for key, name in classes.items() if key not in found and name != class_names[0]]
    return missing, [name for key, name in found.items() if key not in classes]


def _read(path: Path, *, pixels: bool = True) -> tuple[Dataset, bool]:
    """A file, and whether it is a SEG; otherwise it is an RTSTRUCT."""
    dataset = read_dicom(path, pixels=pixels)
    sop_class = dataset.get("SOPClassUID")
    if sop_class not in (*SOP_CLASSES, SOP_CLASS):
        raise DataError(f"{path}: is neither a DICOM segmentation (SEG) nor an RTSTRUCT")
    return dataset, sop_class in SOP_CLASSES


def _classes(
    path: Path, names: dict[int, str], class_names: Sequence[str], allow_missing: bool
) -> list[tuple[int, list[int]]]:
    """Class index and the numbers of its segments."""
    found = [
        (
            index,
            [number for number, label in names.items() if plain_name(label) == plain_name(name)],
        )
        for index, name in enumerate(class_names[1:], start=1)
    ]
    missing = [class_names[index] for index, numbers in found if not numbers]
    if missing and not allow_missing:
        raise DataError(
            f"{path}: has no segment {', '.join(missing)}; it has {', '.join(names.values()) or 'none'}. "
            "Name the classes as its segments are."
        )
    return [(index, numbers) for index, numbers in found if numbers]


def plain_name(name: str) -> str:
    """A name as it is compared: in small letters, with single spaces."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
