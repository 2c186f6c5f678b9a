"""Grids of experiments -> a record with tables and figures: what `vclipseg benchmark` does.

A cell whose settings hash is in the record's runs.csv is not run again, so a grid goes on from a
committed runs.csv alone; one that was stopped goes on from its run folder; one that failed is named in
the tables and tried again next time. One process at a time records into a grid.
"""

from __future__ import annotations

import signal
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vclipseg.benchmark.cells import is_done, locked
from vclipseg.benchmark.grids import Grid
from vclipseg.benchmark.launch import Ended, Launcher
from vclipseg.benchmark.pace import Pace, spell_seconds
from vclipseg.benchmark.planning import PAPER, Job, Planner
from vclipseg.benchmark.recording import grid_facts, run_facts, store
from vclipseg.console import Console
from vclipseg.errors import Stopped, UsageError
from vclipseg.experiment import stop_signals
from vclipseg.paper_protocol import FOLDER
from vclipseg.records import Place, forget, read_runs, recorded, row_of, take_over
from vclipseg.report.gallery import gallery, median_case
from vclipseg.runs import Run
from vclipseg.scores import Protocol, case_means, read_scores
from vclipseg.tables.facts import GridFacts, read_facts, write_facts
from vclipseg.tables.files import write_tables
from vclipseg.tables.groups import BASELINE, grouped
from vclipseg.tables.plots import save, write_figures

SAME = "the same command"


