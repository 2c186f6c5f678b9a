"""The data of recipes/phantom-4: made-up hearts with three labeled structures, of nobody.

    python benchmarks/phantom.py FOLDER

4 labeled cases, 40 unlabeled and 20 test cases: left atrium, left ventricle and aorta.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vclipseg.data.phantom import make_phantom

CASES = {"labeled": 4, "unlabeled": 40, "test": 20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(make_phantom(parser.parse_args().folder, **CASES, classes=3))


if __name__ == "__main__":
    main()
