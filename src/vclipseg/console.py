"""What a person sees while something runs: bars on a terminal, a line now and then elsewhere.

All of it goes to stderr; results go to stdout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Called with what is done in all, a word on it, and the total if it was not known before."""

    def __call__(self, completed: int, word: str = "", total: int | None = None) -> None:
        """Show it."""


SECONDS_BETWEEN_LINES = 20.0


class Console:
    """Progress and notes on stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line."""
        self.rich.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """A bar of `total` units with the time left; without a terminal, a line now and then."""
        if self.rich.is_terminal:
            with self._rich_bar(title, total, done) as advance:
                yield advance
        else:
            yield self._lines(title, total, done)

    @contextmanager
    def _rich_bar(self, title: str, total: int | None, done: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[word]}", style="dim"),
        )
        with Progress(*columns, console=self.rich) as progress:
            task = progress.add_task(title, total=total, completed=done, word="")

            def advance(completed: int, word: str = "", total: int | None = None) -> None:
                progress.update(task, completed=completed, word=word, total=total)

            yield advance

    def _lines(self, title: str, total: int | None, done: int) -> Advance:
        began = last = time.monotonic()
        first, shown = done, -1

        def advance(completed: int, word: str = "", total: int | None = total) -> None:
            nonlocal last, shown
            now, total = time.monotonic(), total or 1
            if shown == total or (completed < total and now - last < SECONDS_BETWEEN_LINES):
                return
            last, shown = now, completed
            rate = (completed - first) / max(now - began, 1e-9)
            left = (
                f", {(total - completed) / rate:.0f} s left" if rate and completed < total else ""
            )
            self.note(f"{title}: {completed}/{total} in {now - began:.0f} s{left}  {word}".rstrip())

        return advance
