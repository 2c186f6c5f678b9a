"""What a grid writes down: rows of its record for each run, and what its tables say besides numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vclipseg.benchmark.grids import Grid, differences
from vclipseg.environment import computed_on
from vclipseg.records import read_runs, record, run_record
from vclipseg.runs import Run
from vclipseg.scores import Protocol, read_scores
from vclipseg.tables.facts import GridFacts, MethodFacts
from vclipseg.tables.published import is_full_size


def store(grid: Path, folder: Path, facts: dict[str, Any], protocol: Protocol) -> None:
    """Record the scores of a folder, with and without largest component."""
    scores = read_scores(folder)
    rows = [run_record(scores, lcc=lcc, protocol=protocol, **facts) for lcc in (False, True)]
    record(grid, rows, scores)


def run_facts(run: Run, shown: str, first: Run | None = None) -> dict[str, Any]:
    """The columns of runs.csv besides the metrics; a first stage's time is counted in."""
    e, environment = run.experiment, run.environment
    return {
        "settings_hash": run.settings_hash,
        "dataset": e.name,
        "method": e.method_name,
        "preset": shown,
        "text": run.text.label if run.text else "",
        "labeled": len(run.split.labeled),
        "draw": e.data.draw,
        "fold": e.data.fold,
        "seed": e.train.seed,
        "filters": e.method.filters,
        "steps": e.train.steps,
        "weights": e.train.weights,
        "seconds": run.train_seconds + (first.train_seconds if first else 0.0),
        "device": computed_on(environment),
        "commit": environment["commit"] or "",
    }


def grid_facts(
    grid: Grid, folder: Path, failed: Iterable[tuple[str, str]], remarks: Iterable[str] = ()
) -> GridFacts:
    """What the tables of a grid say besides numbers."""
    s, common = grid.settings, grid.common()
    cells, missing = missing_runs(grid, folder)
    patch = " x ".join(map(str, common.train.patch))
    return GridFacts(
        dataset=common.name,
        title=s.title,
        published=s.published,
        full_size=s.published is not None
        and is_full_size(s.published, common.method.filters, common.train.patch),
        common=(
            f"All methods have the same data, patches ({sum(common.method.patches)} of {patch} a "
            "step), augmentation, network width and number of steps, but for what the footnotes say."
        ),
        nsd_tolerance_mm=common.evaluate.nsd_tolerance_mm,
        methods=tuple(
            MethodFacts(entry.name, entry.shown, entry.published, tuple(differences(grid, entry)))
            for entry in s.methods
        ),
        failed=tuple(failed),
        remarks=tuple(remarks),
        cells=cells,
        missing=missing,
    )


def missing_runs(grid: Grid, folder: Path) -> tuple[int, int]:
    """How many runs a grid has in all, whatever a call asked for, and how many a record lacks of them."""
    whole = grid.whole()
    dataset = whole.common().name
    there = {
        (row.method, row.preset, labeled, *row.replicate, row.steps)
        for row in read_runs(folder)
        for labeled in (row.labeled, None)  # None: a recipe that leaves it to the data
        if row.dataset == dataset and row.protocol == "strict"
    }
    wanted = []
    for cell in whole.cells():
        if not cell.entry.optional:
            e = whole.experiment(cell)
            labeled = len(e.data.labeled) if isinstance(e.data.labeled, tuple) else e.data.labeled
            name = cell.entry.name, cell.entry.shown, labeled
            wanted.append((*name, cell.seed, cell.draw, cell.fold, e.train.steps))
    return len(wanted), sum(run not in there for run in wanted)
