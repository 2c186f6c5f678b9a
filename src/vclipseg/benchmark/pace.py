"""How long the rest of a grid will take, from how long the same methods took."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vclipseg.benchmark.grids import Entry
from vclipseg.records import read_runs


class Pace:
    """Seconds of a cell by its method and preset, learned from a record and from cells that end.

    Of a record that grids on several data sets share, the rows of this one's count.
    """

    def __init__(self, record: Path, dataset: str, workers: int) -> None:
        self.workers = workers
        self.known: dict[tuple[str, str], list[float]] = {}
        for row in read_runs(record):
            if row.dataset == dataset:
                self.known.setdefault((row.method, row.preset), []).append(row.seconds)

    def add(self, entry: Entry, seconds: float) -> None:
        """Learn from a cell that ended."""
        self.known.setdefault((entry.name, entry.shown), []).append(seconds)

    def left(self, entries: Iterable[Entry]) -> float | None:
        """Seconds until cells of these methods have ended; None while nothing is known."""
        means = {key: sum(values) / len(values) for key, values in self.known.items()}
        if not means:
            return None
        usual = sum(means.values()) / len(means)
        return sum(means.get((e.name, e.shown), usual) for e in entries) / self.workers


def spell_seconds(seconds: float) -> str:
    """A time in the two units that matter."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
