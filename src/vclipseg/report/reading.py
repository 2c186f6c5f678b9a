"""A run folder as typed objects. What is not there is named in `Run.missing`, never an error."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.errors import UsageError, VclipsegError
from vclipseg.scores import CaseScore, Protocol, case_means, class_names_of, read_scores

RUN_FILES = ("experiment.json", "log.csv", "cases.csv", "metrics.json", "splits.json")


@dataclass(frozen=True, eq=False)
class Log:
    """log.csv by column, one row a step; of a repeated step the last row counts."""

    columns: dict[str, np.ndarray]  # (N,) each

    @property
    def steps(self) -> np.ndarray:
        """(N,), ascending."""
        return self.columns["step"]

    @property
    def terms(self) -> tuple[str, ...]:
        """Loss terms: the columns that have a weight beside them."""
        return tuple(name for name in self.columns if f"{name}_weight" in self.columns)

    @property
    def extras(self) -> tuple[str, ...]:
        """Columns that are neither a term, nor its weight, nor one of the fixed four."""
        known = {"step", "seconds", "lr", "total"}
        for term in self.terms:
            known |= {term, f"{term}_weight"}
        return tuple(name for name in self.columns if name not in known)


@dataclass(frozen=True, eq=False)
class Run:
    """What one run folder holds."""

    folder: Path
    name: str
    experiment: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    scores: tuple[CaseScore, ...] = ()
    log: Log | None = None
    missing: tuple[str, ...] = ()
    """Sentences: what could not be read, and what would make it."""

    @property
    def lcc(self) -> bool:
        """The headline keeps only the largest component."""
        return bool(self.metrics.get("lcc", False))

    @property
    def method(self) -> str:
        """The method's name, empty where it is not recorded."""
        return str(self.setting("settings", "method", "name") or "")

    @property
    def protocol(self) -> Protocol:
        """`paper` when the checkpoint was chosen on the test list."""
        return "paper" if self.metrics.get("protocol") == "paper" else "strict"

    @property
    def transductive(self) -> bool:
        """Training saw the test images."""
        return bool(self.experiment.get("transductive") or self.splits.get("transductive"))

    @property
    def train_seconds(self) -> float:
        """Time of training, NaN where there is no log."""
        seconds = self.log.columns.get("seconds") if self.log else None
        return math.nan if seconds is None else float(seconds[-1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Foreground classes, by class index."""
        names = [str(name) for name in as_list(self.experiment.get("class_names"))[1:]]
        return tuple(names or class_names_of(self.scores))

    @property
    def classes(self) -> dict[str, int] | None:
        """Class name -> stored value, the background too; None where they are not recorded."""
        names, values = (as_list(self.experiment.get(k)) for k in ("class_names", "label_values"))
        found = {str(name): int(value) for name, value in zip(names, values, strict=False)}
        return found or None

    def setting(self, *keys: str) -> Any:
        """`experiment.json` by path, None where it ends early."""
        value: Any = self.experiment
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def case_list(self, role: str) -> list[str]:
        """Case ids of splits.json: `labeled`, `unlabeled` or `test`."""
        return [str(case_id) for case_id in as_list(self.splits.get(role))]

    def prediction(self, case_id: str) -> Path:
        """Where the predicted mask of a test case is, if there is one."""
        return self.folder / "predictions" / f"{case_id}.nii.gz"

    def select(self, *, lcc: bool, class_name: str | None = None) -> list[CaseScore]:
        """Rows of one post-processing and one class (None: all)."""
        return [
            score
            for score in self.scores
            if bool(score.lcc) == lcc and class_name in (None, score.class_name)
        ]

    def per_case(
        self, metric: str, *, lcc: bool | None = None, class_name: str | None = None
    ) -> dict[str, float]:
        """Case -> the metric, averaged over the classes where it is defined; NaN where nowhere."""
        return case_means(
            self.scores,
            metric,
            lcc=self.lcc if lcc is None else lcc,
            protocol=self.protocol,
            class_name=class_name,
        )


def read_run(folder: Path) -> Run:
    """Read everything a report needs but voxels.

    Raises:
        UsageError: the folder is no run folder at all.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise UsageError(
            f"{folder}: not a run folder: it has none of {', '.join(RUN_FILES)}. "
            "Give the folder that `vclipseg train` wrote."
        )
    missing: list[str] = []
    experiment = _json(folder / "experiment.json", "settings and data are not shown", missing)
    environment = _json(folder / "environment.json", "versions and device are not shown", missing)
    splits = _json(folder / "splits.json", "the split is not shown", missing)
    evaluate = f"not evaluated yet: run `vclipseg evaluate {folder}`"
    metrics = _json(folder / "metrics.json", evaluate, missing)
    scores = _guarded(folder / "cases.csv", evaluate, missing, lambda _: read_scores(folder)) or ()
    log = _guarded(folder / "log.csv", "there are no curves", missing, _log)
    if not any((folder / "predictions").glob("*.nii.gz")):
        missing.append(
            f"{folder / 'predictions'}: no predictions, so there are no pictures of them"
        )
    return Run(
        folder=folder,
        name=str(experiment.get("name") or folder.resolve().name),
        experiment=experiment,
        environment=environment,
        splits=splits,
        metrics=metrics,
        scores=tuple(scores),
        log=log,
        missing=tuple(missing),
    )


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs, with names that tell them apart: their own, their methods, both, or their folders."""
    runs = [read_run(folder) for folder in folders]
    choices = (
        [run.name for run in runs],
        [run.method for run in runs],
        [f"{run.name} · {run.method}" for run in runs],
        [run.folder.resolve().name for run in runs],
        [str(run.folder) for run in runs],
    )
    different = (names for names in choices if len(set(names)) == len(names))
    names = next(different, [f"{run.name} {index}" for index, run in enumerate(runs, start=1)])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def number(text: Any) -> float:
    """A number from a CSV cell or JSON value; NaN for anything else."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one: run folders may be edited by hand."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def _guarded(path: Path, without: str, missing: list[str], read: Callable[[Path], Any]) -> Any:
    """`read(path)`, or None and a sentence in `missing`."""
    if not path.is_file():
        missing.append(f"{path}: not there, {without}")
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, VclipsegError) as error:
        missing.append(f"{path}: cannot be read ({error}), {without}")
        return None


def _json(path: Path, without: str, missing: list[str]) -> dict[str, Any]:
    return _guarded(path, without, missing, _object) or {}


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _log(path: Path) -> Log:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = {number(row["step"]): row for row in reader}
        names = [name for name in reader.fieldnames or [] if name]
    if not rows:
        raise ValueError("no row yet")
    ordered = [rows[step] for step in sorted(rows) if math.isfinite(step)]
    return Log({name: np.array([number(row.get(name)) for row in ordered]) for name in names})
