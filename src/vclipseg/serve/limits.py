"""How much of a scan is taken, and what its name may look like."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from vclipseg.errors import UsageError, VclipsegError


@dataclass(frozen=True)
class ScanLimits:
    """What is taken.

    Attributes:
        voxels: of one image, all channels; also after it is resampled for the model.
        unpacked_bytes: of an archive.
        files: in an archive or a request.
        kept_bytes: of all scans kept; the oldest go first.
        kept: scans kept.
    """

    voxels: int = 2**28
    unpacked_bytes: int = 2**31
    files: int = 5000
    kept_bytes: int = 2**33
    kept: int = 50


class TooMuch(UsageError):
    """More than the limits allow."""


class NoSpace(VclipsegError):
    """The server's disk is full."""

    def __init__(self) -> None:
        super().__init__("no space is left on the server; try again later, or tell who runs it")


def is_full(error: OSError) -> bool:
    """Whether it says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def shown_name(name: str | None) -> str:
    """The last part of a name as people may see it, of plain characters."""
    last = re.split(r"[/\\]", name or "")[-1]
    return re.sub(r"[^\w .()+-]+", "_", last)[:80].strip(". ") or "scan"
