"""The numbers of the report: headline table, comparison of runs, and the sentences they allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vclipseg.compare import MEAN, compare_runs
from vclipseg.errors import VclipsegError
from vclipseg.report.figures import Strip
from vclipseg.report.reading import Run, number
from vclipseg.scores import CaseScore, class_names_of
from vclipseg.statistics import (
    BOOTSTRAP_SAMPLES,
    MIN_CASES,
    Comparison,
    Interval,
    adjust,
    bootstrap_mean,
)

AS_GOOD = 0.02  # Dice: an interval that reaches no further than this is called "as good"


@dataclass(frozen=True)
class Metric:
    """How a column of cases.csv is shown."""

    key: str
    label: str
    unit: str
    digits: int
    higher_is_better: bool
    help: str


METRICS = (
    Metric("dice", "Dice", "", 3, True, "Overlap: 1 is perfect."),
    Metric("jaccard", "Jaccard", "", 3, True, "Shared over joint volume: 1 is perfect."),
    Metric("hd95_mm", "95HD", "mm", 2, False, "95th percentile of the surface distances."),
    Metric("assd_mm", "ASSD", "mm", 2, False, "Average symmetric surface distance."),
    Metric("nsd", "NSD", "", 3, True, "Share of both surfaces that is within the tolerance."),
    Metric("hd95_voxel", "95HD", "voxel", 2, False, "As the literature computes it, in voxels."),
    Metric("asd_voxel", "ASD", "voxel", 2, False, "As the literature computes it, in voxels."),
)
COMPARED = METRICS[:5]


@dataclass(frozen=True)
class Row:
    """One line of the headline table: a run's mean over classes, or one class."""

    run: int
    run_name: str
    class_name: str | None
    cells: tuple[Interval, ...]  # as METRICS
    num_cases: int
    failures: int


@dataclass(frozen=True)
class Compared:
    """One line of the comparison of two runs: a metric, of all classes' mean or of one class."""

    metric: Metric
    class_name: str | None
    numbers: Comparison


@dataclass(frozen=True)
class Verdict:
    """What the numbers let one say about two runs."""

    run: int
    title: str
    text: str
    kind: str = "unclear"  # or "better", "worse", "even"
    compared: tuple[Compared, ...] = ()
    cautions: tuple[str, ...] = ()


def headline_rows(runs: Sequence[Run], *, lcc: bool) -> list[Row]:
    """Every run with its classes; a run without rows of this post-processing is left out."""
    rows = []
    for index, run in enumerate(runs):
        class_names = class_names_of(run.select(lcc=lcc))
        if class_names:
            several = [None, *class_names] if len(class_names) > 1 else [None]
            rows += [_row(index, run, name, lcc) for name in several]
    return rows


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """The first run against each other one, p values adjusted by Holm over the other runs."""
    others = [index for index, run in enumerate(runs) if index and run.scores]
    if not others or not runs[0].scores:
        return []
    tables: dict[int, list[Compared]] = {}
    failed: dict[int, str] = {}
    for index in others:
        try:
            tables[index] = _compared(runs[0], runs[index])
        except VclipsegError as error:
            failed[index] = str(error)
    tables = _adjusted(tables)
    return [
        _verdict(runs[0], runs[index], index, tables[index])
        if index in tables
        else Verdict(
            index, f"{runs[0].name} and {runs[index].name} are not compared", failed[index]
        )
        for index in others
    ]


def strips(runs: Sequence[Run], metric: str = "dice", class_name: str | None = None) -> list[Strip]:
    """Every scored run's cases, for a strip plot."""
    found = []
    for index, run in enumerate(runs):
        values = run.per_case(metric, lcc=runs[0].lcc, class_name=class_name)
        mean = interval(run, list(values.values()))
        if values:
            found.append(
                Strip(
                    index, run.name, values, *(number(v) for v in (mean.mean, mean.low, mean.high))
                )
            )
    return found


def case_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[CaseScore | None]]]:
    """(case_id, class name, the score of each run), the reported run's worst cases first."""
    lcc = runs[0].lcc
    by_run = [{(s.case_id, s.class_name): s for s in run.select(lcc=lcc)} for run in runs]
    dice = runs[0].per_case("dice")
    keys = list(dict.fromkeys(key for scores in by_run for key in scores))
    keys.sort(key=lambda key: dice.get(key[0], math.inf))  # stable: classes keep their order
    return [(*key, [scores.get(key) for scores in by_run]) for key in keys]


def interval(run: Run, values: Sequence[float]) -> Interval:
    """Mean over cases with the interval that the run's evaluation would give."""
    samples = run.setting("settings", "evaluate", "bootstrap_samples") or BOOTSTRAP_SAMPLES
    return bootstrap_mean(
        values, samples=samples, seed=run.setting("settings", "evaluate", "seed") or 0
    )


