"""A mask as a DICOM object of the series that was sent, in a process of its own and with bounded memory.

    python -m vclipseg.serve.encode SENT MASK OUT KIND METHOD CLASS ...

Ends with 3, and the reason on stderr, if there can be none. CLASS ... are class names, background first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vclipseg.data.dicom import series_files
from vclipseg.data.dicom_objects import dicom_writer
from vclipseg.data.volume import read_labels
from vclipseg.errors import DataError, UsageError
from vclipseg.serve.decode import MEMORY, limit_memory


def main(sent: str, mask: str, out: str, kind: str, method: str, *class_names: str) -> int:
    """Write an object; returns the exit code."""
    limit_memory(MEMORY)
    try:
        files = [file.path for file in series_files(sent)]
        write = dicom_writer(kind, files, class_names, method=method)
        write(read_labels(mask), Path(out))
    except (DataError, UsageError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
