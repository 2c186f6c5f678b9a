"""Errors a person can act on: what happened, in which file, what to do next."""

from __future__ import annotations

import errno

NOT_OURS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""What a system refuses for reasons of its own: rights, a full disk, a folder where a file is to be."""


class VclipsegError(Exception):
    """Base of every error the command line prints without a traceback."""

    exit_code = 1


class UsageError(VclipsegError):
    """The request does not make sense: a wrong option, a missing file, an unknown name."""

    exit_code = 2


class DataError(VclipsegError):
    """The data cannot be trusted or read."""

    exit_code = 3


class OutOfMemory(VclipsegError):
    """Not enough memory, after every fallback."""

    exit_code = 5


class Stopped(VclipsegError):
    """The run was asked to stop; a checkpoint is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def refusal(error: OSError) -> UsageError | None:
    """What the system refused, as an error a person can act on; None where it may be our fault."""
    if error.errno not in NOT_OURS:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return UsageError(f"{where}{error.strerror}; see to it, or give another place")
