"""What `results/<grid>/` holds: runs.csv, cases.csv, and table.md made from the two.

A run is known by its `settings_hash`. Its record is replaced as a whole, files are written whole,
and cases.csv first: a hash in runs.csv means that the run is recorded completely, so a grid goes
on from a committed runs.csv alone. One process at a time records into a grid.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vclipseg.errors import DataError
from vclipseg.metrics import METRICS
from vclipseg.scores import (
    CASE_COLUMNS,
    CaseScore,
    Protocol,
    case_means,
    score_from_row,
    write_rows,
)

Place = tuple[str | int | None, ...]
"""What the tables know a run by; see `RunRecord.place`."""
Replicate = tuple[int, int | None, int | None]
"""Seed, draw and fold: which of the runs of one method and setting."""


@dataclass(frozen=True)
class RunRecord:
    """A row of runs.csv: what was run, and its means over the test cases.

    Dice, Jaccard and NSD are in [0, 1]; `text` is where the text vectors came from, empty for
    methods without; `draw` and `fold` are None where the labeled cases are the first of the list
    and the split is the only one.
    """

    settings_hash: str
    dataset: str
    method: str
    preset: str
    text: str
    labeled: int
    draw: int | None
    fold: int | None
    seed: int
    filters: int
    steps: int
    protocol: Protocol
    weights: str
    lcc: int
    dice: float
    jaccard: float
    hd95_voxel: float
    asd_voxel: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    failures: int
    seconds: float
    device: str
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells the rows of one run apart."""
        return self.settings_hash, self.protocol, self.weights, str(self.lcc)

    @property
    def replicate(self) -> Replicate:
        """Which of the runs of one method and setting."""
        return self.seed, self.draw, self.fold

    @property
    def place(self) -> Place:
        """Where it stands in the tables: of one place there is one run."""
        what = self.dataset, self.method, self.preset, self.text, self.labeled
        return *what, *self.replicate, self.filters, self.steps, self.weights


def row_of(place: Place) -> Place:
    """A place without seed, draw and fold: runs that tables average."""
    return place[:5] + place[8:]


RUN_COLUMNS = tuple(field.name for field in fields(RunRecord))
RECORD_CASE_COLUMNS = ("settings_hash", "protocol", "weights", *CASE_COLUMNS)
_OPTIONAL = ("draw", "fold")
_INTEGER = ("labeled", "seed", "filters", "steps", "lcc", "failures")
_FLOAT = (*METRICS, "seconds")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """The first 12 hex digits of the SHA-256 of the settings as canonical JSON.

    Args:
        settings: all that decides the result: the resolved settings with the seed, and the hash
            of the data. The order of keys does not matter; NaN is refused.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_record(
    scores: Iterable[CaseScore], *, lcc: bool = False, protocol: Protocol = "strict", **facts: Any
) -> RunRecord:
    """A row of runs.csv from a run's scored cases.

    Args:
        scores: rows of one run, with and without largest component.
        lcc: which of them to take.
        protocol: `paper` counts distances of 0 for an empty prediction.
        facts: the other columns of `RunRecord`, but for the metrics and `failures`.
    """
    scores = list(scores)
    means: dict[str, Any] = {
        metric: _mean(case_means(scores, metric, lcc=lcc, protocol=protocol).values())
        for metric in METRICS
    }
    failures = sum(score.failure for score in scores if bool(score.lcc) == lcc)
    return RunRecord(protocol=protocol, lcc=int(lcc), failures=failures, **means, **facts)


def record(grid: Path, records: Sequence[RunRecord], scores: Sequence[CaseScore]) -> None:
    """Put a finished run into a grid's runs.csv and cases.csv, replacing what was there of it.

    Args:
        grid: `results/<grid>`, made when it is not there.
        records: the run's rows, such as one with and one without largest component; all with one
            `settings_hash` and protocol.
        scores: the rows of its cases.csv.

    Raises:
        ValueError: the rows are of different runs.
    """
    runs = {(row.settings_hash, row.protocol) for row in records}
    if len(runs) != 1:
        raise ValueError(f"one run is recorded at a time, not {sorted(runs)}")
    kept = [row for row in read_runs(grid) if (row.settings_hash, row.protocol) not in runs]
    cases = [
        row
        for row in _rows(grid / "cases.csv")
        if (row["settings_hash"], row["protocol"]) not in runs
    ]
    for row in records:
        chosen = [vars(score) for score in scores if score.lcc == row.lcc]
        key = {"settings_hash": row.settings_hash, "protocol": row.protocol, "weights": row.weights}
        cases += [key | score for score in chosen]
    grid.mkdir(parents=True, exist_ok=True)
    write_rows(grid / "cases.csv", RECORD_CASE_COLUMNS, cases)
    write_rows(grid / "runs.csv", RUN_COLUMNS, [vars(row) for row in [*kept, *records]])


def read_runs(grid: Path) -> list[RunRecord]:
    """The rows of a grid's runs.csv, none when it is not there.

    Raises:
        DataError: it is not such a table.
    """
    path = grid / "runs.csv"
    try:
        return [
            RunRecord(**{name: _parse(name, row[name]) for name in RUN_COLUMNS})
            for row in _rows(path)
        ]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: not a table of runs ({error}). Restore it from git.") from error


def read_cases(grid: Path) -> dict[tuple[str, ...], list[CaseScore]]:
    """`RunRecord.key` -> the rows of that run in a grid's cases.csv.

    Raises:
        DataError: it is not such a table.
    """
    path = grid / "cases.csv"
    cases: dict[tuple[str, ...], list[CaseScore]] = {}
    try:
        for row in _rows(path):
            key = row["settings_hash"], row["protocol"], row["weights"], row["lcc"]
            cases.setdefault(key, []).append(score_from_row(row))
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: not a table of cases ({error}). Restore it from git.") from error
    return cases


def recorded(grid: Path, protocol: Protocol = "strict") -> set[str]:
    """The `settings_hash` of each run that a grid has: what need not be run again."""
    return {row.settings_hash for row in read_runs(grid) if row.protocol == protocol}


def take_over(
    source: Path, grid: Path, settings_hash: str, protocol: Protocol, preset: str
) -> None:
    """Copy a run of another grid's record, its preset column as this grid has it."""
    rows = [
        row
        for row in read_runs(source)
        if (row.settings_hash, row.protocol) == (settings_hash, protocol)
    ]
    cases = read_cases(source)
    scores = [score for row in rows for score in cases.get(row.key, ())]
    record(grid, [replace(row, preset=preset) for row in rows], scores)


def forget(grid: Path, places: Container[Place]) -> int:
    """Remove the runs of some places from a record, to run them again; returns how many runs.

    Only runs.csv changes: rows of cases.csv without a run count for nothing and are replaced when
    the run is recorded again.
    """
    rows = read_runs(grid)
    kept = [row for row in rows if row.place not in places]
    if len(kept) < len(rows):
        write_rows(grid / "runs.csv", RUN_COLUMNS, [vars(row) for row in kept])
    return len({row.settings_hash for row in rows}) - len({row.settings_hash for row in kept})


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _parse(column: str, text: str) -> Any:
    if column in _OPTIONAL:
        return int(text) if text else None
    if column in _INTEGER:
        return int(text)
    if column in _FLOAT:
        return float(text) if text else math.nan
    return text


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
