"""Labels that are DICOM objects, segmentations and structure sets; `dicom_objects` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vclipseg.data import dicom_objects
from vclipseg.data.formats import is_series
from vclipseg.data.volume import Header, Volume


def is_object(label: Path) -> bool:
    """Whether a label is a DICOM object, not a volume of values."""
    return is_series(label)


def read_dicom_label(path: Path, image: Volume, classes: Sequence[str]) -> Volume:
    """Class indices uint8 `(X, Y, Z)` of a segmentation or structure set, on its image's grid.

    Args:
        path: The object's file.
        image: The image it is of; only its grid is looked at.
        classes: Names of the classes, the background first; segments of other names are left out. A class
            without a segment is absent, as empty ones are often not stored.

    Raises:
        DataError: It cannot be read, or does not lie on the image.
        UsageError: What reads it is not installed.
    """
    return dicom_objects.read_labels(path, image, classes, allow_missing=True)


def read_on_grid(path: Path, image: Header, classes: Sequence[str]) -> Volume:
    """`read_dicom_label` on a grid whose voxels nobody has read."""
    nothing = np.broadcast_to(np.float32(0), (1, *image.shape))
    return read_dicom_label(path, Volume(nothing, image.affine), classes)


def referenced_series(path: Path) -> str:
    """The UID of the series that an object is of.

    Raises:
        DataError: It does not say.
        UsageError: What reads it is not installed.
    """
    return dicom_objects.referenced_series(path)


def classes_of(labels: Sequence[Path]) -> dict[str, int]:
    """Class name -> value, from the names of all segments in the order they come; empty if there are none.

    Names that differ in capitals, spaces or underscores alone are one, as it is written first. The result
    is empty too where some labels are volumes of values, which need not be in that order.
    """
    if not labels or not all(map(is_object, labels)):
        return {}
    found = {"background": "background"}
    for name in (name for path in labels for name in dicom_objects.segment_names(path)):
        found.setdefault(dicom_objects.plain_name(name), name)
    return {name: value for value, name in enumerate(found.values())}


def unnamed(labels: Sequence[Path], classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Classes that no segment of any object is called as, and what segments that are no class are called."""
    return dicom_objects.unnamed(
        [n for p in labels for n in dicom_objects.segment_names(p)], classes
    )


def frame_grid(first: Path, second: Path) -> Header | None:
    """The grid of the first segmentation's frames, with slices for the second's; None if one has contours.

    Raises:
        DataError: It does not say where its frames lie.
        UsageError: What reads it is not installed.
    """
    return dicom_objects.frame_grid(first, second)
