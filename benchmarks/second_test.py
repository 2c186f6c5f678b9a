"""Compare two methods on ten training cases that both left unlabeled: a second look beside the test cases.

    python benchmarks/second_test.py RUN RUN RUN --other RUN RUN RUN --data FOLDER --record FILE.csv

RUN are finished run folders, a seed each, of one method; those after --other of another. The ten cases are
the first of the development list. Their labels had no part in training; but settings were chosen on the
list, so that it counts for less than the test cases, and its p is not adjusted for theirs. Rows of method,
preset, steps, seed, case and Dice go to the record, in the place of earlier ones of the same runs; the
difference of the seeds' averages, its interval over cases and Wilcoxon's p are printed.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from develop import score

from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.errors import UsageError
from vclipseg.runs import Run
from vclipseg.scores import write_rows
from vclipseg.statistics import Comparison, mean_over_seeds, paired_comparison

COLUMNS = ("settings_hash", "method", "preset", "steps", "seed", "case_id", "dice")
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
    add_rows(arguments.record, [row for of_run in rows for row in of_run])
    print(compare(rows[: len(both[0])], rows[len(both[0]) :]).claim)


def add_rows(record: Path, rows: list[dict]) -> None:
    """Rows of other runs stay."""
    hashes = {row["settings_hash"] for row in rows}
    kept = []
    if record.is_file():
        with record.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["settings_hash"] not in hashes]
    write_rows(record, COLUMNS, [*kept, *rows])


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
    about = {
        "settings_hash": run.settings_hash,
        "method": e.method_name,
        "preset": e.preset,
        "steps": e.train.steps,
        "seed": e.train.seed,
    }
    return [
        {**about, "case_id": case_id, "dice": dice}
        for case_id, dice in zip(case_ids, values, strict=True)
    ]


def compare(ours: list[list[dict]], others: list[list[dict]]) -> Comparison:
    """Each case averaged over the seeds, then paired."""
    tables = [
        np.array([[row["dice"] for row in of_run] for of_run in runs]) for runs in (ours, others)
    ]
    first, second = (f"{runs[0][0]['method']} ({runs[0][0]['preset']})" for runs in (ours, others))
    return paired_comparison(*(mean_over_seeds(table) for table in tables), names=(first, second))


if __name__ == "__main__":
    main()
