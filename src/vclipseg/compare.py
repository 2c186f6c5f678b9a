"""Two runs on the same test cases: case by case, with an interval and a test.

Runs on different cases are not compared at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vclipseg.data.cases import read_json
from vclipseg.errors import UsageError
from vclipseg.metrics import METRICS
from vclipseg.scores import CaseScore, case_means, class_names_of, read_scores
from vclipseg.statistics import Comparison, adjust, format_p, paired_comparison

MEAN = "mean"


@dataclass(frozen=True)
class RunComparison:
    """One metric of two runs.

    Attributes:
        rows: class name -> comparison, p values adjusted over the classes (Holm); and "mean",
            the average over a case's classes.
        notes: what a reader must know to take the numbers right.
    """

    name_a: str
    name_b: str
    metric: str
    lcc: bool
    rows: dict[str, Comparison]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """A table for the terminal, the claim on the mean below it."""
        heading = ("class", self.name_a, self.name_b, "difference", "95% interval", "p", "cases")
        table = [heading, *(_line(name, row) for name, row in self.rows.items())]
        widths = [max(len(line[column]) for line in table) for column in range(len(heading))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        title = self.metric + (", largest component of each class" if self.lcc else "")
        return "\n".join([title, "", *lines, "", self.rows[MEAN].claim, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """The same for a machine."""
        rows = {name: asdict(row) | {"claim": row.claim} for name, row in self.rows.items()}
        return asdict(self) | {"rows": rows, "notes": list(self.notes)}


def compare_runs(
    run_a: Path, run_b: Path, metric: str = "dice", *, lcc: bool = False
) -> RunComparison:
    """Compare two evaluated run folders, paired by case.

    Args:
        run_a: a run folder with a cases.csv.
        run_b: another.
        metric: one of `metrics.METRICS`.
        lcc: compare largest components.

    Raises:
        UsageError: a run is not evaluated, or the two were tested on different data.
    """
    if metric not in METRICS:
        raise UsageError(f"{metric}: not a metric. Choose from {', '.join(METRICS)}.")
    a, b = read_scores(run_a), read_scores(run_b)
    _require_same_test(run_a, run_b, a, b)
    names = _names(run_a, run_b)

    def compare(class_name: str | None) -> Comparison:
        of_a = case_means(a, metric, lcc=lcc, class_name=class_name)
        of_b = case_means(b, metric, lcc=lcc, class_name=class_name)
        values = [of_a[case_id] for case_id in of_a], [of_b[case_id] for case_id in of_a]
        return paired_comparison(*values, names=names, metric=metric)

    classes = class_names_of(a)
    rows = dict(zip(classes, adjust([compare(name) for name in classes]), strict=True))
    return RunComparison(*names, metric, lcc, rows | {MEAN: compare(None)}, _notes(run_a, run_b))


def _line(name: str, row: Comparison) -> tuple[str, ...]:
    p = row.p if row.p_adjusted is None else row.p_adjusted
    interval = "-" if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}"
    return (
        name,
        _number(row.mean_a),
        _number(row.mean_b),
        _number(row.difference, "+.4f"),
        interval,
        format_p(p) or "-",
        str(row.n),
    )


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _require_same_test(
    run_a: Path, run_b: Path, a: Sequence[CaseScore], b: Sequence[CaseScore]
) -> None:
    """Same cases, same classes, and references of the same volume."""
    references_a, references_b = _references(a), _references(b)
    if only := sorted(references_a.keys() ^ references_b.keys()):
        case_id, class_name = only[0]
        where, lacking = (run_a, run_b) if only[0] in references_a else (run_b, run_a)
        raise UsageError(
            f"{where} and {lacking} were tested on different cases or classes: only the first has "
            f"case {case_id}, class {class_name}. Evaluate both on the same test cases."
        )
    hashes = {str(_json(run / "splits.json").get("test_hash", "")) for run in (run_a, run_b)}
    changed = [key for key, ml in references_a.items() if abs(ml - references_b[key]) > 1e-3]
    if changed or len(hashes - {""}) > 1:
        which = f": the reference of case {changed[0][0]} is not the same" if changed else ""
        raise UsageError(
            f"{run_a} and {run_b} were tested on different data{which}. "
            "Evaluate both again on the same data set."
        )


def _references(scores: Sequence[CaseScore]) -> dict[tuple[str, str], float]:
    return {(score.case_id, score.class_name): score.reference_ml for score in scores}


def _names(run_a: Path, run_b: Path) -> tuple[str, str]:
    """What the runs call themselves, or their folders where that is the same."""
    a, b = (
        str(_json(run / "experiment.json").get("name") or run.resolve().name)
        for run in (run_a, run_b)
    )
    return (a, b) if a != b else (str(run_a), str(run_b))


def _notes(run_a: Path, run_b: Path) -> tuple[str, ...]:
    notes = []
    for run in (run_a, run_b):
        if _json(run / "metrics.json").get("protocol") == "paper":
            notes.append(
                f"{run}: chosen on the test set (paper protocol), so its scores are too good."
            )
    return tuple(notes)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
