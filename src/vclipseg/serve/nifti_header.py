"""What the first bytes of a NIfTI file promise, before anything reads its voxels."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

from vclipseg.data.volume import Header, read_header
from vclipseg.errors import DataError
from vclipseg.serve.limits import ScanLimits, TooMuch, shown_name

NIFTI_TYPES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)
"""Codes of integers and floats of one number a voxel."""
LARGEST_OFFSET = 2**24
"""Bytes before the voxels of a NIfTI file: header and extensions."""


def check_nifti(path: Path, limits: ScanLimits, name: str) -> Header:
    """Hold the header of a NIfTI file against the limits; no voxel is read.

    Raises:
        DataError: it is damaged, no NIfTI file in one piece, or not of plain numbers.
        TooMuch: it has too many voxels.
    """
    shown = shown_name(name)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(540)
        shape, code, offset = nifti_facts(raw)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"{shown}: not a NIfTI file in one piece ({error})") from error
    voxels = 1
    for size in shape:
        voxels *= max(size, 0)
    if not 3 <= len(shape) <= 5 or voxels < 1:
        raise DataError(f"{shown}: shape {shape} is not that of a 3-D volume")
    if voxels > limits.voxels:
        raise TooMuch(f"{shown}: {voxels} voxels; up to {limits.voxels} are taken")
    if code not in NIFTI_TYPES or not 0 <= offset <= LARGEST_OFFSET:
        raise DataError(f"{shown}: voxels of type {code} at byte {offset} are not read")
    try:
        return read_header(path)
    except DataError as error:
        raise DataError(str(error).replace(str(path), shown)) from error


def nifti_facts(raw: bytes) -> tuple[tuple[int, ...], int, float]:
    """Shape, type of voxels, and where they begin, of the first bytes of a file.

    Raises:
        ValueError: it is no NIfTI-1 or NIfTI-2 file.
    """
    for order in "<>":
        if raw[:4] == struct.pack(f"{order}i", 348) and raw[344:348] == b"n+1\0":
            sizes = struct.unpack(f"{order}8h", raw[40:56])
            (code,) = struct.unpack(f"{order}h", raw[70:72])
            (offset,) = struct.unpack(f"{order}f", raw[108:112])
        elif raw[:4] == struct.pack(f"{order}i", 540) and raw[4:8] == b"n+2\0":
            sizes = struct.unpack(f"{order}8q", raw[16:80])
            (code,) = struct.unpack(f"{order}h", raw[12:14])
            (offset,) = struct.unpack(f"{order}q", raw[168:176])
        else:
            continue
        if not 1 <= sizes[0] <= 7:
            raise ValueError(f"{sizes[0]} dimensions")
        return tuple(sizes[1 : 1 + sizes[0]]), code, offset
    raise ValueError("its first bytes are those of something else")
