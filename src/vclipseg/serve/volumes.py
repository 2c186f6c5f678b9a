"""Volumes as bytes of a NIfTI file, made in memory."""

from __future__ import annotations

import gzip
import hashlib

import nibabel as nib
import numpy as np

from vclipseg.data.volume import Volume

NIFTI = "application/gzip"
DICOM = "application/dicom"
LEVEL = 1
"""Of the compression: what is sent once is better sent soon."""


def nifti_bytes(volume: Volume) -> bytes:
    """A volume (X, Y, Z) as the content of a .nii.gz file."""
    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    image = nib.Nifti1Image(array, volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code="scanner")
    image.set_qform(volume.affine, code="scanner")
    return gzip.compress(image.to_bytes(), compresslevel=LEVEL, mtime=0)


def etag(content: bytes) -> str:
    """Tells a browser whether what it has is still what is there."""
    return f'"{hashlib.sha256(content).hexdigest()[:24]}"'


def percent(volume: Volume) -> Volume:
    """A map in [0, 1] as whole percents, uint8."""
    return Volume(np.rint(100 * volume.array).clip(0, 100).astype(np.uint8), volume.affine)
