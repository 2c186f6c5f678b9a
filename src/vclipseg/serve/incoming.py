"""Files that people send: looked at before anything reads them, kept in a temporary folder.

Only NIfTI in one file, DICOM, and zip archives of DICOM are taken. The name that a file comes with is
never part of a path. What a header promises is held against the limits before voxels are read.
"""

from __future__ import annotations

import math
import secrets
import shutil
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from vclipseg.errors import DataError, UsageError
from vclipseg.serve.limits import NoSpace, ScanLimits, TooMuch, is_full, shown_name
from vclipseg.serve.nifti_header import check_nifti

GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
PIECE = 2**20
Kind = Literal["nifti", "dicom"]


@dataclass
class Scan:
    """Something that was sent, and what was made of it.

    Attributes:
        id: its name in addresses.
        name: what the person calls it; shown, never a path.
        kind: `nifti`: a file a channel, or one with all; `dicom`: the files of a series.
        in_use: jobs that work on it.
        forgotten: nobody may ask for it any more, and nothing is to be written for it.
    """

    id: str
    name: str
    kind: Kind
    folder: Path
    in_use: int = 0
    forgotten: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def files(self) -> list[Path]:
        """What was sent, in order."""
        return sorted((self.folder / "sent").iterdir())

    @property
    def image_path(self) -> Path:
        """The image as it was read."""
        return self.folder / "image.nii.gz"

    def mask_path(self, run_id: str) -> Path:
        """The mask that a run's model made of it."""
        return self.folder / f"mask-{run_id}.nii.gz"

    def refuse_if_forgotten(self) -> None:
        """Before something is written for it.

        Raises:
            UsageError: somebody forgot it.
        """
        if self.forgotten:
            raise UsageError(f"{self.name}: was forgotten meanwhile")

    @property
    def size(self) -> int:
        """Bytes on the disk; 0 if it was forgotten meanwhile, by another request."""
        try:
            return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        except FileNotFoundError:
            return 0


