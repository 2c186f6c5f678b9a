"""What is made of scored cases: means with intervals, a run's result files, comparisons of runs.

A row is a `CaseScore`. The mean of a case is over the foreground classes where the metric is
defined, and the mean of a run is over its cases; intervals resample cases. Under the protocol
`paper`, which repeats how the literature's code scores, an empty prediction has distances of 0;
under `strict` it has none.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vclipseg.errors import DataError, UsageError
from vclipseg.files import write_text
from vclipseg.metrics import DISTANCES, METRICS
from vclipseg.settings import Settings
from vclipseg.statistics import bootstrap_mean

Protocol = Literal["strict", "paper"]


class EvaluateSettings(Settings):
    """How predictions are scored and summed up."""

    nsd_tolerance_mm: float = Field(default=2.0, ge=0)
    """How far apart in mm two surfaces may be and still agree, for the normalized surface Dice."""
    lcc: bool = False
    """Report the largest component of each class as the headline; cases.csv always has both."""
    bootstrap_samples: int = Field(default=5000, ge=100)
    """How many times the cases are resampled for a confidence interval."""
    seed: int = 0
    """Of the resampling."""


@dataclass(frozen=True)
class CaseScore:
    """One class of one case; `lcc` is 1 when only its largest component was kept.

    Undefined values are NaN. All fields but `counts` are the columns of cases.csv.
    """

    case_id: str
    class_id: int
    class_name: str
    lcc: int
    dice: float
    jaccard: float
    hd95_voxel: float
    asd_voxel: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    reference_ml: float
    prediction_ml: float
    failure: int
    counts: tuple[int, int, int, int] | None = None
    """Voxels: true positive, false positive, false negative, true negative."""


CASE_COLUMNS = tuple(field.name for field in fields(CaseScore) if field.name != "counts")
_TEXT = ("case_id", "class_name")
_INTEGER = ("class_id", "lcc", "failure")


def case_means(
    scores: Iterable[CaseScore],
    metric: str,
    *,
    lcc: bool = False,
    protocol: Protocol = "strict",
    class_name: str | None = None,
) -> dict[str, float]:
    """Case id -> its metric, averaged over the classes (or of the one named) where it is defined.

    A case where it is defined for none is NaN.
    """
    values: dict[str, list[float]] = {}
    for score in scores:
        if bool(score.lcc) == lcc and class_name in (None, score.class_name):
            values.setdefault(score.case_id, []).append(_value(score, metric, protocol))
    return {case_id: _mean(numbers) for case_id, numbers in values.items()}


def summarize(
    scores: Sequence[CaseScore],
    settings: EvaluateSettings | None = None,
    *,
    weights: str = "last",
    protocol: Protocol = "strict",
    seconds: float | None = None,
) -> dict[str, Any]:
    """The content of metrics.json: means over cases with 95% intervals, over all and per class.

    Args:
        scores: rows of one run.
        settings: what the rows were scored with; its `lcc` says which are the headline.
        weights: what predicted: `last` or `ema`.
        protocol: `strict`, or `paper` where an empty prediction has distances of 0.
        seconds: how long predicting and scoring took.
    """
    settings = settings or EvaluateSettings()
    chosen = [score for score in scores if bool(score.lcc) == settings.lcc]

    def interval(metric: str, class_name: str | None) -> dict[str, Any]:
        values = case_means(
            chosen, metric, lcc=settings.lcc, protocol=protocol, class_name=class_name
        ).values()
        samples, seed = settings.bootstrap_samples, settings.seed
        return vars(bootstrap_mean(list(values), samples=samples, seed=seed))

    return {
        "version": 1,
        "weights": weights,
        "protocol": protocol,
        "lcc": settings.lcc,
        "num_cases": len({score.case_id for score in chosen}),
        "seconds": seconds,
        "nsd_tolerance_mm": settings.nsd_tolerance_mm,
        "mean": {metric: interval(metric, None) for metric in METRICS},
        "classes": {
            name: {metric: interval(metric, name) for metric in METRICS}
            for name in class_names_of(chosen)
        },
        "failures": sum(score.failure for score in chosen),
    }


def class_names_of(scores: Iterable[CaseScore]) -> list[str]:
    """The foreground classes of the rows, by class index."""
    names = {score.class_id: score.class_name for score in scores}
    return [names[class_id] for class_id in sorted(names)]


def write_scores(
    run: Path,
    scores: Sequence[CaseScore],
    summary: Mapping[str, Any],
    *,
    reference_files: Mapping[str, Path] | None = None,
    prediction_files: Mapping[str, Path] | None = None,
) -> None:
    """Write cases.csv, metrics.json and nnunet_summary.json into a run folder.

    Args:
        run: the folder, made when it is not there.
        scores: rows as `evaluation.evaluate` gives them.
        summary: what `summarize` made of them.
        reference_files: case id -> reference mask, as nnU-Net's summary names it.
        prediction_files: case id -> predicted mask; `predictions/<case_id>.nii.gz` when left out.
    """
    case_ids = dict.fromkeys(score.case_id for score in scores)
    if prediction_files is None:
        prediction_files = {name: run / "predictions" / f"{name}.nii.gz" for name in case_ids}
    run.mkdir(parents=True, exist_ok=True)
    write_rows(run / "cases.csv", CASE_COLUMNS, [vars(score) for score in scores])
    lcc = bool(summary["lcc"])
    nnunet = nnunet_summary(scores, reference_files or {}, prediction_files, lcc=lcc)
    # nnU-Net writes NaN as such, which its readers need
    write_text(run / "nnunet_summary.json", json.dumps(nnunet, indent=2, sort_keys=True) + "\n")
    write_text(run / "metrics.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def read_scores(run: Path) -> list[CaseScore]:
    """The rows of a run folder's cases.csv.

    Raises:
        UsageError: there is none.
        DataError: it lacks a column or holds something that is no number.
    """
    path = run / "cases.csv"
    if not path.is_file():
        raise UsageError(f"{path}: not there. Run `vclipseg evaluate {run}` first.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [score_from_row(row) for row in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a table of scored cases ({error}). Run `vclipseg evaluate {run}` again."
        ) from error


def score_from_row(row: Mapping[str, str]) -> CaseScore:
    """A row of a cases.csv; an empty cell is NaN and other columns are not looked at."""
    values: dict[str, Any] = {}
    for column in CASE_COLUMNS:
        text = row[column]
        if column in _TEXT:
            values[column] = text
        elif column in _INTEGER:
            values[column] = int(text)
        else:
            values[column] = float(text) if text else math.nan
    return CaseScore(**values)


def nnunet_summary(
    scores: Sequence[CaseScore],
    reference_files: Mapping[str, Path],
    prediction_files: Mapping[str, Path],
    *,
    lcc: bool = False,
) -> dict[str, Any]:
    """The scores in the form of nnU-Net's summary.json: classes by index, NaN where undefined."""
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        if bool(score.lcc) == lcc:
            cases.setdefault(score.case_id, {})[str(score.class_id)] = _nnunet_metrics(score)
    labels = sorted({label for case in cases.values() for label in case}, key=int)
    names = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")
    mean = {
        label: {
            name: _mean([case[label][name] for case in cases.values() if label in case])
            for name in names
        }
        for label in labels
    }
    return {
        "foreground_mean": {
            name: sum(mean[label][name] for label in labels) / len(labels) if labels else math.nan
            for name in names
        },
        "mean": mean,
        "metric_per_case": [
            {
                "metrics": case,
                "prediction_file": str(prediction_files.get(case_id, "")),
                "reference_file": str(reference_files.get(case_id, "")),
            }
            for case_id, case in cases.items()
        ],
    }


def _nnunet_metrics(score: CaseScore) -> dict[str, float]:
    if score.counts is None:
        raise ValueError("scores read from cases.csv have no voxel counts: evaluate the run again")
    tp, fp, fn, tn = score.counts
    return {
        "Dice": score.dice,
        "IoU": score.jaccard,
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": tn,
        "n_pred": tp + fp,
        "n_ref": tp + fn,
    }


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file whole or not at all; six decimals, None and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _value(score: CaseScore, metric: str, protocol: Protocol) -> float:
    if protocol == "paper" and score.failure and metric in DISTANCES:
        return 0.0
    return getattr(score, metric)


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
