"""The runs that are served, their cases, and where each case's volumes are.

Names that come in requests are looked up here and nowhere made into paths.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from vclipseg.data.datasets import Case, Dataset, open_dataset
from vclipseg.data.volume import Volume, read_labels
from vclipseg.errors import DataError, UsageError, VclipsegError
from vclipseg.report.reading import Run, as_list, read_run
from vclipseg.scores import CaseScore

T = TypeVar("T")
Role = Literal["test", "unlabeled", "labeled"]
MARK = "experiment.json"
SCORED = "cases.csv", "metrics.json"
SHOWN = ("dice", "jaccard", "hd95_mm", "assd_mm", "nsd")


class NotFound(UsageError):
    """A name that is not one of those served."""


@dataclass
class ServedRun:
    """A run folder.

    Attributes:
        id: its name in addresses.
        folder: where it is.
        data_root: where the data set is, if not where the run found it.
    """

    id: str
    folder: Path
    data_root: Path | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _known: tuple[Any, Run, dict[str, Any]] | None = field(default=None, repr=False)

    @property
    def run(self) -> Run:
        """What the folder holds; read again when it has been evaluated, or trained anew, since."""
        return self._read()[0]

    def _read(self) -> tuple[Run, dict[str, Any]]:
        """What the folder holds, and what was made of it so far."""
        stamp = tuple(_changed(self.folder / name) for name in (MARK, "splits.json", *SCORED))
        with self.lock:
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, read_run(self.folder), {}
            return self._known[1:]

    def _once(self, name: str, make: Callable[[Run], T]) -> T:
        """What is made of the folder, made anew only when it has changed."""
        run, made = self._read()
        if name not in made:
            made[name] = make(run)
        return made[name]

    @property
    def model_path(self) -> Path:
        """The finished model, if there is one."""
        return self.folder / "checkpoints" / "model.safetensors"

    @property
    def settings_hash(self) -> str:
        """The run's identity."""
        return str(self.run.experiment.get("settings_hash", ""))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Background first."""
        return tuple(str(name) for name in as_list(self.run.experiment.get("class_names")))

    @property
    def dataset(self) -> Dataset:
        """The data set of the run, without what people decided since.

        Raises:
            UsageError: it is not where the run found it.
        """
        return self._once("dataset", self._open_dataset)

    def _open_dataset(self, run: Run) -> Dataset:
        root = self.data_root or Path(str(run.setting("data", "root") or ""))
        if not root.exists():
            raise UsageError(f"{self.id}: its data are not at {root}; say where with --data FOLDER")
        return open_dataset(root, classes=run.classes, reviews=False)

    @property
    def roles(self) -> dict[str, Role]:
        """Case id -> what it was to the run."""
        return self._once("roles", _roles)

    def case(self, case_id: str) -> Case:
        """A case of the run.

        Raises:
            NotFound: it is none of them.
        """
        if case_id not in self.roles:
            raise NotFound(f"{self.id}: has no case {case_id!r}")
        try:
            return self.dataset.case(case_id)
        except UsageError as error:
            raise NotFound(f"{case_id}: is not in the data set any more") from error

    def has_data(self) -> bool:
        """Whether images can be shown."""
        try:
            return bool(self.dataset)
        except VclipsegError:
            return False

    def image(self, case_id: str, channel: int = 0) -> Volume:
        """One channel (X, Y, Z) of a case's image."""
        volume = self.dataset.image(self.case(case_id))
        if not 0 <= channel < len(volume.array):
            raise NotFound(f"{case_id}: has no channel {channel}")
        return Volume(_compact(volume.array[channel]), volume.affine)

    def reference(self, case_id: str) -> Volume:
        """Class indices (X, Y, Z) of a case that is not kept unlabeled.

        Raises:
            NotFound: nobody annotated it, or the run was not to see what somebody did.
        """
        case = self.case(case_id)
        if case.label is None or self.roles[case_id] == "unlabeled":
            raise NotFound(f"{case_id}: has no reference")
        return self.dataset.labels(case)

    def prediction(self, case_id: str) -> Volume:
        """Class indices (X, Y, Z) as the run's evaluation wrote them."""
        path = self.folder / "predictions" / f"{case_id}.nii.gz"
        if case_id not in self.roles or not path.is_file():
            raise NotFound(f"{case_id}: has no prediction yet")
        mask = read_labels(path)
        if mask.array.min() < 0 or mask.array.max() >= max(len(self.class_names), 2):
            raise DataError(f"{path}: holds values of no class; run `vclipseg evaluate` again")
        return Volume(mask.array.astype(np.uint8), mask.affine)

    def scores(self, case_id: str) -> list[CaseScore]:
        """The rows of one case that the run's headline is made of."""
        run = self.run
        return [score for score in run.select(lcc=run.lcc) if score.case_id == case_id]


def _roles(run: Run) -> dict[str, Role]:
    found: dict[str, Role] = {}
    for role in ("labeled", "unlabeled", "test"):
        found |= dict.fromkeys(run.case_list(role), role)
    return found


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _compact(array: np.ndarray) -> np.ndarray:
    """Whole numbers as int16, where that loses nothing: half the bytes to send."""
    low, high = float(array.min()), float(array.max())
    if low >= -32768 and high <= 32767 and np.array_equal(array, np.rint(array)):
        return array.astype(np.int16)
    return array.astype(np.float32, copy=False)


class Catalog:
    """All runs served, by id."""

    def __init__(self, root: Path, data_root: Path | None = None) -> None:
        """Find the runs of a folder.

        Args:
            root: a run folder, or a folder that has run folders in it or in its folders.
            data_root: where the data are, if not where the runs found them.

        Raises:
            UsageError: there is no run.
        """
        self.root = root
        self.data_root = data_root
        self.runs: dict[str, ServedRun] = {}
        self.find()
        if not self.runs:
            raise UsageError(
                f"{root}: no run folder here. Give the folder that `vclipseg train` wrote, or one "
                "that holds several."
            )

    def find(self) -> None:
        """Take in runs that are new, and let go of those that are gone."""
        there = {i: run for i, run in self.runs.items() if (run.folder / MARK).is_file()}
        known = {run.folder for run in there.values()}
        for folder in _run_folders(self.root):
            if folder not in known:
                parts = folder.relative_to(self.root).parts
                name = "~".join(parts) or self.root.resolve().name
                there[name] = ServedRun(name, folder, self.data_root)
        self.runs = there  # at once: others are reading it

    def get(self, run_id: str) -> ServedRun:
        """A run by id.

        Raises:
            NotFound: it is none of those served.
        """
        if run_id not in self.runs:
            raise NotFound(f"no run {run_id!r} is served")
        return self.runs[run_id]


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders with an experiment.json, down to two below the root."""
    for pattern in ("", "*", "*/*"):
        for folder in sorted(root.glob(pattern)) if pattern else [root]:
            if (folder / MARK).is_file() and folder.name != "paper":
                yield folder


def attempt(read: Callable[[], object]) -> bool:
    """Whether something can be read."""
    try:
        read()
    except VclipsegError:
        return False
    return True


def finite(value: float) -> float | None:
    """A number as JSON can hold it."""
    return None if math.isnan(value) or math.isinf(value) else value