@dataclass
class Benchmark:
    """A grid on a data set, and the folder of its record.

    Attributes:
        planner: the grid, the data and where run folders go.
        record: folder of runs.csv, cases.csv, tables and figures.
        console: for progress.
    """

    planner: Planner
    record: Path
    console: Console

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """What is recorded of a run; the strict rows last, so that they mean that all is there."""
        return ("paper", "strict") if self.planner.paper else ("strict",)

    def jobs(self) -> list[Job]:
        """Every cell and its state; nothing is run.

        Raises:
            UsageError: a method, preset or setting of the grid is wrong.
        """
        return self.planner.jobs(self._recorded(self.record))

    def run(self, jobs: Sequence[Job], launcher: Launcher, workers: int, again: str = SAME) -> None:
        """Run what is to do, recording each cell as it ends; `state` and `why` of the jobs follow.

        Raises:
            Stopped: Ctrl-C or SIGTERM; run again and it goes on.
        """
        for job in jobs:
            if job.state == "finished":
                self._store(job)
        waiting = {str(job.folder): job for job in jobs if job.waits}
        orders = [job.order for job in waiting.values() if job.order]
        pace = Pace(self.record, self.planner.grid.common().name, workers)
        with stop_signals() as stopped:
            for ended in launcher(orders, stopped):
                job = waiting[ended.order.folder]
                self._end(job, ended, pace)
                self.console.note(_line(job, list(waiting.values()), pace))
            number = stopped()
        for job in waiting.values():
            if job.waits:
                job.state = "stopped"
        if number:
            code = 130 if number == signal.SIGINT else 75
            raise Stopped(f"stopped; {again} goes on", code)

    def reuse(self, jobs: Sequence[Job], others: Iterable[Path]) -> None:
        """Take runs from the records of other grids where they are the very ones asked for."""
        for other in others:
            have = self._recorded(other)
            for job in jobs:
                if (job.waits or job.state == "finished") and job.settings_hash in have:
                    for protocol in self.protocols:
                        shown = job.cell.entry.shown
                        take_over(other, self.record, job.settings_hash, protocol, shown)
                    job.state, job.why = "recorded", f"from {other}"

    def refuse_mixture(self, jobs: Iterable[Job], leaving: Container[Place] = ()) -> None:
        """Runs of other settings are not averaged with those of this grid, those `leaving` aside.

        Raises:
            UsageError: in the row of a cell the record has a run of other settings or data, of whatever
                seed, draw or fold.
        """
        staying = (run for run in read_runs(self.record) if run.place not in leaving)
        by_row = grouped(staying, lambda run: row_of(run.place))
        for job in jobs:
            for run in by_row.get(row_of(job.place), ()) if job.place else ():
                cell = replace(job.cell, seed=run.seed, draw=run.draw, fold=run.fold)
                same = self.planner.hash_of(cell)
                if run.settings_hash != same:
                    raise UsageError(
                        f"{self.record}: {cell} is recorded with other settings or other data (run "
                        f"{run.settings_hash}, here {same or 'none'}), and tables would average both. Take "
                        f"another folder with --out, or run all of the method anew with --redo "
                        f"{cell.entry.name}."
                    )

    def redo(self, methods: Sequence[str]) -> None:
        """Forget what is recorded of the grid's cells of some methods, and put their run folders aside.

        Raises:
            UsageError: the grid has no such method, or other settings of it would stay in the record.
        """
        grid = self.planner.grid
        known = {entry.name for entry in grid.settings.methods}
        if unknown := [method for method in methods if method not in known]:
            raise UsageError(f"--redo {unknown[0]}: {grid.path} has {', '.join(sorted(known))}")
        jobs = [job for job in self.jobs() if job.cell.entry.name in methods and job.order]
        places = {job.place for job in jobs if job.place}
        self.refuse_mixture(jobs, places)
        count = forget(self.record, places)
        self.console.note(f"redo {', '.join(methods)}: {count} recorded run(s) forgotten")
        for job in jobs:
            folder = job.folder.with_name(job.folder.name.removesuffix(PAPER))
            for old in (folder, folder.with_name(folder.name + PAPER), job.first_folder):
                put_aside(old)

    def write(self, jobs: Sequence[Job]) -> list[Path]:
        """Write grid.json, the tables and the figures; returns the files for people."""
        failed = self._failed_before(jobs)
        failed |= {str(job.cell): job.why for job in jobs if job.state == "failed"}
        self.record.mkdir(parents=True, exist_ok=True)
        write_facts(
            self.record,
            grid_facts(self.planner.grid, self.record, failed.items(), self.planner.remarks),
        )
        return write_all(self.record)

    def figure(self, case: str, jobs: Sequence[Job]) -> list[Path]:
        """Draw the methods of the grid on one case, from the run folders of the first seed.

        Args:
            case: a test case, or "median" for that of the supervised baseline.
            jobs: the cells.

        Raises:
            UsageError: no run folder is there.
        """
        there = [job for job in jobs if job.order and is_done(job.folder, paper=False)]
        if not there:
            raise UsageError(f"--figure: {self.planner.runs} has no finished run of this grid")
        alike = [job for job in there if job.cell.replicate == there[0].cell.replicate]
        if case == "median":
            names = [job.cell.entry.name for job in alike]
            baseline = alike[names.index(BASELINE) if BASELINE in names else 0]
            case = median_case(baseline.folder)
        runs = [(job.cell.entry.title, job.folder) for job in alike]
        return save(gallery(case, runs, self.planner.data), self.record / f"figure-{case}")

    def _failed_before(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Cell -> why it failed in an earlier call, of cells that nothing became of since."""
        told = read_facts(self.record).get(self.planner.grid.common().name)
        settled = {str(job.cell) for job in jobs if not job.waits and job.state != "stopped"}
        return {c: why for c, why in (told.failed if told else ()) if c not in settled}

    def _recorded(self, record: Path) -> set[str]:
        """The runs of a record that need not be run again."""
        return set.intersection(*(recorded(record, protocol) for protocol in self.protocols))

    def _end(self, job: Job, ended: Ended, pace: Pace) -> None:
        job.state, job.why, job.seconds = ended.state, ended.why, round(ended.seconds, 1)
        if ended.state == "done":
            pace.add(job.cell.entry, ended.seconds)
            self._store(job)

    def _store(self, job: Job) -> None:
        """Put a finished run into the record."""
        run = Run.open(job.folder)
        if run.settings_hash != job.settings_hash:
            job.state, job.why = "failed", f"{job.folder} holds another run; remove it"
            return
        first = Run.open(job.first_folder) if job.first_folder else None
        facts = run_facts(run, job.cell.entry.shown, first)
        for protocol in self.protocols:
            scored = job.folder / FOLDER if protocol == "paper" else job.folder
            store(self.record, scored, facts, protocol)
        values = [v for v in case_means(read_scores(job.folder), "dice").values() if v == v]
        job.dice = round(sum(values) / len(values), 6) if values else None
        job.state = "done"


def run_benchmark(
    bench: Benchmark,
    launcher: Launcher,
    workers: int,
    *,
    redo: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    figure: str | None = None,
) -> tuple[list[Job], list[Path]]:
    """Run a grid and write its tables and figures, also when it is stopped.

    Args:
        bench: what to run.
        launcher: where.
        workers: cells at once, for the time left.
        redo: methods to run again.
        reuse: records of other grids to take runs from.
        figure: test case to draw the methods on.

    Returns:
        The cells with what became of them, and the files.

    Raises:
        UsageError: something of the grid is wrong, the record has runs of other settings in its places, or
            another process is at it.
        Stopped: Ctrl-C or SIGTERM; tables are written of what is there.
    """
    with locked(bench.record):
        if redo:
            bench.redo(redo)
        jobs = bench.jobs()
        bench.refuse_mixture(jobs)
        bench.reuse([job for job in jobs if job.cell.entry.name not in redo], reuse)
        bench.console.note(f"{bench.planner.grid.path}: {count_states(jobs)}")
        drawn: list[Path] = []
        try:
            bench.run(jobs, launcher, workers, "the same command without --redo" if redo else SAME)
            drawn = bench.figure(figure, jobs) if figure else []
        finally:
            files = bench.write(jobs)  # last: table.md shows the figures
    return jobs, [*files, *drawn]


def only_tables(grid: Grid, record: Path) -> list[Path]:
    """Make tables and figures anew from what is recorded; what was told of failures and data is kept.

    Raises:
        UsageError: nothing is.
    """
    if not (record / "runs.csv").is_file():
        raise UsageError(f"{record}: nothing recorded yet (no runs.csv)")
    dataset = grid.common().name
    told = read_facts(record).get(dataset, GridFacts(dataset))
    write_facts(record, grid_facts(grid, record, told.failed, told.remarks))
    return write_all(record)


def write_all(record: Path) -> list[Path]:
    """Tables and figures of a record."""
    figures = write_figures(record)  # first: table.md shows them
    return [*write_tables(record), *figures]


def count_states(jobs: Sequence[Job]) -> str:
    """How many cells there are, and in which states."""
    states = [job.state for job in jobs]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(jobs)} cells: {', '.join(counts)}"


def put_aside(folder: Path | None) -> None:
    """Rename a run folder, if there is one; nothing is thrown away."""
    if folder and folder.is_dir():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.redone-{number}")).exists():
            number += 1
        folder.rename(aside)


def _line(job: Job, jobs: Sequence[Job], pace: Pace) -> str:
    """One line on a cell that ended, and on how long the others will take."""
    waiting = [other.cell.entry for other in jobs if other.waits]
    state = job.state if job.dice is None else f"Dice {job.dice:.4f}"
    text = f"[{len(jobs) - len(waiting)}/{len(jobs)}] {job.cell}: {state}"
    text += f" in {spell_seconds(job.seconds or 0)}" + (f": {job.why}" if job.why else "")
    left = pace.left(waiting)
    return text + (f"; about {spell_seconds(left)} left" if left else "")
