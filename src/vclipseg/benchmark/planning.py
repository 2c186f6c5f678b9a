"""Which run each cell of a grid is: its identity, its folder, and what is there of it already."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vclipseg.benchmark.cells import Order
from vclipseg.benchmark.grids import Cell, Grid
from vclipseg.config import Experiment
from vclipseg.data.datasets import Dataset, Split
from vclipseg.data.plan import Plan, make_plan
from vclipseg.errors import UsageError, VclipsegError
from vclipseg.experiment import open_split
from vclipseg.networks.text import TextVectors, text_vectors
from vclipseg.records import Place
from vclipseg.runs import identity

T = TypeVar("T")
PAPER = "-paper"
"""Ends the name of a run folder of the paper protocol: it is trained anew, as looks are made meanwhile."""


@dataclass
class Job:
    """A cell, and what is to become of it.

    `place` is where its run stands in the tables, as `RunRecord.place`. `state` is "recorded", "finished"
    (trained, but not in the record), "begun" or "to do"; then "done", "failed" or "stopped"; or "skipped".
    """

    cell: Cell
    state: str = "to do"
    why: str = ""
    settings_hash: str = ""
    place: Place | None = None
    order: Order | None = None
    dice: float | None = None
    seconds: float | None = None

    @property
    def waits(self) -> bool:
        """It is to be run."""
        return self.state in ("to do", "begun")

    @property
    def folder(self) -> Path:
        """Where its run is."""
        assert self.order is not None
        return Path(self.order.folder)

    @property
    def first_folder(self) -> Path | None:
        """Where the run is that it starts from."""
        return Path(self.order.first_folder) if self.order and self.order.first_folder else None

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        cell = self.cell
        return {
            "method": cell.entry.name,
            "preset": cell.entry.shown,
            "labeled": cell.labeled,
            "draw": cell.draw,
            "fold": cell.fold,
            "seed": cell.seed,
            "state": self.state,
            "why": self.why,
            "settings_hash": self.settings_hash,
            "run": self.order.folder if self.order else None,
            "dice": self.dice,
            "seconds": self.seconds,
        }


@dataclass
class Planner:
    """Cells to jobs.

    Attributes:
        grid: whose cells.
        data: folder of the data set.
        runs: where run folders go.
        paper: cells also repeat the literature's choice on the test set.
    """

    grid: Grid
    data: Path
    runs: Path
    paper: bool = False
    _memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What every result on the data has to say of them; known once jobs were planned."""
        splits = [value for key, value in self._memory.items() if key[0] == "split"]
        return next((s[0].remarks for s in splits if not isinstance(s, VclipsegError)), ())

    def jobs(self, recorded: Container[str]) -> list[Job]:
        """Every cell and its state.

        Raises:
            UsageError: a method, preset or setting of the grid is wrong, or two cells are the same run.
        """
        cells = list(self.grid.cells())
        for cell in cells:  # mistakes show before hours of training
            self.grid.experiment(cell)
            if cell.entry.pretrain:
                self.grid.experiment(cell, first_stage=True)
        jobs = [self._job(cell, recorded) for cell in cells]
        by_hash: dict[str, Job] = {}
        for job in jobs:
            if (same := by_hash.setdefault(job.settings_hash, job)) is not job and job.order:
                raise UsageError(
                    f"{self.grid.path}: {same.cell} and {job.cell} have the same settings; take one away"
                )
        return jobs

    def hash_of(self, cell: Cell) -> str:
        """The identity that a cell's run has, empty where it cannot be run."""
        key = "hash", id(cell.entry), *cell.replicate
        try:
            return self._once(key, lambda: self._expected(cell).settings_hash)
        except VclipsegError:
            return ""

    def _job(self, cell: Cell, recorded: Container[str]) -> Job:
        try:
            job = self._expected(cell)
        except VclipsegError as error:  # too few cases, no CLIP: the other cells can be run
            state = "skipped" if cell.entry.optional else "failed"
            return Job(cell, state, str(error).splitlines()[0])
        if job.settings_hash in recorded:
            job.state = "recorded"
        elif job.order and job.order.done:
            job.state = "finished"
        elif (job.folder / "experiment.json").is_file():
            job.state = "begun"
        return job

    def _expected(self, cell: Cell) -> Job:
        """The identity that a cell's run will have, and what its process is told."""
        values = self.grid.values(cell)
        first_values, first_folder, first_hash = None, None, None
        if cell.entry.pretrain:
            first_values = self.grid.values(cell, first_stage=True)
            first = self.grid.experiment(cell, first_stage=True)
            first_hash = self._identity(first)
            first_folder = str(self._folder(first, first.preset, first_hash))
            values.setdefault("train", {})["init_from"] = first_folder
        experiment = self.grid.experiment(cell, init_from=first_folder)
        found = self._identity(experiment, first_hash)
        folder = self._folder(experiment, cell.entry.shown, found)
        order = Order(
            title=str(cell),
            values=values,
            folder=f"{folder}{PAPER}" if self.paper else str(folder),
            data=str(self.data),
            paper=self.paper,
            first_values=first_values,
            first_folder=first_folder,
        )
        return Job(cell, settings_hash=found, place=self._place(cell, experiment), order=order)

    def _place(self, cell: Cell, experiment: Experiment) -> Place:
        e, text = experiment, self._text(experiment)
        labeled = len(self._split(experiment)[1].labeled)
        what = e.name, e.method_name, cell.entry.shown, text.label if text else "", labeled
        replicate = cell.seed, cell.draw, cell.fold
        return *what, *replicate, e.method.filters, e.train.steps, e.train.weights

    def _identity(self, experiment: Experiment, init_from: str | None = None) -> str:
        dataset, split = self._split(experiment)
        train = (*split.labeled, *split.unlabeled)
        plan: Plan = self._once(
            ("plan", frozenset(train), experiment.prepare.model_dump_json()),
            lambda: make_plan(dataset, train, experiment.prepare),
        )
        return identity(experiment, split, plan, self._text(experiment), init_from)

    def _split(self, experiment: Experiment) -> tuple[Dataset, Split]:
        key = "split", experiment.data.model_dump_json()
        return self._once(key, lambda: open_split(experiment, self.data))

    def _text(self, experiment: Experiment) -> TextVectors | None:
        if not experiment.needs_text:
            return None
        names = self._split(experiment)[0].class_names
        key = "text", experiment.text.model_dump_json()
        return self._once(key, lambda: text_vectors(experiment.text, names))

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives or raises, asked once for each key."""
        if key not in self._memory:
            try:
                self._memory[key] = make()
            except VclipsegError as error:
                self._memory[key] = error
        found = self._memory[key]
        if isinstance(found, VclipsegError):
            raise found
        return found

    def _folder(self, experiment: Experiment, shown: str, settings_hash: str) -> Path:
        d = experiment.data
        parts = [experiment.name, experiment.method_name, shown, f"l{d.labeled or 'all'}"]
        parts += [] if d.draw is None else [f"d{d.draw}"]
        parts += [] if d.fold is None else [f"f{d.fold}"]
        parts += [f"s{experiment.train.seed}", settings_hash[:6]]
        return (self.runs / re.sub(r"[^\w.-]+", "-", "-".join(parts))).resolve()
