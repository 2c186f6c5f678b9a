"""The runs of one method, and how two methods are compared case by case."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vclipseg.records import Replicate, RunRecord
from vclipseg.scores import CaseScore, case_means
from vclipseg.statistics import (
    Comparison,
    Interval,
    bootstrap_mean_over_seeds,
    mean_over_seeds,
    paired_comparison,
)

BASELINE = "supervised"
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one method and setting, over seeds, draws and folds."""

    records: tuple[RunRecord, ...]
    scores: tuple[tuple[CaseScore, ...], ...]  # one tuple a run
    apart: str = ""
    """What tells it from a group of the same method, preset and text vectors."""

    @property
    def first(self) -> RunRecord:
        """One of the runs, for what all have in common."""
        return self.records[0]

    @property
    def name(self) -> str:
        """The method, with what tells it from its variants."""
        details = [part for part in (self.first.preset, self.first.text, self.apart) if part]
        return self.first.method + (f" ({', '.join(details)})" if details else "")

    def per_case(self, metric: str) -> list[dict[str, float]]:
        """For each run: case id -> metric."""
        run = self.first
        return [
            case_means(scores, metric, lcc=bool(run.lcc), protocol=run.protocol)
            for scores in self.scores
        ]

    def case_means(self, metric: str) -> dict[str, float]:
        """Case id -> metric, averaged over the runs that have a value."""
        per_case = self.per_case(metric)
        ids = case_ids_of(per_case)
        return dict(zip(ids, mean_over_seeds(matrix_of(per_case, ids)).tolist(), strict=True))

    def interval(self, metric: str) -> Interval:
        """The mean over cases and runs, and its 95% interval over cases."""
        per_case = self.per_case(metric)
        return bootstrap_mean_over_seeds(matrix_of(per_case, case_ids_of(per_case)))

    def shared_with(self, other: Group) -> Group:
        """Only the runs whose seed, draw and fold the other group has too."""
        return self.only(other.replicates)

    @property
    def replicates(self) -> set[Replicate]:
        """Seed, draw and fold of each run."""
        return {record.replicate for record in self.records}

    def only(self, replicates: Container[Replicate]) -> Group:
        """The runs of these seeds, draws and folds."""
        kept = [i for i, record in enumerate(self.records) if record.replicate in replicates]
        records = tuple(self.records[i] for i in kept)
        return Group(records, tuple(self.scores[i] for i in kept), self.apart)


def compare_groups(group: Group, other: Group, names: tuple[str, str] | None = None) -> Comparison:
    """The Dice of one minus that of another, over cases averaged over the runs of each."""
    of_group, of_other = group.per_case("dice"), other.per_case("dice")
    case_ids = case_ids_of([*of_group, *of_other])
    return paired_comparison(
        mean_over_seeds(matrix_of(of_group, case_ids)),
        mean_over_seeds(matrix_of(of_other, case_ids)),
        names=names or (group.name, other.name),
        metric="Dice",
    )


def grouped(values: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Key -> the values that have it, in their order."""
    groups: dict[K, list[V]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def group_key(record: RunRecord) -> tuple:
    """What the runs of a group have in common; the supervised baseline sorts first."""
    name = record.method, record.preset, record.text
    return record.method != BASELINE, *name, record.steps, record.weights


def replicate_order(record: RunRecord) -> tuple[int, int, int]:
    """Runs of a group sort by fold, draw and seed."""
    fold = -1 if record.fold is None else record.fold
    draw = -1 if record.draw is None else record.draw
    return fold, draw, record.seed


def replicate_name(record: RunRecord) -> str:
    """Seed, draw and fold in a few words."""
    parts = [str(record.seed)]
    parts += [] if record.draw is None else [f"draw {record.draw}"]
    parts += [] if record.fold is None else [f"fold {record.fold}"]
    return " ".join(parts)


def case_ids_of(per_case: Iterable[Mapping[str, float]]) -> list[str]:
    """All cases of some runs, in order."""
    return sorted({case_id for run in per_case for case_id in run})


def matrix_of(
    per_case: Sequence[Mapping[str, float]], case_ids: Sequence[str]
) -> NDArray[np.float64]:
    """Runs by cases (S, N), NaN where a run has not tested a case."""
    return np.array([[run.get(case_id, np.nan) for case_id in case_ids] for run in per_case])
