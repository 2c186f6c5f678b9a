"""The verb `benchmark` as a function: what the command line does, callable from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vclipseg.benchmark import view
from vclipseg.benchmark.grids import load_grid
from vclipseg.benchmark.launch import launcher
from vclipseg.benchmark.planning import Planner
from vclipseg.benchmark.run import Benchmark, only_tables, run_benchmark
from vclipseg.console import Console
from vclipseg.errors import UsageError


def run_verb(
    grid: Path,
    data: Path | None,
    out: Path | None,
    runs: Path,
    console: Console,
    overrides: Sequence[str] = (),
    *,
    workers: int = 2,
    threads: int = 1,
    redo: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    paper_protocol: bool = False,
    figure: str | None = None,
    tables: bool = False,
    dry_run: bool = False,
    cluster: str | None = None,
    cluster_set: Sequence[str] = (),
) -> tuple[Any, list[str], bool]:
    """Run a grid, list its cells (`dry_run`), or make its tables anew (`tables`).

    Returns:
        The result for a machine, its lines for a person, and whether no cell failed.

    Raises:
        UsageError: something of the grid is wrong, or data are needed and not given.
        Stopped: Ctrl-C or SIGTERM; the same call goes on.
    """
    asked = load_grid(grid, overrides)
    record = out or Path("results") / asked.name
    if tables:
        files = only_tables(asked, record)
        return [str(file) for file in files], view.summary(record, [], files), True
    if data is None:
        raise UsageError("no data: give the folder of the data set with --data FOLDER")
    bench = Benchmark(Planner(asked, data.resolve(), runs, paper_protocol), record, console)
    if dry_run:
        jobs = bench.jobs()
        return [job.to_json() for job in jobs], view.plan_lines(jobs), True
    launch = launcher(cluster, cluster_set, runs / "cluster", workers, threads)
    jobs, files = run_benchmark(bench, launch, workers, redo=redo, reuse=reuse, figure=figure)
    complete = all(job.state != "failed" for job in jobs)
    return view.result(bench, jobs, files), view.summary(record, jobs, files), complete
