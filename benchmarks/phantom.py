"""The data of recipes/phantom-4: made-up hearts with three labeled structures, of nobody.

    python benchmarks/phantom.py FOLDER
    python benchmarks/phantom.py FOLDER --second-test OTHER

4 labeled cases, 40 unlabeled and 20 test cases: left atrium, left ventricle and aorta. OTHER gets the first
ten of the unlabeled ones again, with their labels, for `second_test.py`; nothing is trained with it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from second_test import CASES as SECOND_TEST

from vclipseg.data.phantom import STARTS, make_phantom, phantom_case
from vclipseg.data.volume import Volume, write

CASES = {"labeled": 4, "unlabeled": 40, "test": 20}
CLASSES = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--second-test", type=Path)
    arguments = parser.parse_args()
    print(make_phantom(arguments.folder, **CASES, classes=CLASSES))
    if arguments.second_test:
        write_unlabeled(arguments.second_test, SECOND_TEST)
        shutil.copy(arguments.folder / "dataset.json", arguments.second_test)
        print(arguments.second_test)


def write_unlabeled(root: Path, count: int) -> None:
    """The first unlabeled cases with their labels."""
    for index in range(STARTS["unlabeled"], STARTS["unlabeled"] + count):
        image, labels = phantom_case(0, index, classes=CLASSES)
        name = f"phantom_{index:04}"
        stored = Volume(image.array.astype(np.int16), image.affine)
        write(stored, root / "imagesTr" / f"{name}_0000.nii.gz")
        write(labels, root / "labelsTr" / f"{name}.nii.gz")


if __name__ == "__main__":
    main()
