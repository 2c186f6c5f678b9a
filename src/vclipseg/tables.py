"""table.md of a grid of experiments, made from its runs.csv and cases.csv and nothing else.

A section has the runs that may be compared: one data set, label budget, network width, protocol and
post-processing. A row is a method over its seeds, draws and folds, beside the supervised baseline
of the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vclipseg.files import write_text
from vclipseg.records import RunRecord, read_cases, read_runs
from vclipseg.scores import CaseScore, case_means
from vclipseg.statistics import (
    Comparison,
    Interval,
    adjust,
    bootstrap_mean_over_seeds,
    format_p,
    mean_over_seeds,
    paired_comparison,
)

BASELINE = "supervised"
PLAIN_METRICS = {
    "jaccard": "Jaccard",
    "hd95_voxel": "HD95 (voxels)",
    "asd_voxel": "ASD (voxels)",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "nsd": "NSD",
}
HEADING = (
    *("Method", "Preset", "Text", "Steps", "Weights", "Runs", "Dice (95% interval)"),
    *PLAIN_METRICS.values(),
    *("Failures", "Minutes", f"Dice minus {BASELINE} (95% interval)", "p (Holm)", "Dice by seed"),
)
LEGEND = """\
Made from runs.csv and cases.csv by benchmarks/grid.py; do not edit.

Means are over the test cases, each first averaged over its classes and over the runs; intervals
are 95% bootstrap intervals over cases of that average, and do not hold the spread between seeds,
which is in the last column. Dice, Jaccard and NSD are in [0, 1]. An empty prediction is a failure:
Dice 0, distances undefined and left out (0 under the paper protocol). p is of the paired Wilcoxon
signed-rank test against the supervised baseline of the same number of steps, over cases averaged
over the runs both have, adjusted after Holm within a section.
"""


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one method and setting, over seeds, draws and folds."""

    records: tuple[RunRecord, ...]
    scores: tuple[tuple[CaseScore, ...], ...]  # one tuple a run

    @property
    def first(self) -> RunRecord:
        """One of the runs, for what all have in common."""
        return self.records[0]

    @property
    def name(self) -> str:
        """The method, with what tells it from its variants."""
        details = [part for part in (self.first.preset, self.first.text) if part]
        return self.first.method + (f" ({', '.join(details)})" if details else "")

    def per_case(self, metric: str) -> list[dict[str, float]]:
        """For each run: case id -> metric."""
        run = self.first
        return [
            case_means(scores, metric, lcc=bool(run.lcc), protocol=run.protocol)
            for scores in self.scores
        ]

    def shared_with(self, other: Group) -> Group:
        """Only the runs whose seed, draw and fold the other group has too."""
        there = {record.replicate for record in other.records}
        kept = [i for i, record in enumerate(self.records) if record.replicate in there]
        return Group(tuple(self.records[i] for i in kept), tuple(self.scores[i] for i in kept))


def write_table(grid: Path, title: str | None = None) -> Path:
    """Write `table.md` of a grid.

    Args:
        grid: `results/<grid>` with runs.csv and cases.csv.
        title: of the page; the folder's name when left out.

    Raises:
        DataError: runs.csv or cases.csv is not such a table.
    """
    records, cases = read_runs(grid), read_cases(grid)
    sections = _grouped(records, _section_key)
    parts = [f"# {title or grid.resolve().name}\n", LEGEND]
    parts += [_section(sections[key], cases) for key in sorted(sections)]
    path = grid / "table.md"
    write_text(path, "\n".join(parts))
    return path


def _section_key(record: RunRecord) -> tuple:
    # strict before paper
    return record.protocol != "strict", record.dataset, record.labeled, record.filters, record.lcc


def _group_key(record: RunRecord) -> tuple:
    name = record.method, record.preset, record.text
    return record.method != BASELINE, *name, record.steps, record.weights


