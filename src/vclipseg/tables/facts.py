"""grid.json of a record: what its tables say besides numbers. The grid writes it, the tables read it.

Grids on several data sets may share a record; there is an entry for each.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vclipseg.errors import DataError
from vclipseg.files import write_text


@dataclass(frozen=True)
class MethodFacts:
    """A method of the grid, by the `method` and `preset` columns of runs.csv.

    Attributes:
        published: name of the published figure beside it, where it is not the usual one.
        notes: what it does otherwise than the others.
    """

    method: str
    preset: str
    published: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GridFacts:
    """What is known of a record beside its rows of one data set.

    Attributes:
        dataset: as in runs.csv.
        title: heading of the tables.
        published: data set of the published figures, None where there are none.
        full_size: runs are as wide and as large as the published ones.
        common: what all cells share, as one sentence.
        nsd_tolerance_mm: of the surface Dice.
        methods: in the order of the tables.
        failed: cells that failed when they were last run, and why.
        remarks: what every table has to say of the data.
        cells: runs that the grid has in all, 0 where it is not known.
        missing: of them, those that the record lacks.
    """

    dataset: str
    title: str = ""
    published: str | None = None
    full_size: bool = False
    common: str = ""
    nsd_tolerance_mm: float | None = None
    methods: tuple[MethodFacts, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    cells: int = 0
    missing: int = 0

    def of(self, method: str, preset: str) -> MethodFacts:
        """What is known of a row; nothing where the grid no longer has it."""
        for facts in self.methods:
            if (facts.method, facts.preset) == (method, preset):
                return facts
        return MethodFacts(method, preset)

    def place(self, method: str, preset: str) -> int:
        """Position of a row in the tables; last where the grid no longer has it."""
        known = [(facts.method, facts.preset) for facts in self.methods]
        return known.index((method, preset)) if (method, preset) in known else len(known)


def write_facts(grid: Path, facts: GridFacts) -> None:
    """Write grid.json; what it says of other data sets stays.

    Raises:
        DataError: what is there is damaged.
    """
    known = {**read_facts(grid), facts.dataset: facts}
    content = [asdict(known[dataset]) for dataset in sorted(known)]
    write_text(grid / "grid.json", json.dumps(content, indent=2) + "\n")


def read_facts(grid: Path) -> dict[str, GridFacts]:
    """Read grid.json, by data set; nothing is known where it is not there.

    Raises:
        DataError: it is damaged.
    """
    path = grid / "grid.json"
    if not path.is_file():
        return {}
    try:
        entries = [_read(content) for content in json.loads(path.read_text(encoding="utf-8"))]
        return {facts.dataset: facts for facts in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}). Run the grid again.") from error


def _read(content: dict[str, Any]) -> GridFacts:
    methods = tuple(
        MethodFacts(**{**entry, "notes": tuple(entry["notes"])}) for entry in content["methods"]
    )
    failed = tuple((cell, why) for cell, why in content["failed"])
    remarks = tuple(content["remarks"])
    return GridFacts(**{**content, "methods": methods, "failed": failed, "remarks": remarks})
