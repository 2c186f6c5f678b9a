"""Footnotes of a table."""

from __future__ import annotations

from collections.abc import Iterator


class Footnotes:
    """Notes and the marks they are called by; one that is there already keeps its mark."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def mark(self, *notes: str) -> str:
        """The marks of some notes, such as "1,2"."""
        for note in notes:
            if note not in self.notes:
                self.notes.append(note)
        return ",".join(str(self.notes.index(note) + 1) for note in notes)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Mark and note."""
        return iter([(str(i), note) for i, note in enumerate(self.notes, start=1)])

    def __len__(self) -> int:
        return len(self.notes)
