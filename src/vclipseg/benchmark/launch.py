"""Where the cells of a grid run: in processes on this machine, or as a SLURM array through submitit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vclipseg
from vclipseg.benchmark.cells import Order, run_cell
from vclipseg.console import Console
from vclipseg.errors import UsageError

STOPPED = (75, 130)
"""Exit codes of a process that saved a checkpoint and stopped."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """How a cell ended: "done", "failed" or "stopped", why, and after how many seconds."""

    order: Order
    state: str
    why: str = ""
    seconds: float = 0.0


Launcher = Callable[[Sequence[Order], Callable[[], int]], Iterator[Ended]]
"""Runs orders until the second argument gives a signal's number; yields each as it ends."""


def local(workers: int, threads: int) -> Launcher:
    """Processes on this machine, so many at once; two of one thread beat one of two.

    Each has one GPU, if there is any: with more workers than GPUs some share one.
    """

    def launch(orders: Sequence[Order], stopped: Callable[[], int]) -> Iterator[Ended]:
        waiting, running = list(orders), dict[int, _Process]()
        gpus = visible_gpus()
        try:
            while running or (waiting and not stopped()):
                for place in range(workers):
                    if waiting and place not in running and not stopped():
                        gpu = gpus[place % len(gpus)] if gpus else None
                        order = next_order(waiting, [p.order for p in running.values()])
                        waiting.remove(order)
                        running[place] = _Process(order, threads, gpu)
                for process in running.values() if stopped() else ():
                    process.stop(stopped())
                for place in [place for place, process in running.items() if process.ended]:
                    yield running.pop(place).result()
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.stop(15)

    return launch


def next_order(waiting: Sequence[Order], running: Iterable[Order]) -> Order:
    """The first of those waiting that need not wait for a first stage which a running one makes, if any."""
    made = {order.first_folder for order in running if order.first_folder}
    return next((order for order in waiting if order.first_folder not in made), waiting[0])


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


class _Process:
    """A cell that runs. Ctrl-C on the terminal does not reach it: it is told once, by its parent."""

    def __init__(self, order: Order, threads: int, gpu: str | None = None) -> None:
        self.order, self.began, self.told = order, time.monotonic(), False
        folder = Path(order.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.txt"
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vclipseg.benchmark.cells"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=own_environment(threads, gpu),
                start_new_session=True,
                text=True,
            )
        assert self.process.stdin is not None
        self.process.stdin.write(order.to_json() + "\n")
        self.process.stdin.flush()  # and stays open: its end would stop the cell

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self, number: int) -> None:
        if not self.ended and not self.told:  # a second signal would end it without a checkpoint
            self.process.send_signal(number)
            self.told = True

    def result(self) -> Ended:
        assert self.process.stdin is not None
        self.process.stdin.close()
        seconds, code = time.monotonic() - self.began, self.process.returncode
        if code == 0:
            return Ended(self.order, "done", "", seconds)
        if code in STOPPED or self.told:
            return Ended(self.order, "stopped", "", seconds)
        return Ended(self.order, "failed", reason(self.log, code), seconds)


def own_environment(threads: int, gpu: str | None = None) -> dict[str, str]:
    """The environment of a cell: this very source, so many threads, and one GPU if it is named."""
    source = str(Path(vclipseg.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
    }


def reason(log: Path, code: int) -> str:
    """What a failed process said last."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    errors = [line for line in lines if re.match(r"(error|[\w.]*(Error|Exception)\b)", line)]
    said = (errors or [line for line in lines if line] or ["nothing"])[-1]
    return f"{said.removeprefix('error: ')} (exit code {code}; {log})"


def launcher(
    cluster_kind: str | None, parameters: Iterable[str], folder: Path, workers: int, threads: int
) -> Launcher:
    """Processes on this machine, or a cluster if one is named; see `local` and `cluster`."""
    if cluster_kind is None:
        return local(workers, threads)
    return cluster(cluster_kind, folder, workers, threads, read_parameters(parameters))


def cluster(
    kind: str, folder: Path, workers: int, threads: int, parameters: Mapping[str, object]
) -> Launcher:
    """A job array through submitit; what SLURM interrupts is put into the queue again.

    Args:
        kind: submitit's cluster: "slurm", "local" or "debug".
        folder: for submitit's files.
        workers: jobs at once.
        threads: of a job.
        parameters: of submitit's `update_parameters`, such as `slurm_partition`.

    Raises:
        UsageError: submitit is not installed, or refuses a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError(
            "--cluster needs submitit: pip install 'vclipseg[cluster]', or leave --cluster out"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=kind)
        own = {"name": "vclipseg", "cpus_per_task": threads, "slurm_array_parallelism": workers}
        executor.update_parameters(**{**own, **parameters})
    except (NameError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"--cluster {kind}: {error}") from error

    def launch(orders: Sequence[Order], stopped: Callable[[], int]) -> Iterator[Ended]:
        os.environ |= own_environment(threads)  # jobs inherit it
        began = time.monotonic()
        jobs = dict(zip(executor.map_array(ClusterJob(), orders), orders, strict=True))
        waiting = list(jobs)
        while waiting and not stopped():
            for job in [job for job in waiting if job.done()]:
                waiting.remove(job)
                error, seconds = job.exception(), time.monotonic() - began
                state = "done" if error is None else "failed"
                why = "" if error is None else str(error).strip().splitlines()[-1]
                yield Ended(jobs[job], state, why, seconds)
            time.sleep(POLL_SECONDS if kind in ("local", "debug") else 10)

    return launch


class ClusterJob:
    """What a job runs; submitit pickles it, and asks it for its `checkpoint` before a timeout."""

    def __call__(self, order: Order) -> None:
        """Run the cell."""
        run_cell(order, Console())

    def checkpoint(self, order: Order) -> Any:
        """The same again, which goes on where it was."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, order)


def read_parameters(given: Iterable[str]) -> dict[str, Any]:
    """`key=value` options of the cluster; values are JSON, and text where they are not.

    Raises:
        UsageError: one has another form.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--cluster-set {text}: expected key=value, such as timeout_min=600")
        try:
            found[key] = json.loads(raw)
        except ValueError:
            found[key] = raw
    return found
