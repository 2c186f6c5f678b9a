"""Volumes with their geometry: reading, writing and reorienting.

Everywhere in the project an array is `(X, Y, Z)` as nibabel gives it, channels first, and
an affine takes voxel indices to RAS+ millimetres. `formats.py` holds what files do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vclipseg.data.formats import (
    IMAGE_SUFFIXES,
    WRITE_SUFFIXES,
    affine_spacing,
    image_suffix,
    is_series,
    read_geometry,
    read_voxels,
    strip_suffix,
    write_voxels,
)
from vclipseg.data.orientation import axes_and_flips, corners, turn, turn_affine, turn_back
from vclipseg.errors import DataError, UsageError
from vclipseg.files import replacing

__all__ = [
    "IMAGE_SUFFIXES",
    "SNAP_VOXELS",
    "WRITE_SUFFIXES",
    "Header",
    "Volume",
    "affine_spacing",
    "axes_and_flips",
    "corner_shift",
    "image_suffix",
    "read_header",
    "read_image",
    "read_labels",
    "reorient",
    "strip_suffix",
    "turn",
    "turn_affine",
    "turn_back",
    "with_values",
    "write",
]

SNAP_VOXELS = 1.0
"""Grids of one shape that are closer than this are meant to be one: headers got rounded."""


@dataclass(frozen=True, eq=False)
class Volume:
    """An image `(C, X, Y, Z)` or labels `(X, Y, Z)`, and where its voxels are.

    Attributes:
        array: The voxels.
        affine: `(4, 4)` float64, voxel indices to RAS+ mm.
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y and Z."""
        x, y, z = self.array.shape[-3:]
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along X, Y and Z, in mm."""
        return affine_spacing(self.affine)

    @property
    def orientation(self) -> str:
        """The world direction each axis is closest to, such as `"RAS"`."""
        from nibabel.orientations import aff2axcodes

        return "".join(aff2axcodes(self.affine))


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its volume, without the voxels."""

    shape: tuple[int, int, int]
    channels: int
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along X, Y and Z, in mm."""
        return affine_spacing(self.affine)


def read_header(path: str | Path) -> Header:
    """Read shape, channels and affine, not the voxels.

    Args:
        path: A file; a DICOM series by its folder, or by a file of it.

    Raises:
        DataError: The file is missing, unreadable or not a volume.
    """
    path = Path(path)
    if is_series(path):
        from vclipseg.data.dicom import read_stack

        return read_stack(path).header
    with _naming(path):
        return _header(*read_geometry(path))


def corner_shift(first: Header | Volume, second: Header | Volume) -> tuple[float, float]:
    """The largest distance between matching outer corners: in mm, and in voxels of the first."""
    shift = corners(second.shape, second.affine) - corners(first.shape, first.affine)  # (8, 3) mm
    voxels = shift @ np.linalg.inv(first.affine[:3, :3]).T
    return float(np.linalg.norm(shift, axis=1).max()), float(np.abs(voxels).max())


def read_image(paths: str | Path | Sequence[Path]) -> Volume:
    """Read an image as float32 `(C, X, Y, Z)`; channels with other axes are turned like the first.

    Args:
        paths: One file a channel, or one file with its channels in the last axis. A DICOM series is
            named by its folder, or by a file of it.

    Raises:
        DataError: A file is missing or unreadable, or does not lie where the first does.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]
    first, *others = [_read(path, "image") for path in files]
    if not others:
        return first
    channels = [_on_grid(o, p, first, files[0]) for o, p in zip(others, files[1:], strict=True)]
    return Volume(np.concatenate([first.array, *channels]), first.affine)


def _on_grid(channel: Volume, path: Path, first: Volume, first_path: Path) -> np.ndarray:
    """A channel's voxels in the order of the first one's."""
    if not np.allclose(channel.affine, first.affine):
        channel = reorient(channel, first.orientation)
    advice = "The channels of a case must share one grid: resample them to it."
    if channel.shape != first.shape:
        raise DataError(
            f"{path}: shape {channel.shape} differs from {first.shape} of {first_path.name}. {advice}"
        )
    mm, voxels = corner_shift(first, channel)
    if voxels >= SNAP_VOXELS:
        raise DataError(f"{path}: lies up to {mm:.3g} mm from {first_path.name}. {advice}")
    return channel.array


def read_labels(path: str | Path) -> Volume:
    """Read labels as integers `(X, Y, Z)`, values as stored.

    Floats that are integers are accepted, as many tools write such files.

    Raises:
        DataError: The file is missing, unreadable, has channels or holds fractions.
    """
    path = Path(path)
    volume = _read(path, "label")
    if len(volume.array) != 1:
        raise DataError(
            f"{path}: has {len(volume.array)} channels; labels are one volume of class values."
        )
    return Volume(_as_integers(volume.array[0], path), volume.affine)


def note_on_values(image: Volume, path: str | Path) -> str:
    """What to say of voxels that are no numbers (NaN or infinite); nothing where all are numbers.

    Raises:
        DataError: none is a number.
    """
    strange = image.array.size - np.count_nonzero(np.isfinite(image.array))
    if strange == image.array.size:
        raise DataError(f"{path}: no voxel is a number; get a fresh copy of it")
    if not strange:
        return ""
    return f"{strange} voxels are no numbers (NaN or infinite); they are taken for the lowest value there is"


def write(volume: Volume, path: str | Path, like: Path | None = None) -> None:
    """Write a volume whole or not at all, in the format its suffix names.

    Args:
        volume: What to write.
        path: Where.
        like: The file of the image whose grid this is. Of two NIfTI files the second has the places
            and units of the first: some have two places, of which programs choose differently.

    Raises:
        UsageError: The suffix is none of `WRITE_SUFFIXES`.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix not in WRITE_SUFFIXES:
        raise UsageError(
            f"{path}: volumes are written as {', '.join(WRITE_SUFFIXES)}; name the file so."
        )
    with replacing(path) as unfinished:
        write_voxels(_storable(volume.array), volume.affine, unfinished, like)


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """Permute and flip axes to the nearest match of an orientation. Loses nothing.

    Every voxel keeps its value and its place in the world.
    """
    axes, flips = axes_and_flips(volume.affine, orientation)
    array = np.ascontiguousarray(turn(volume.array, axes, flips))
    return Volume(array, turn_affine(volume.affine, volume.shape, axes, flips))


