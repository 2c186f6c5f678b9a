"""Files to send: good ones and bad ones."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile

import numpy as np

from vclipseg.data.phantom import phantom_case
from vclipseg.data.volume import Volume
from vclipseg.serve.volumes import nifti_bytes


def nifti(shape=(24, 24, 18), spacing=4.0) -> bytes:
    """A phantom as .nii.gz."""
    image, _ = phantom_case(0, 5, shape, spacing)
    return nifti_bytes(Volume(image.array[0].astype(np.int16), image.affine))


def mask(like: bytes, value: int = 1) -> bytes:
    """A box of `value` on the grid of another file."""
    import nibabel as nib

    image = nib.Nifti1Image.from_bytes(gzip.decompress(like))
    array = np.zeros(image.shape, np.uint8)
    array[4:10, 4:10, 4:10] = value
    return nifti_bytes(Volume(array, image.affine))


def with_header(content: bytes, *changes: tuple[int, str, object]) -> bytes:
    """An unpacked NIfTI with other values at byte offsets: (offset, struct code, value)."""
    raw = bytearray(gzip.decompress(content))
    for offset, code, value in changes:
        struct.pack_into("<" + code, raw, offset, value)
    return bytes(raw)


def archive(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return buffer.getvalue()


def fake_dicom(size: int = 200) -> bytes:
    """Begins like DICOM and is none."""
    return b"\0" * 128 + b"DICM" + b"\0" * size


def hostile() -> dict[str, bytes]:
    """Name -> what should be refused."""
    good = nifti()
    return {
        "empty.nii.gz": b"",
        "text.nii": b"hello" * 100,
        "pickle.nii.gz": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
        "cut.nii.gz": good[:400],
        "cut.nii": gzip.decompress(good)[:400],
        "only-header.nii": gzip.decompress(good)[:352],
        "huge.nii": with_header(good, (42, "h", 32767), (44, "h", 32767), (46, "h", 32767)),
        "negative.nii": with_header(good, (42, "h", -5)),
        "flat.nii": with_header(good, (40, "h", 2)),
        "many-dimensions.nii": with_header(good, (40, "h", 200)),
        "complex.nii": with_header(good, (70, "h", 32), (72, "h", 64)),
        "rgb.nii": with_header(good, (70, "h", 128), (72, "h", 24)),
        "no-type.nii": with_header(good, (70, "h", 9999)),
        "far-voxels.nii": with_header(good, (108, "f", 3e38)),
        "nan-offset.nii": with_header(good, (108, "f", float("nan"))),
        "two-files.nii": with_header(good, (344, "4s", b"ni1\0")),
        "no-affine.nii": with_header(good, *((280 + 4 * i, "f", 0.0) for i in range(12))),
        "nan-affine.nii": with_header(good, (280, "f", float("nan"))),
        "bad-gzip.nii.gz": b"\x1f\x8b" + b"\xff" * 500,
        "bad.zip": b"PK\x03\x04" + b"\xff" * 500,
        "no-dicom.zip": archive({"a.txt": b"hello", "../../evil.txt": b"x"}),
        "nested.zip": archive({"a.zip": archive({"a.dcm": fake_dicom()})}),
        "bomb.zip": archive({f"{i}.dcm": b"\0" * 10_000_000 for i in range(12)}),
        "rare.zip": archive({"a.dcm": fake_dicom()}, zipfile.ZIP_LZMA),
        "many.zip": archive({f"{i}.dcm": b"" for i in range(200)}),
    }
