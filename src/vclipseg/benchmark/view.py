"""What `vclipseg benchmark` prints: the cells, a table of each section, what failed, where things are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from vclipseg.benchmark.planning import Job
from vclipseg.benchmark.run import Benchmark, count_states
from vclipseg.statistics import Interval, format_p
from vclipseg.tables.groups import BASELINE
from vclipseg.tables.sections import Row, read_sections

NOT_DONE = ("failed", "skipped", "stopped")
HEADINGS = ("method", "runs", "Dice", f"minus {BASELINE}", "p (Holm)", "failures", "seconds")


def result(bench: Benchmark, jobs: Sequence[Job], files: Sequence[Path]) -> dict[str, Any]:
    """For a machine: cells, means and files."""
    rows = [
        {
            "section": section.title,
            "method": row.group.name,
            "runs": len(row.group.records),
            "dice": vars(row.interval("dice")),
            "failures": row.failures,
            "claim": row.to_baseline.claim if row.to_baseline else None,
        }
        for section in read_sections(bench.record)
        for row in section.rows
    ]
    return {
        "grid": str(bench.planner.grid.path),
        "record": str(bench.record),
        "cells": [job.to_json() for job in jobs],
        "rows": rows,
        "files": [str(file) for file in files],
    }


def summary(record: Path, jobs: Sequence[Job], files: Sequence[Path]) -> list[str]:
    """For a terminal: a table of each strict section, what failed, where things are."""
    lines: list[str] = []
    for section in read_sections(record):
        if not section.is_main:
            continue
        lines.append(_rich_table(section.title, [_cells(row) for row in section.rows]))
    lines += [
        f"{job.state.upper()}: {job.cell}: {job.why}" for job in jobs if job.state in NOT_DONE
    ]
    return [*lines, *(str(file) for file in files if file.suffix != ".svg")]


def _spell(interval: Interval) -> str:
    if interval.mean is None:
        return "-"
    ends = "" if interval.low is None else f" ({interval.low:.3f} to {interval.high:.3f})"
    return f"{interval.mean:.4f}{ends}"


def _cells(row: Row) -> tuple[str, ...]:
    """A method's line; the best has a star."""
    base = row.to_baseline
    return (
        row.group.name + (" *" if row.is_best else ""),
        str(len(row.group.records)),
        _spell(row.interval("dice")),
        "" if base is None or base.difference is None else f"{base.difference:+.4f}",
        "" if base is None else format_p(base.p_adjusted),
        str(row.failures),
        f"{row.seconds:.0f}",
    )


def _rich_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table as text, as wide as it needs to be."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = RichConsole(width=200, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def plan_lines(jobs: Sequence[Job]) -> list[str]:
    """For `--dry-run`: every cell and its state."""
    width = max(len(job.state) for job in jobs)
    lines = [
        f"{job.state:{width}}  {job.cell}" + (f": {job.why}" if job.why else "") for job in jobs
    ]
    return [*lines, count_states(jobs)]