def with_values(mask: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Class indices to a data set's own label values, in a type that every viewer knows."""
    known = np.asarray(values)
    small = known.min() >= 0 and known.max() < 256
    return known[mask].astype(np.uint8 if small else np.int32)


def _read(path: Path, kind: str) -> Volume:
    """Read voxels as `(C, X, Y, Z)`: float32 for an image, as stored for a label."""
    if kind == "image" and is_series(path):
        from vclipseg.data.dicom import read_series

        return read_series(path)
    with _naming(path):
        array, affine = read_voxels(path, kind)
        header = _header(array.shape, affine)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"voxels of type {array.dtype} are not numbers on one scale")
        array = np.moveaxis(array.reshape(*header.shape, header.channels), -1, 0)
        dtype = np.float32 if kind == "image" else array.dtype
        return Volume(np.ascontiguousarray(array, dtype=dtype), header.affine)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what a reader raises into a `DataError` that names the file."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    if not image_suffix(path):
        raise DataError(f"{path}: not a known image file. Known are {', '.join(IMAGE_SUFFIXES)}.")
    try:
        yield
    except _unreadable() as error:
        raise DataError(
            f"{path}: cannot be read ({_reason(error)}). "
            "It may be truncated or not what its name says: get a fresh copy of it."
        ) from error


def _reason(error: Exception) -> str:
    """The one line of a reader's error that says something."""
    text = str(error).strip() or type(error).__name__
    return text.rpartition("ERROR: ")[2].splitlines()[0].strip(" .")


def _header(shape: Sequence[int], affine: np.ndarray) -> Header:
    """Check a shape `(X, Y, Z)`, `(X, Y, Z, C)` or, with one time point, `(X, Y, Z, 1, C)`."""
    sizes = [int(n) for n in shape]
    if len(sizes) == 5 and sizes[3] == 1:
        del sizes[3]
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"shape {tuple(sizes)} is not that of a 3-D volume")
    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError("its affine is not invertible, so that its voxels have no place")
    x, y, z, *channels = sizes
    return Header((x, y, z), channels[0] if channels else 1, affine)


def _as_integers(array: np.ndarray, path: Path) -> np.ndarray:
    """Labels in the smallest of uint8, int32 and int64 that holds them."""
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        if not np.allclose(array, rounded, atol=1e-3, rtol=0):
            raise DataError(
                f"{path}: holds values that are not integers. Is it an image or a probability "
                "map? Labels are integers; resample labels with nearest neighbour."
            )
        array = rounded
    for dtype in (np.uint8, np.int32):
        if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.int64)


def _storable(array: np.ndarray) -> np.ndarray:
    """Channels last `(X, Y, Z[, C])`, of a type that every format and viewer knows."""
    if array.ndim == 4:
        array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array.astype(np.int32) if array.dtype in (np.int64, np.uint64) else array


def _unreadable() -> tuple[type[Exception], ...]:
    """What readers raise where a file is damaged."""
    from nibabel.filebasedimages import ImageFileError

    return (
        OSError,
        EOFError,
        zlib.error,
        ImageFileError,
        ValueError,
        KeyError,
        RuntimeError,
    )
