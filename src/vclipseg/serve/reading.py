"""From files that were sent to a volume.

DICOM is decoded in a process of its own: a damaged file may end that, but not the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from vclipseg.data.preprocess import Plan
from vclipseg.data.volume import Header, Volume, read_header, read_image, write
from vclipseg.errors import DataError
from vclipseg.serve.incoming import Scan
from vclipseg.serve.limits import ScanLimits, TooMuch

DICOM_SECONDS = 300
DAMAGED = "cannot be read as a DICOM series; it may be damaged"


def read_scan(scan: Scan, plan: Plan, limits: ScanLimits) -> Volume:
    """The image (C, X, Y, Z) of a scan, kept beside it for viewers.

    Raises:
        DataError: it cannot be read, or has values that are no numbers.
        TooMuch: it is larger than the limits, as it is or as the model sees it.
    """
    with scan.lock:
        if scan.kind == "dicom" and not scan.image_path.is_file():
            convert(scan, limits)
        files = [scan.image_path] if scan.kind == "dicom" else scan.files
        check_prepared([read_header(file) for file in files], plan, limits)
        try:
            volume = read_image(files)
        except DataError as error:
            raise DataError(_own_names(str(error), scan)) from error
        if not np.isfinite(volume.array).all():
            raise DataError(f"{scan.name}: has voxels that are no numbers (NaN or infinite)")
        if not scan.image_path.is_file():
            scan.refuse_if_forgotten()
            write(Volume(volume.array[0], volume.affine), scan.image_path)
    return volume


def check_prepared(headers: Sequence[Header], plan: Plan, limits: ScanLimits) -> None:
    """Refuse what has other channels, or would be too large when resampled: a header may say any spacing."""
    channels = sum(header.channels for header in headers)
    if channels != len(plan.intensity):
        raise DataError(
            f"this model reads images of {len(plan.intensity)} channel(s); {channels} were sent in "
            f"{len(headers)} file(s). Send one scan at a time."
        )
    extent_mm = np.max([np.array(header.shape) * header.spacing for header in headers], axis=0)
    voxels = np.prod(np.maximum(1.0, extent_mm / plan.spacing)) * channels
    if not voxels <= limits.voxels:
        raise TooMuch(
            f"{' x '.join(f'{mm:.4g}' for mm in extent_mm)} mm would be {voxels:.3g} voxels for this "
            f"model; up to {limits.voxels} are taken. Is its spacing right?"
        )


def convert(scan: Scan, limits: ScanLimits) -> None:
    """Decode a DICOM series into the scan's image, in another process.

    Raises:
        DataError: it is no regular series, or the process came to an end.
    """
    sent = scan.folder / "sent"
    in_own_process(scan, "vclipseg.serve.decode", sent, scan.image_path, limits.voxels)
    if not scan.image_path.is_file():
        raise DataError(f"{scan.name}: {DAMAGED}")


def in_own_process(scan: Scan, module: str, *arguments: object) -> None:
    """Run a module that reads DICOM files of a scan; they may end it, but not the server.

    Raises:
        DataError: it says why it cannot, or it came to an end.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=DICOM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{scan.name}: took too long to read") from error
    if done.returncode == 3:
        raise DataError(_own_names(done.stderr.strip(), scan))
    if done.returncode:
        raise DataError(f"{scan.name}: {DAMAGED}")


def _own_names(message: str, scan: Scan) -> str:
    """A message without the server's paths."""
    sent = str(scan.folder / "sent")
    return message.replace(sent + os.sep, "").replace(sent, scan.name)
