"""DICOM to NIfTI, in a process of its own and with bounded memory.

    python -m vclipseg.serve.decode SENT OUT VOXELS

Ends with 3, and the reason on stderr, if the folder SENT is not one regular series of up to VOXELS voxels.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from vclipseg.data.dicom import read_series, read_stack
from vclipseg.data.volume import write
from vclipseg.errors import DataError

MEMORY = 6 * 2**30
"""Bytes of address space."""


def main(sent: str, out: str, voxels: str) -> int:
    """Convert a folder; returns the exit code."""
    limit_memory(MEMORY)
    try:
        stack = read_stack(sent)
        if math.prod(stack.header.shape) > int(voxels):
            shape = " x ".join(map(str, stack.header.shape))
            raise DataError(f"{shape} voxels; up to {voxels} are taken")
        image = read_series(sent)
        if not Path(sent).is_dir():
            raise DataError(f"{sent}: was forgotten meanwhile")
        write(image, Path(out))
    except DataError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def limit_memory(size: int) -> None:
    """Where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
