"""table.md, table.csv and table.tex of a record, made from its runs.csv, cases.csv and grid.json."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from vclipseg.files import write_text
from vclipseg.metrics import METRICS
from vclipseg.scores import write_rows
from vclipseg.statistics import Comparison
from vclipseg.tables.facts import read_facts
from vclipseg.tables.latex import latex
from vclipseg.tables.markdown import LEGEND, markdown
from vclipseg.tables.sections import Row, Section, read_sections

CSV_COLUMNS = (
    *("dataset", "labeled", "filters", "steps", "protocol", "weights", "lcc"),
    *("method", "preset", "text", "runs", "cases"),
    *(f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high")),
    *("dice_spread", "failures", "scored", "seconds"),
    *(
        f"{what}_{part}"
        for what in ("baseline", "best")
        for part in ("name", "difference", "low", "high", "p", "p_holm", "n")
    ),
    *(f"published_{part}" for part in ("name", "dice", "jaccard", "hd95_voxel", "asd_voxel")),
    *("published_selection", "full_size", "gap", "notes"),
)


def write_tables(grid: Path) -> list[Path]:
    """Write `table.md`, which shows the figures that are there, `table.csv` and `table.tex` of a grid.

    Args:
        grid: `results/<grid>` with runs.csv and cases.csv, and grid.json if the tables are to say more
            than these do.

    Returns:
        The files.

    Raises:
        DataError: one of them is damaged.
    """
    sections, facts = read_sections(grid), read_facts(grid)
    titles = dict.fromkeys(of_one.title for of_one in facts.values() if of_one.title)
    title = "; ".join(titles) or grid.resolve().name
    pictures = [f"![{file.stem}]({file.name})\n" for file in pictures_of(grid)]
    text = [f"# {title}\n", LEGEND, markdown(sections, facts), *pictures]
    write_text(grid / "table.md", "\n".join(text))
    write_rows(grid / "table.csv", CSV_COLUMNS, [_csv_row(s, r) for s in sections for r in s.rows])
    write_text(grid / "table.tex", latex(sections, title))
    return [grid / name for name in ("table.md", "table.csv", "table.tex")]


def pictures_of(grid: Path) -> list[Path]:
    """The figures of a grid by name, 2 labeled cases before 16."""

    def place(file: Path) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]

    return sorted(grid.glob("*.png"), key=place)


def _csv_row(section: Section, row: Row) -> dict[str, object]:
    run, figure = row.group.first, row.figure
    intervals = {metric: row.interval(metric) for metric in METRICS}
    values: dict[str, object] = {name: getattr(run, name) for name in CSV_COLUMNS[:10]}
    for metric, interval in intervals.items():
        values |= {metric: interval.mean, f"{metric}_low": interval.low}
        values[f"{metric}_high"] = interval.high
    dice = [record.dice for record in row.group.records]
    return {
        **values,
        "runs": len(row.group.records),
        "cases": len(section.cases),
        "dice_spread": float(np.std(dice, ddof=1)) if len(dice) > 1 else None,
        "failures": row.failures,
        "scored": row.scored,
        "seconds": row.seconds,
        **_csv_comparison("baseline", row.to_baseline),
        **_csv_comparison("best", row.to_best),
        **{f"published_{m}": getattr(figure, m, None) for m in ("name", *list(METRICS)[:4])},
        "published_selection": figure.selection if figure else None,
        "full_size": int(section.facts.full_size),
        "gap": row.gap,
        "notes": "; ".join(row.notes),
    }


def _csv_comparison(what: str, comparison: Comparison | None) -> dict[str, object]:
    columns = {"name": "name_b", "p_holm": "p_adjusted"}
    parts = ("name", "difference", "low", "high", "p", "p_holm", "n")
    return {f"{what}_{part}": getattr(comparison, columns.get(part, part), None) for part in parts}
