"""The folder of what people send: it goes when the server ends, or, if it was killed, when the next begins.

A file in it is locked as long as the server lives.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows a folder that was left stays
    fcntl = None  # type: ignore[assignment]

PREFIX = "vclipseg-serve-"
LOCK = ".lock"


class TemporaryFolder:
    """A folder of this process alone, in the system's folder of such."""

    def __init__(self) -> None:
        remove_abandoned()
        self._made = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._made.name)
        self._lock = _locked(self.path)

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        self._made.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned() -> None:
    """Remove the folders of servers of this user that were killed."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """The folder's lock, seen by others only once it is held."""
    if fcntl is None:
        return None
    unfinished = folder / f"{LOCK}.unfinished"
    lock = os.open(unfinished, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unfinished.rename(folder / LOCK)
    return lock


def _is_abandoned(folder: Path) -> bool:
    """Whether its server is gone; one without a lock is being made, or is another's."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
