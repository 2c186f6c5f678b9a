"""Where two voxel grids lie relative to each other in the world, and moving labels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform

from vclipseg.data.orientation import corners, transform
from vclipseg.data.volume import (
    SNAP_VOXELS,
    Header,
    Volume,
    axes_and_flips,
    corner_shift,
    reorient,
    turn_affine,
)

SAME_GRID_VOXELS = 1e-3
"""Grids closer than this are one: headers store about six digits."""


def header_of(volume: Volume) -> Header:
    """The geometry of a volume in memory."""
    channels = len(volume.array) if volume.array.ndim == 4 else 1
    return Header(volume.shape, channels, volume.affine)


def orientation(header: Header) -> str:
    """The world direction each axis is closest to, such as `"RAS"`."""
    return "".join(nib.orientations.aff2axcodes(header.affine))


def turned(header: Header, axes: str) -> Header:
    """The header that a lossless `reorient` of its volume to `axes` would have."""
    order, flips = axes_and_flips(header.affine, axes)
    x, y, z = (header.shape[a] for a in order)
    affine = turn_affine(header.affine, header.shape, order, flips)
    return replace(header, shape=(x, y, z), affine=affine)


def turned_like(labels: Volume, image: Header) -> Volume:
    """Labels with their axes turned as those of an image, without loss.

    For DICOM series, whose axes most programs turn when they make a volume of one.
    """
    return reorient(labels, orientation(image))


def same_grid(first: Header, second: Header) -> bool:
    """Whether voxels of equal index lie at the same place, but for rounding in the headers."""
    return first.shape == second.shape and corner_shift(first, second)[1] < SAME_GRID_VOXELS


def overhang(inner: Header, outer: Header) -> float:
    """How far in mm `inner` reaches beyond `outer`; 0 if all its voxel centers lie inside."""
    return _outside_mm(inner, outer, margin=0.5) if _outside_mm(inner, outer, margin=0.0) else 0.0


def _outside_mm(inner: Header, outer: Header, margin: float) -> float:
    index = transform(np.linalg.inv(outer.affine), corners(inner.shape, inner.affine, margin))
    last = np.asarray(outer.shape) - 1
    outside = np.maximum(-index, index - last) - 0.5  # in voxels of outer
    outside[outside < SAME_GRID_VOXELS] = 0
    return float((outside * outer.spacing).max())


def has_geometry(header: Header) -> bool:
    """Whether an affine says more than the default of a file that nobody gave one.

    The default is 1 mm along the axes, with the origin at the first voxel or in the middle.
    """
    axes, origin = header.affine[:3, :3], np.abs(header.affine[:3, 3])
    middle = (np.asarray(header.shape) - 1) / 2
    unit = np.allclose(np.abs(axes), np.eye(3), atol=1e-6)
    return not (unit and (np.allclose(origin, 0) or np.allclose(origin, middle)))


def fit_labels(labels: Volume, image: Header) -> Volume:
    """Labels `(X, Y, Z)` on the grid of an image.

    Axes are turned without loss; a grid of the same shape less than a voxel away gets the
    image's affine; any other is resampled in world space, nearest neighbour.
    """
    labels = reorient(labels, orientation(image))
    header = header_of(labels)
    if header.shape == image.shape and corner_shift(image, header)[1] < SNAP_VOXELS:
        return Volume(labels.array, image.affine)
    to_labels = np.linalg.inv(labels.affine) @ image.affine  # image index -> label index
    array = affine_transform(
        labels.array,
        to_labels[:3, :3],
        to_labels[:3, 3],
        output_shape=image.shape,
        order=0,
        mode="nearest",
    )
    return Volume(array, image.affine)


def describe_difference(what: str, header: Header, other: str, reference: Header, mm: float) -> str:
    """How two grids differ, beginning with what a person would notice first.

    `what` and `other` name what the two headers are of, as in "label" and "the image"; `mm`
    is their `corner_shift` after turning the axes alike.
    """
    parts, turned_alike = [], ""
    if header.shape != reference.shape:
        parts.append(f"{_triple(header.shape)} voxels, {other} {_triple(reference.shape)}")
    if not np.allclose(header.spacing, reference.spacing, rtol=1e-3):
        parts.append(f"spacing {_triple(header.spacing)} mm, {other} {_triple(reference.spacing)}")
    if orientation(header) != orientation(reference):
        parts.append(f"axes {orientation(header)}, {other} {orientation(reference)}")
        turned_alike = ", turned alike,"
    parts.append(f"corners{turned_alike} up to {format_mm(mm)} mm from {other}'s")
    return f"the {what} has " + "; ".join(parts)


def _triple(values: Sequence[float]) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def format_mm(value: float) -> str:
    """Two digits below 1 mm; nothing below what headers can store."""
    if value < 5e-4:
        return "0"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