def show(value: float | None, digits: int) -> str:
    """A number for a table; a dash for what is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def show_p(p: float | None) -> str:
    """A p value for a table."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _row(index: int, run: Run, class_name: str | None, lcc: bool) -> Row:
    scores = run.select(lcc=lcc, class_name=class_name)
    cells = []
    for metric in METRICS:
        values = run.per_case(metric.key, lcc=lcc, class_name=class_name)
        cells.append(interval(run, list(values.values())))
    return Row(
        run=index,
        run_name=run.name,
        class_name=class_name,
        cells=tuple(cells),
        num_cases=len({score.case_id for score in scores}),
        failures=sum(score.failure for score in scores),
    )


def _compared(first: Run, other: Run) -> list[Compared]:
    """Every metric's mean over classes; of several classes, each one's Dice as well."""
    lines = []
    for metric in COMPARED:
        rows = compare_runs(first.folder, other.folder, metric.key, lcc=first.lcc).rows
        classes = [name for name in rows if name != MEAN] if metric.key == "dice" else []
        for name in [MEAN, *(classes if len(classes) > 1 else [])]:
            numbers = replace(rows[name], name_a=first.name, name_b=other.name)
            lines.append(Compared(metric, None if name == MEAN else name, numbers))
    return lines


def _adjusted(tables: dict[int, list[Compared]]) -> dict[int, list[Compared]]:
    """P values of the means adjusted over the runs compared with, where there are several."""
    if len(tables) < 2:
        return tables
    adjusted = {index: list(lines) for index, lines in tables.items()}
    for place, line in enumerate(next(iter(tables.values()))):
        if line.class_name is None:
            family = adjust([lines[place].numbers for lines in tables.values()])
            for lines, numbers in zip(adjusted.values(), family, strict=True):
                lines[place] = replace(lines[place], numbers=numbers)
    return adjusted


def _verdict(first: Run, other: Run, index: int, lines: Sequence[Compared]) -> Verdict:
    kind, title, text = _judged(lines[0].numbers, other.method == "supervised")
    return Verdict(index, title, text, kind, tuple(lines), tuple(_cautions(first, other)))


def _judged(dice: Comparison, supervised: bool) -> tuple[str, str, str]:
    """(kind, title, what may be said) from the comparison of Dice."""
    a, b = dice.name_a, dice.name_b
    if dice.n < MIN_CASES or dice.difference is None or dice.low is None or dice.high is None:
        cases = "case" if dice.n == 1 else "cases"
        text = (
            f"Below {MIN_CASES} cases no such claim can be made: there are {dice.n} paired {cases}."
        )
        return "unclear", f"Too few cases to compare {a} with {b}", text
    p = dice.p if dice.p_adjusted is None else dice.p_adjusted
    holm = "" if dice.p_adjusted is None else " after Holm"
    evidence = f"95% interval {dice.low:+.3f} to {dice.high:+.3f}, Wilcoxon p\u00a0{_p(p)}{holm}"
    on, amount = f"On the same {dice.n} test cases", f"{abs(dice.difference):.3f}"
    simpler = _SIMPLER if supervised else ""
    if dice.significant and dice.difference > 0:
        text = f"{on} its Dice is {amount} higher ({evidence})."
        return "better", f"{a} was better than {b}", text
    if dice.significant:
        text = f"{on} the Dice of {a} is {amount} lower ({evidence}).{simpler}"
        return "worse", f"{b} was better than {a}", text
    told = f"{on} the Dice of {a} differs by {dice.difference:+.3f} on average ({evidence})"
    if dice.low == dice.high == 0:
        return "even", f"{b} was as good as {a}", f"{on} the two have the same Dice.{simpler}"
    if dice.high <= AS_GOOD:
        gain = f"a gain of more than {max(dice.high, 0.0):.3f} Dice is not to be expected"
        return "even", f"{b} was as good as {a}", f"{told}: {gain} on such cases.{simpler}"
    text = f"{told}: anything from {dice.low:+.3f} to {dice.high:+.3f} fits these cases."
    return "unclear", f"No difference between {a} and {b} is shown", text


_SIMPLER = (
    " That is a result: here the labeled scans alone were enough, and the simpler model is the one"
    " to use."
)


def _p(p: float | None) -> str:
    text = show_p(p)
    return (text if text.startswith("<") else f"= {text}").replace(" ", "\u00a0")


def _cautions(first: Run, other: Run) -> list[str]:
    """What was not alike in the two runs, and what one pair of runs cannot tell."""
    found = []
    alike = {
        "training steps": ("settings", "train", "steps"),
        "augmentation": ("settings", "augment"),
        "preparation": ("settings", "prepare"),
    }
    for what, keys in alike.items():
        if first.setting(*keys) != other.setting(*keys):
            found.append(f"The {what} of the two runs differ.")
    for role in ("labeled", "unlabeled"):
        if "supervised" in (first.method, other.method) and role == "unlabeled":
            continue  # which cases it does not use says nothing
        if set(first.case_list(role)) != set(other.case_list(role)):
            found.append(f"The {role} cases of the two runs differ.")
    for run in (first, other):
        if run.protocol == "paper":
            found.append(f"The checkpoint of {run.name} was chosen on these very cases.")
        if run.transductive:
            found.append(f"{run.name} saw the test images in training.")
    found.append(
        "One training run each: other seeds or other labeled cases may turn out otherwise."
    )
    return found
