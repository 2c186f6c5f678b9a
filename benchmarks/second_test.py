"""Compare methods on ten training cases that all left unlabeled: a second look beside the test cases.

    python benchmarks/second_test.py RUN [RUN ...] --data FOLDER --record FILE.csv

RUN are finished run folders, a seed of a method each. The ten cases are the first of the development list.
Their labels had no part in training; but settings were chosen on the list, so that it counts for less than
the test cases, and its p is adjusted after Holm for the methods it is asked of, not for theirs. A row of
each run and case goes to the record, in the place of earlier ones of the same run: what it lacks can be
added later. Then the method of the first RUN is compared with each other one of the record: the difference
of the averages over the seeds that both have, its interval over cases and Wilcoxon's p are printed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from develop import read_rows, score, trained_on

from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.errors import UsageError
from vclipseg.runs import Run
from vclipseg.scores import write_rows
from vclipseg.statistics import Comparison, adjust, mean_over_seeds, paired_comparison

COLUMNS = (
    *("settings_hash", "dataset", "method", "preset", "steps", "seed", "case_id", "dice"),
    *("device", "commit"),
)
CASES = 10


class Asked(NamedTuple):
    """What runs of different seeds have in common."""

    dataset: str
    method: str
    preset: str
    steps: str


Scores = dict[int, dict[str, float]]
"""Seed -> case -> Dice."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=CASES)
    arguments = parser.parse_args()
    runs = [Run.open(folder) for folder in arguments.runs]
    rows = [row for run in runs for row in rows_of(run, arguments.data, arguments.cases)]
    add_rows(arguments.record, rows)
    found = read_scores(arguments.record)
    for comparison in comparisons(found, asked(rows[0])).values():
        print(comparison.claim)


def rows_of(run: Run, data: Path, count: int) -> list[dict]:
    """Dice of a run on the first cases that it left unlabeled."""
    e = run.experiment
    dataset = open_dataset(data, classes=run.classes)
    case_ids = run.split.unlabeled[:count]
    values = score(run.folder, dataset, case_ids, Console())
    about = {
        "settings_hash": run.settings_hash,
        "dataset": e.name,
        "method": e.method_name,
        "preset": e.preset,
        "steps": e.train.steps,
        "seed": e.train.seed,
        **trained_on(run),
    }
    return [
        {**about, "case_id": case_id, "dice": dice}
        for case_id, dice in zip(case_ids, values, strict=True)
    ]


def add_rows(record: Path, rows: list[dict]) -> None:
    """Rows of other runs stay."""
    hashes = {row["settings_hash"] for row in rows}
    kept = [row for row in read_rows(record) if row["settings_hash"] not in hashes]
    write_rows(record, COLUMNS, [*kept, *rows])


def asked(row: dict) -> Asked:
    """Of a row, new or read."""
    return Asked(*(str(row[column]) for column in Asked._fields))


def read_scores(record: Path) -> dict[Asked, Scores]:
    """What the record holds, methods in the order of their first rows.

    Raises:
        UsageError: two runs of one method, preset, length and seed; they may differ in other settings.
    """
    found: dict[Asked, Scores] = defaultdict(lambda: defaultdict(dict))
    runs: dict[tuple[Asked, str], str] = {}
    for row in read_rows(record):
        same = runs.setdefault((asked(row), row["seed"]), row["settings_hash"])
        if same != row["settings_hash"]:
            raise UsageError(
                f"{record}: two runs ({same}, {row['settings_hash']}) of {row['method']} ({row['preset']}), "
                f"seed {row['seed']}, are one method here; give each a record of its own"
            )
        found[asked(row)][int(row["seed"])][row["case_id"]] = float(row["dice"])
    return dict(found)


def comparisons(found: dict[Asked, Scores], ours: Asked) -> dict[Asked, Comparison]:
    """Of `ours` with each other method on the same data, over the seeds that both have, p after Holm.

    Raises:
        UsageError: the runs left different cases unlabeled.
    """
    others = [a for a in found if a.dataset == ours.dataset and a != ours]
    seeds = {a: sorted(found[a].keys() & found[ours].keys()) for a in others}
    pairs = {a: compare(ours, a, found, seeds[a]) for a in others if seeds[a]}
    return dict(zip(pairs, adjust(list(pairs.values())), strict=True))


def compare(ours: Asked, other: Asked, found: dict[Asked, Scores], seeds: list[int]) -> Comparison:
    """Each case averaged over the seeds, then paired."""
    tables = [[found[a][seed] for seed in seeds] for a in (ours, other)]
    case_ids = same_cases(scores for table in tables for scores in table)
    means = (
        mean_over_seeds(np.array([[scores[c] for c in case_ids] for scores in table]))
        for table in tables
    )
    return paired_comparison(*means, names=tuple(f"{a.method} ({a.preset})" for a in (ours, other)))


def same_cases(scored: Iterable[dict[str, float]]) -> list[str]:
    """The cases that all runs were scored on.

    Raises:
        UsageError: they were not scored on the same ones.
    """
    lists = {frozenset(scores) for scores in scored}
    if len(lists) > 1:
        raise UsageError("the runs leave different cases unlabeled")
    return sorted(lists.pop())


if __name__ == "__main__":
    main()
