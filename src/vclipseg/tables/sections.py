"""What is made of a grid's runs.csv and cases.csv: sections of rows with intervals and paired tests.

A section has the runs that may be compared: one data set, label budget, network width, protocol and
post-processing. A row is a method over its seeds, draws and folds, beside the supervised baseline of the
same number of steps, the best method of the section, and the published figure. `files.py` writes
them down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vclipseg.records import RunRecord, read_cases, read_runs
from vclipseg.scores import CaseScore
from vclipseg.statistics import Comparison, Interval, adjust, holm_of_all_pairs
from vclipseg.tables.facts import GridFacts, read_facts
from vclipseg.tables.groups import (
    BASELINE,
    Group,
    case_ids_of,
    compare_groups,
    group_key,
    grouped,
    matrix_of,
    replicate_name,
    replicate_order,
)
from vclipseg.tables.published import Figure, published
from vclipseg.tables.ranking import Ranking, rank_methods

UNEVEN = (
    "Some methods have more runs than others. The best, what others are minus the best, and the ranks of all "
    "are of the runs that all have (seed {}); each difference from supervised is of those that both have."
)


@dataclass(frozen=True, eq=False)
class Row:
    """A method in a section.

    Attributes:
        group: its runs.
        to_baseline: its Dice minus the supervised baseline's, None for that and where there is none.
        to_best: its Dice minus that of the best method, None for that. It is of the runs that all methods
            of the section have, and p is adjusted for all pairs of them, as the best was chosen by its Dice.
        is_best: no method of the section has a higher mean Dice over these runs.
        figure: what the literature reports.
        notes: what it does otherwise than the others.
        components: the same runs with only the largest component of each class.
    """

    group: Group
    to_baseline: Comparison | None
    to_best: Comparison | None
    is_best: bool
    figure: Figure | None
    notes: tuple[str, ...]
    components: Group | None

    @property
    def failures(self) -> int:
        """Empty predictions."""
        return sum(record.failures for record in self.group.records)

    @property
    def scored(self) -> int:
        """Predictions, of a class in a case in a run."""
        lcc = self.group.first.lcc
        return sum(score.lcc == lcc for scores in self.group.scores for score in scores)

    @property
    def seconds(self) -> float:
        """Mean time of a training."""
        return float(np.mean([record.seconds for record in self.group.records]))

    @property
    def against(self) -> str:
        """Its baseline, where its preset does not say which one that is; else nothing."""
        words = self.group.first.preset.split(",")[0].split("_")
        name = self.to_baseline.name_b if self.to_baseline else ""
        return "" if any(word in name for word in words) else name

    @property
    def gap(self) -> float | None:
        """Mean Dice minus the published one."""
        mean = self.interval("dice").mean
        return None if self.figure is None or mean is None else mean - self.figure.dice

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        return {}

    def interval(self, metric: str) -> Interval:
        """`Group.interval`, computed once."""
        if metric not in self._intervals:
            self._intervals[metric] = self.group.interval(metric)
        return self._intervals[metric]


@dataclass(frozen=True, eq=False)
class Section:
    """Rows that may be compared, the supervised baseline first."""

    rows: tuple[Row, ...]
    facts: GridFacts

    @property
    def first(self) -> RunRecord:
        """One of the runs, for what all have in common."""
        return self.rows[0].group.first

    @property
    def title(self) -> str:
        """What the section holds."""
        run = self.first
        kept = "the largest component of each class" if run.lcc else "the mask as predicted"
        marked = ", paper protocol" if run.protocol == "paper" else ""
        size = f"{run.labeled} labeled, {run.filters} filters"
        return f"{run.dataset}, {size}{self.folds}, {kept}{marked}"

    @property
    def cases(self) -> set[str]:
        """The test cases."""
        groups = (row.group for row in self.rows)
        return {score.case_id for group in groups for scores in group.scores for score in scores}

    @property
    def comparisons(self) -> list[Comparison]:
        """Of all methods with the baseline."""
        return [row.to_baseline for row in self.rows if row.to_baseline]

    @property
    def size(self) -> str:
        """Data set and width: sections that differ in their labels only have it in common."""
        return f"{self.first.dataset}, {self.first.filters} filters{self.folds}"

    @property
    def folds(self) -> str:
        """Whose test cases are train cases of others."""
        return "" if self.first.fold is None else ", cross-validation"

    @property
    def is_main(self) -> bool:
        """The strict protocol, masks as predicted: what figures and summaries are made of."""
        return self.first.protocol == "strict" and not self.first.lcc

    @property
    def machines(self) -> str:
        """Where the runs were computed, most of them first."""
        counts = Counter(run.device for row in self.rows for run in row.group.records)
        if len(counts) == 1:
            return f"All runs computed on: {next(iter(counts))}."
        named = "; ".join(f"{name} ({count})" for name, count in counts.most_common())
        return f"Of the runs, computed on: {named}. Seconds on one are not those on another."

    @property
    def uneven(self) -> str:
        """Which runs the best and the ranks are of, where some rows have more than others; else nothing."""
        groups = [row.group for row in self.rows]
        shared = _shared(groups)
        if shared and all(group.replicates == shared[0].replicates for group in groups):
            return ""
        return UNEVEN.format(
            ", ".join(map(replicate_name, shared[0].records)) if shared else "none"
        )

    def rankings(self) -> dict[str, Ranking]:
        """Mean ranks by Dice over the test cases, of "all" methods and of those with "common" settings.

        The second only if these are not all; each only with three methods and six cases at least.
        """
        alike = [row for row in self.rows if not row.notes]
        chosen = {"all": self.rows}
        if len(alike) < len(self.rows):
            chosen["common"] = tuple(alike)
        found = {name: _ranked(rows) for name, rows in chosen.items()}
        return {name: ranking for name, ranking in found.items() if ranking}


def read_sections(grid: Path) -> list[Section]:
    """The sections of a grid, strict before paper protocol.

    Raises:
        DataError: runs.csv, cases.csv or grid.json is damaged.
    """
    known, cases = read_facts(grid), read_cases(grid)
    by_section = grouped(read_runs(grid), _section_key)
    facts = {
        key: known.get(runs[0].dataset, GridFacts(runs[0].dataset))
        for key, runs in by_section.items()
    }
    apart = _apart([run for runs in by_section.values() for run in runs])
    groups = {key: _groups(by_section[key], cases, facts[key], apart) for key in sorted(by_section)}
    return [_section(key, groups, facts[key]) for key in groups]


def _section_key(record: RunRecord) -> tuple:
    # strict before paper
    size = record.labeled, record.filters, record.fold is not None
    return record.protocol != "strict", record.dataset, *size, record.lcc


def _groups(
    records: Sequence[RunRecord],
    cases: Mapping[tuple[str, ...], Sequence[CaseScore]],
    facts: GridFacts,
    apart: Mapping[tuple, str],
) -> list[Group]:
    """The groups of a section: baselines first, then in the grid's order."""

    def place(key: tuple) -> tuple:
        return key[0], facts.place(key[1], key[2]), key

    by_key = grouped(sorted(records, key=replicate_order), group_key)
    return [
        Group(
            tuple(by_key[key]),
            tuple(tuple(cases.get(run.key, ())) for run in by_key[key]),
            apart[by_key[key][0].dataset, *key],
        )
        for key in sorted(by_key, key=place)
    ]