def _grouped(
    records: Iterable[RunRecord], key: Callable[[RunRecord], tuple]
) -> dict[tuple, list[RunRecord]]:
    groups: dict[tuple, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _section(
    records: Sequence[RunRecord], cases: Mapping[tuple[str, ...], Sequence[CaseScore]]
) -> str:
    by_key = _grouped(sorted(records, key=_replicate_order), _group_key)
    groups = [
        Group(tuple(runs), tuple(tuple(cases.get(run.key, ())) for run in runs))
        for runs in (by_key[key] for key in sorted(by_key))
    ]
    comparisons = _comparisons(groups)
    lines = [_row(group, comparisons.get(group)) for group in groups]
    claims = [f"- {comparison.claim}" for comparison in comparisons.values()]
    return "\n".join(
        [
            *_opening(groups[0].first),
            "| " + " | ".join(HEADING) + " |",
            "|" + " --- |" * len(HEADING),
            *lines,
            "",
            *claims,
            *([""] if claims else []),
        ]
    )


def _opening(run: RunRecord) -> list[str]:
    kept = "the largest component of each class" if run.lcc else "the mask as predicted"
    lines = [
        f"## {run.dataset}, {run.labeled} labeled, {run.filters} filters, {kept}"
        + (", paper protocol" if run.protocol == "paper" else ""),
        "",
    ]
    if run.protocol == "paper":
        lines += ["**Chosen on the test set, as the literature does: these are too good.**", ""]
    return lines


def _comparisons(groups: Sequence[Group]) -> dict[Group, Comparison]:
    """Each method's Dice against its baseline's, where the two have runs in common."""
    pairs = [(group, _baseline_of(group, groups)) for group in groups]
    found = {
        group: _compare(group.shared_with(baseline), baseline.shared_with(group))
        for group, baseline in pairs
        if baseline and group.shared_with(baseline).records
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
        return (
            other.first.preset == group.first.preset,
            other.first.weights == group.first.weights,
        )

    return max(candidates, key=likeness, default=None)


def _compare(group: Group, baseline: Group) -> Comparison:
    of_group, of_baseline = group.per_case("dice"), baseline.per_case("dice")
    case_ids = _case_ids([*of_group, *of_baseline])
    return paired_comparison(
        mean_over_seeds(_matrix(of_group, case_ids)),
        mean_over_seeds(_matrix(of_baseline, case_ids)),
        names=(group.name, baseline.name),
        metric="Dice",
    )


def _row(group: Group, comparison: Comparison | None) -> str:
    run = group.first
    dice = group.per_case("dice")
    plain = (_mean_over_all(group.per_case(metric)) for metric in PLAIN_METRICS)
    scored = sum(score.lcc == run.lcc for scores in group.scores for score in scores)
    failures = sum(record.failures for record in group.records)
    seconds = [record.seconds for record in group.records]
    cells = [
        *(run.method, run.preset, run.text, str(run.steps), run.weights, str(len(group.records))),
        _with_interval(bootstrap_mean_over_seeds(_matrix(dice, _case_ids(dice)))),
        *plain,
        f"{failures} of {scored}",
        _number(float(np.mean(seconds)) / 60, ".1f"),
        *_versus(comparison),
        ", ".join(f"{_replicate_name(record)}: {_number(record.dice)}" for record in group.records),
    ]
    return "| " + " | ".join(cells) + " |"


def _versus(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None or comparison.difference is None:
        return "", ""
    interval = Interval(comparison.difference, comparison.low, comparison.high, comparison.n)
    return _with_interval(interval, "+.4f"), format_p(comparison.p_adjusted)


def _with_interval(interval: Interval, form: str = ".4f") -> str:
    if interval.mean is None:
        return ""
    mean = format(interval.mean, form)
    if interval.low is None:
        return mean
    return f"{mean} ({interval.low:{form}} to {interval.high:{form}})"


def _mean_over_all(per_case: Sequence[Mapping[str, float]]) -> str:
    values = mean_over_seeds(_matrix(per_case, _case_ids(per_case)))
    values = values[np.isfinite(values)]
    return _number(float(values.mean())) if values.size else ""


def _case_ids(per_case: Iterable[Mapping[str, float]]) -> list[str]:
    return sorted({case_id for run in per_case for case_id in run})


def _matrix(
    per_case: Sequence[Mapping[str, float]], case_ids: Sequence[str]
) -> NDArray[np.float64]:
    """Runs by cases (S, N), NaN where a run has not tested a case."""
    return np.array([[run.get(case_id, np.nan) for case_id in case_ids] for run in per_case])


def _replicate_order(record: RunRecord) -> tuple[int, int, int]:
    fold = -1 if record.fold is None else record.fold
    draw = -1 if record.draw is None else record.draw
    return fold, draw, record.seed


def _replicate_name(record: RunRecord) -> str:
    parts = [str(record.seed)]
    parts += [] if record.draw is None else [f"draw {record.draw}"]
    parts += [] if record.fold is None else [f"fold {record.fold}"]
    return " ".join(parts)


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None or not np.isfinite(value) else format(value, form)
