"""Compare two methods on ten training cases that both left unlabeled: a second test beside the test cases.

    python benchmarks/second_test.py RUN RUN RUN --other RUN RUN RUN --data FOLDER --record FILE.csv

RUN are finished run folders, a seed each, of one method; those after --other of another. The ten cases are
the first of the development list. Their labels had no part in training; but settings were chosen on the
list, so that it counts for less than the test cases. Rows of method, preset, seed, case and Dice go to the
record; the difference of the seeds' averages, its interval over cases and Wilcoxon's p are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from develop import score

from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.errors import UsageError
from vclipseg.runs import Run
from vclipseg.scores import write_rows
from vclipseg.statistics import Comparison, mean_over_seeds, paired_comparison

COLUMNS = ("method", "preset", "seed", "case_id", "dice")
CASES = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--other", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=CASES)
    arguments = parser.parse_args()
    both = [
        [Run.open(folder) for folder in folders] for folders in (arguments.runs, arguments.other)
    ]
    case_ids = shared_cases([run for runs in both for run in runs], arguments.cases)
    rows = [rows_of(run, arguments.data, case_ids) for runs in both for run in runs]
    write_rows(arguments.record, COLUMNS, [row for of_run in rows for row in of_run])
    print(compare(rows[: len(both[0])], rows[len(both[0]) :]).claim)


def shared_cases(runs: list[Run], count: int) -> list[str]:
    """The first cases that all left unlabeled.

    Raises:
        UsageError: the runs have different lists.
    """
    lists = {run.split.unlabeled for run in runs}
    if len(lists) > 1:
        raise UsageError("the runs leave different cases unlabeled")
    return list(lists.pop()[:count])


def rows_of(run: Run, data: Path, case_ids: list[str]) -> list[dict]:
    """Dice of a run on each case."""
    e = run.experiment
    names, stored = e.data.class_names, e.data.label_values
    dataset = open_dataset(data, class_names=names, label_values=stored)
    values = score(run.folder, dataset, tuple(case_ids), Console())
    about = {"method": e.method_name, "preset": e.preset, "seed": e.train.seed}
    return [
        {**about, "case_id": case_id, "dice": dice}
        for case_id, dice in zip(case_ids, values, strict=True)
    ]


def compare(ours: list[list[dict]], others: list[list[dict]]) -> Comparison:
    """Each case averaged over the seeds, then paired."""
    tables = [
        np.array([[row["dice"] for row in of_run] for of_run in runs]) for runs in (ours, others)
    ]
    names = (ours[0][0]["method"], others[0][0]["method"])
    return paired_comparison(*(mean_over_seeds(table) for table in tables), names=names)


if __name__ == "__main__":
    main()
