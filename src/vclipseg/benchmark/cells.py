"""One cell of a grid in a process of its own: `python -m vclipseg.benchmark.cells`, its order on stdin.

Whatever was done of it before is not done again. It stops with a checkpoint when the process that
ordered it asks for it, or is gone: then its stdin ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vclipseg.config import build_experiment
from vclipseg.console import Console
from vclipseg.errors import UsageError, VclipsegError
from vclipseg.experiment import evaluate_run, new_run, prepare_data, train_run
from vclipseg.paper_protocol import FOLDER, TestLooks, evaluate_best
from vclipseg.report import write_report
from vclipseg.runs import Run

COMMAND = ("vclipseg", "benchmark")


@dataclass(frozen=True)
class Order:
    """What a process is told.

    Attributes:
        title: of the cell, for people.
        values: its settings, as a recipe has them.
        folder: its run folder.
        data: folder of the data set.
        paper: also repeat the literature's choice on the test set.
        first_values: settings of the run to start from, where there is one.
        first_folder: its folder.
    """

    title: str
    values: Mapping[str, Any]
    folder: str
    data: str
    paper: bool = False
    first_values: Mapping[str, Any] | None = None
    first_folder: str | None = None

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Order:
        """The inverse of `to_json`."""
        return cls(**json.loads(line))

    @property
    def done(self) -> bool:
        """Its results are there."""
        return is_done(Path(self.folder), self.paper)


def is_done(folder: Path, paper: bool) -> bool:
    """A run folder has all results that are asked for, made with the run's own settings."""
    found = [folder / "metrics.json"]
    if paper:
        found.append(folder / FOLDER / "metrics.json")
    return all(file.is_file() and "changed" not in json.loads(file.read_text()) for file in found)


def run_cell(order: Order, console: Console) -> None:
    """Train, evaluate and report a cell, going on where it was left.

    Raises:
        UsageError: another process is at it, or its settings do not fit the data.
        Stopped: it was asked to stop; a checkpoint is saved.
    """
    folder, data = Path(order.folder), Path(order.data)
    with locked(folder):
        if order.first_values and order.first_folder:
            first = Path(order.first_folder)
            with locked(first, wait=True):  # cells may share a first stage
                _trained(order.first_values, first, data, console, paper=False)
        run = _trained(order.values, folder, data, console, paper=order.paper)
        if not is_done(folder, paper=False):
            evaluate_run(run, console, data)
            write_report([folder], data_root=data)
        if not is_done(folder, order.paper):
            best = evaluate_best(run, console, data)
            write_report([best.folder], data_root=data)


def _trained(
    values: Mapping[str, Any], folder: Path, data: Path, console: Console, *, paper: bool
) -> Run:
    """The finished run of some settings, made or gone on with as needed."""
    if (folder / "experiment.json").is_file():
        run = Run.open(folder)
        if run.model_path.is_file():
            return run
        prepared = prepare_data(run.experiment, data, console, run.plan, 1)
    else:
        experiment = build_experiment(dict(values), {}, source=str(folder))
        run, prepared = new_run(experiment, data, folder, console, COMMAND, workers=1)
    train_run(run, prepared.cases, console, TestLooks(run, data) if paper else None)
    return run


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Nobody else works in a folder meanwhile, where the system has such locks.

    Raises:
        UsageError: somebody does, unless this is to `wait` until they are done.
    """
    try:
        import fcntl
    except ImportError:  # Windows: it is the user who takes care
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another process is at work there") from error
        yield


def _stop_when_orphaned() -> None:
    """Ask this process to stop once stdin ends."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the order that stdin holds; 0 when it is done, else an exit code as of the command line."""
    order = Order.from_json(sys.stdin.readline())
    _stop_when_orphaned()
    try:
        run_cell(order, Console())
    except VclipsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
