"""The values of a DICOM series, slice by slice.

GDCM, through SimpleITK, decodes them; each file's own rescale slope and intercept, or each frame's, are
applied, so that CT is in Hounsfield units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from vclipseg.data.dicom_headers import quietly, unreadable
from vclipseg.data.dicom_stack import Slice

if TYPE_CHECKING:
    from pydicom import Dataset

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


def read_pixels(slices: Sequence[Slice]) -> np.ndarray:
    """Rescaled values `(Z, Y, X)`, float32; a file of many frames is decoded once.

    Raises:
        SeriesError: A file cannot be decoded.
    """
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


def straightened(pixels: np.ndarray, shifts: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Slices `(Z, Y, X)` shifted by `(Z, 2)` pixels into a wider grid; around them is the least value."""
    x, y, z = shape
    least = pixels.min()
    wide = np.full((z, y, x), least, dtype=np.float32)
    wide[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    for image, (right, down) in zip(wide, shifts, strict=True):
        image[:] = ndimage.shift(image, (down, right), order=1, mode="constant", cval=least)
    return wide