class Scans:
    """Scans kept in a folder, the oldest forgotten first."""

    def __init__(self, folder: Path, limits: ScanLimits) -> None:
        self.folder, self.limits = folder, limits
        self.known: OrderedDict[str, Scan] = OrderedDict()
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sent: Sequence[tuple[str, IO[bytes]]]) -> Scan:
        """Keep what was sent, if it is something that can be read.

        Args:
            sent: names and contents.

        Raises:
            UsageError: it is nothing that is taken, or several things.
            TooMuch: it is more than the limits allow.
            DataError: it is damaged.
            NoSpace: the disk is full.
        """
        if not 0 < len(sent) <= self.limits.files:
            raise TooMuch(f"send 1 to {self.limits.files} files, not {len(sent)}")
        scan_id = secrets.token_hex(16)
        folder = self.folder / scan_id
        (folder / "sent").mkdir(parents=True)
        try:
            kind = take_in(sent, folder / "sent", self.limits)
            scan = Scan(scan_id, shown_name(sent[0][0]), kind, folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and is_full(error):
                raise NoSpace from error
            raise
        with self.lock:
            self.known[scan_id] = scan
        self.forget_oldest()
        return scan

    def get(self, scan_id: str) -> Scan | None:
        """A scan by id, which is then the newest."""
        with self.lock:
            if scan_id in self.known:
                self.known.move_to_end(scan_id)
            return self.known.get(scan_id)

    def hold(self, scan: Scan) -> None:
        """A job is to work on a scan."""
        with self.lock:
            scan.in_use += 1

    def release(self, scan: Scan) -> None:
        """The job has ended; what it wrote for a scan that was forgotten meanwhile goes too."""
        with self.lock:
            scan.in_use -= 1
        if scan.forgotten:
            shutil.rmtree(scan.folder, ignore_errors=True)

    def remove(self, scan_id: str) -> bool:
        """Forget a scan; False if there is none."""
        with self.lock:
            scan = self.known.pop(scan_id, None)
        if scan:
            scan.forgotten = True
            shutil.rmtree(scan.folder, ignore_errors=True)
        return scan is not None

    def close(self) -> None:
        """Forget all."""
        for scan_id in list(self.known):
            self.remove(scan_id)

    def forget_oldest(self) -> None:
        """Hold to the limits; what a job works on is left."""
        with self.lock:
            scans = list(self.known.values())
        total, kept = sum(s.size for s in scans), len(scans)
        for scan in scans[:-1]:
            if total <= self.limits.kept_bytes and kept <= self.limits.kept:
                return
            if not scan.in_use:
                total, kept = total - scan.size, kept - 1
                self.remove(scan.id)


def take_in(sent: Sequence[tuple[str, IO[bytes]]], folder: Path, limits: ScanLimits) -> Kind:
    """Write what was sent into a folder, under names of our own; returns what it is."""
    kinds = [recognize(name, file) for name, file in sent]
    if kinds == ["zip"]:
        unpack(sent[0][1], folder, limits)
        return "dicom"
    if set(kinds) == {"dicom"}:
        for number, (_, file) in enumerate(sent):
            copy(file, folder / f"{number:06d}.dcm", limits.unpacked_bytes)
        return "dicom"
    if not set(kinds) <= {"nii", "nii.gz"}:
        raise UsageError("send one zip archive, or DICOM files, or NIfTI files (a file a channel)")
    order = sorted(range(len(sent)), key=lambda i: sent[i][0])
    voxels = 0
    for number, i in enumerate(order):
        path = folder / f"{number:06d}.{kinds[i]}"
        copy(sent[i][1], path, limits.unpacked_bytes)
        header = check_nifti(path, limits, sent[i][0])
        voxels += math.prod(header.shape) * header.channels
        if voxels > limits.voxels:
            raise TooMuch(f"{len(sent)} files of more than {limits.voxels} voxels; send one scan")
    return "nifti"


def recognize(name: str, file: IO[bytes]) -> str:
    """`zip`, `dicom`, `nii` or `nii.gz`, by the first bytes.

    Raises:
        UsageError: it is none of them.
    """
    start = file.read(132)
    file.seek(0)
    if start.startswith(ZIP):
        return "zip"
    if start[128:] == b"DICM":
        return "dicom"
    if start.startswith(GZIP):
        return "nii.gz"
    if len(start) >= 4 and {*struct.unpack("<i", start[:4]), *struct.unpack(">i", start[:4])} & {
        348,
        540,
    }:
        return "nii"
    raise UsageError(
        f"{shown_name(name)}: not a NIfTI file (.nii, .nii.gz), a DICOM file or a zip archive of them"
    )


def copy(file: IO[bytes], path: Path, limit: int) -> None:
    """Copy up to `limit` bytes to a new file."""
    written = 0
    with path.open("xb") as out:
        while piece := file.read(PIECE):
            written += len(piece)
            if written > limit:
                raise TooMuch(f"more than {limit / 2**20:g} MiB unpacked")
            out.write(piece)


def unpack(file: IO[bytes], folder: Path, limits: ScanLimits) -> None:
    """Unpack the DICOM files of an archive, whatever their names and folders in it.

    Raises:
        DataError: it is damaged, encrypted, or has no DICOM file in it.
        TooMuch: it has too many files, or they are too large; what it says of their sizes is not believed.
    """
    left = limits.unpacked_bytes
    found = 0
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) > limits.files:
                raise TooMuch(
                    f"{len(members)} files in the archive; up to {limits.files} are taken"
                )
            for member in members:
                if member.flag_bits & 1 or member.compress_type not in (0, zipfile.ZIP_DEFLATED):
                    raise DataError(
                        "the archive is encrypted or packed in a rare way; zip it again"
                    )
                path = folder / f"{found:06d}.dcm"
                with archive.open(member) as packed:
                    copy(packed, path, left)
                left -= path.stat().st_size
                if is_dicom_file(path):
                    found += 1
                else:
                    path.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and is_full(error):
            raise
        raise DataError(f"the archive is damaged ({error})") from error
    if not found:
        raise DataError("no DICOM file in the archive; zip the folder of one series")


def is_dicom_file(path: Path) -> bool:
    """Whether it begins as DICOM files do."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