def _apart(records: Sequence[RunRecord]) -> dict[tuple, str]:
    """Data set and group key -> steps and weights, where a method has several of them on the data set."""
    keys = {(record.dataset, *group_key(record)) for record in records}
    found = {}
    for *name, steps, weights in keys:
        alike = [key for key in keys if list(key[:-2]) == name]
        parts = [f"{steps} steps"] if len({key[-2] for key in alike}) > 1 else []
        parts += [f"{weights} weights"] if len({key[-1] for key in alike}) > 1 else []
        found[(*name, steps, weights)] = ", ".join(parts)
    return found


def _section(key: tuple, groups: Mapping[tuple, list[Group]], facts: GridFacts) -> Section:
    here = groups[key]
    largest = groups.get((*key[:-1], 1), []) if not key[-1] else []
    components = {group_key(group.first): group for group in largest}
    to_baseline = _adjusted({group: _baseline_of(group, here) for group in here})
    shared = _shared(here)
    best = max(range(len(here)), key=lambda i: _mean_dice(shared[i])) if shared else None
    to_best = _to_best(shared, best) if best is not None else {}
    rows = []
    for number, group in enumerate(here):
        run = group.first
        told = facts.of(run.method, run.preset)
        figure = published(facts.published, run.labeled, run.method, run.preset, told.published)
        rows.append(
            Row(
                group,
                to_baseline.get(group),
                to_best.get(number),
                number == best,
                figure,
                told.notes,
                components.get(group_key(run)),
            )
        )
    return Section(tuple(rows), facts)


def _shared(groups: Sequence[Group]) -> list[Group]:
    """Each group with the seeds, draws and folds that all have; none where there is no such run."""
    common = set.intersection(*(group.replicates for group in groups)) if groups else set()
    return [group.only(common) for group in groups] if common else []


def _ranked(rows: Sequence[Row]) -> Ranking | None:
    groups = _shared([row.group for row in rows])
    if not groups:
        return None
    means = [group.case_means("dice") for group in groups]
    names = [row.group.name for row in rows]
    return rank_methods(names, matrix_of(means, case_ids_of(means)), runs=len(groups[0].records))


def _to_best(groups: Sequence[Group], best: int) -> dict[int, Comparison]:
    """Position of each other group -> how it compares with the best."""
    means = [group.case_means("dice") for group in groups]
    p = holm_of_all_pairs(matrix_of(means, case_ids_of(means)))
    return {
        i: replace(compare_groups(group, groups[best]), p_adjusted=p[min(i, best), max(i, best)])
        for i, group in enumerate(groups)
        if i != best
    }


def _mean_dice(group: Group) -> float:
    means = list(group.case_means("dice").values())
    return float(np.nanmean(means)) if np.isfinite(means).any() else -np.inf


def _adjusted(pairs: Mapping[Group, Group | None]) -> dict[Group, Comparison]:
    """Each group compared with its other, over the runs both have; one family for Holm."""
    found = {
        group: compare_groups(group.shared_with(other), other.shared_with(group))
        for group, other in pairs.items()
        if other and group.shared_with(other).records
    }
    return dict(zip(found, adjust(list(found.values())), strict=True))


def _baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The supervised runs of as many steps, of the same preset and weights if there are such."""
    if group.first.method == BASELINE:
        return None
    candidates = [
        other
        for other in groups
        if other.first.method == BASELINE and other.first.steps == group.first.steps
    ]

    def likeness(other: Group) -> tuple[bool, bool]:
        preset = group.first.preset.split(",")[0]  # without the label
        return other.first.preset == preset, other.first.weights == group.first.weights

    return max(candidates, key=likeness, default=None)
