"""table.md: sections for people to read, with footnotes and what may be claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from vclipseg.statistics import Comparison, Interval, format_p
from vclipseg.tables.budgets import Saved
from vclipseg.tables.facts import GridFacts
from vclipseg.tables.footnotes import Footnotes
from vclipseg.tables.groups import BASELINE, replicate_name
from vclipseg.tables.published import Figure
from vclipseg.tables.sections import Row, Section
from vclipseg.tables.summaries import Flattery, flatteries, saved_labels

SHOWN = {  # metric -> heading and format
    "dice": ("Dice", ".4f"),
    "jaccard": ("Jaccard", ".4f"),
    "hd95_voxel": ("95HD (voxels)", ".2f"),
    "asd_voxel": ("ASD (voxels)", ".2f"),
    "assd_mm": ("ASSD (mm)", ".2f"),
    "nsd": ("NSD", ".4f"),
}
MOST_RUNS = 5
"""Up to so many runs the Dice of each is shown, of more their spread."""
MARKED = "**Chosen on the test set, as the literature does: these are too good.**"
LEGEND = """\
Made from runs.csv and cases.csv by `vclipseg benchmark`; do not edit.

Means are over the test cases, each first averaged over its classes and over the runs; in brackets 95%
bootstrap intervals over cases of that average. They do not hold the spread between runs, which is in
the last column. Dice, Jaccard and NSD are in [0, 1]. An empty prediction is a failure: Dice 0, distances
undefined and left out (0 under the paper protocol). ASD runs from the prediction's surface to the
reference's only. p is of the paired Wilcoxon signed-rank test, over cases averaged over the runs both
have, adjusted after Holm within a section: against the supervised baseline of as many steps; and against the
method with the highest mean Dice (bold), there over the runs that all methods of the section have and
adjusted for all pairs of methods, as the best was chosen by what is tested. Ranks are of these runs too.
"""


def markdown(sections: Sequence[Section], facts: Mapping[str, GridFacts], level: int = 2) -> str:
    """What is known of each data set, and every section, with headings of a level."""
    parts = []
    for dataset, of_one in facts.items():
        parts += _known(of_one, f"{dataset}: " if len(facts) > 1 else "")
    parts += [markdown_section(section, level) for section in sections]
    parts += _flattery_part(flatteries(sections), level)
    parts += _saved_part(saved_labels(sections), level)
    return "\n".join(parts)


def _known(facts: GridFacts, of: str) -> list[str]:
    parts = [f"{of}{facts.common}\n"] if facts.common else []
    if facts.missing:
        there = facts.cells - facts.missing
        parts += [f"{of}**Not complete yet: {there} of the grid's {facts.cells} runs.**\n"]
    if facts.failed:
        failed = _items(f"{cell}: {why}" for cell, why in facts.failed)
        parts += [f"{of}Failed, and not in the tables:\n", *failed]
    return parts


def markdown_section(section: Section, level: int = 2) -> str:
    """One section: heading, table, footnotes, and what may be claimed."""
    notes = Footnotes()
    columns = _columns(section, notes)
    rows = [[cell(row) for cell in columns.values()] for row in section.rows]
    claims = [section.uneven] if section.uneven else []
    claims += [comparison.claim for comparison in section.comparisons]
    for name, ranking in section.rankings().items():
        claims.append(("" if name == "all" else "Common settings only. ") + ranking.claim)
    return "\n".join(
        [
            f"{'#' * level} {section.title}",
            "",
            *([MARKED, ""] if section.first.protocol == "paper" else []),
            *_table(list(columns), rows),
            "",
            *(f"<sup>{mark}</sup> {note}  " for mark, note in notes),
            *([""] if len(notes) else []),
            *_items(f"Of the data: {remark}" for remark in section.facts.remarks),
            *_items([section.machines, *claims]),
        ]
    )


def _columns(section: Section, notes: Footnotes) -> dict[str, Callable[[Row], str]]:
    """Heading -> how a row fills the column."""
    columns: dict[str, Callable[[Row], str]] = {
        "Method": lambda row: row.group.name + _sup(notes.mark(*row.notes)),
        "Steps": lambda row: str(row.group.first.steps),
        "Weights": lambda row: row.group.first.weights,
        "Runs": lambda row: str(len(row.group.records)),
        "Dice": lambda row: _bold(_interval(row.interval("dice"), ".4f"), row.is_best),
    }
    for metric, (heading, form) in list(SHOWN.items())[1:]:
        columns[heading] = lambda row, m=metric, f=form: _interval(row.interval(m), f)  # type: ignore[misc]
    if any(row.components for row in section.rows):
        columns["Dice, largest component"] = lambda row: (
            _interval(row.components.interval("dice"), ".4f") if row.components else ""
        )
    columns |= {
        "Failures": lambda row: f"{row.failures} of {row.scored}",
        "Seconds": lambda row: f"{row.seconds:.0f}",
        f"Dice minus {BASELINE}": lambda row: _difference(row.to_baseline),
        "p (Holm)": lambda row: _p(row.to_baseline),
        "Dice minus best": lambda row: _difference(row.to_best),
        "p (Holm), best": lambda row: _p(row.to_best),
    }
    if any(row.figure for row in section.rows):
        size = "" if section.facts.full_size else ", full size"
        columns |= {
            f"Published{size}: Dice / Jaccard / 95HD / ASD": lambda row: _figure(row.figure, notes),
            f"Gap{' to full size' if size else ''}": lambda row: _number(row.gap, "+.4f"),
        }
    columns["Dice by run"] = _by_run
    return columns


def _figure(figure: Figure | None, notes: Footnotes) -> str:
    if figure is None:
        return ""
    values = (figure.dice, figure.jaccard, figure.hd95_voxel, figure.asd_voxel)
    forms = (".4f", ".4f", ".2f", ".2f")
    shown = [_number(v, form) or "-" for v, form in zip(values, forms, strict=True)]
    return " / ".join(shown) + _sup(notes.mark(f"published: {figure.origin}"))


def _by_run(row: Row) -> str:
    """The Dice of each run, or of many their standard deviation and range."""
    records = row.group.records
    if len(records) <= MOST_RUNS:
        return ", ".join(f"{replicate_name(run)}: {_number(run.dice, '.4f')}" for run in records)
    dice = [run.dice for run in records]
    return f"sd {np.std(dice, ddof=1):.4f}, {min(dice):.4f} to {max(dice):.4f}"


def _flattery_part(found: Sequence[Flattery], level: int) -> list[str]:
    if not found:
        return []
    headings = ["Method", "Labeled", "Runs", "Dice, best on test", "Dice, fixed beforehand"]
    headings += ["Flattered by", "Published"]
    rows = [
        [
            entry.name,
            str(entry.labeled),
            str(entry.runs),
            _number(entry.comparison.mean_a, ".4f"),
            _number(entry.comparison.mean_b, ".4f"),
            _difference(entry.comparison),
            _number(entry.figure.dice, ".4f") if entry.figure else "",
        ]
        for entry in found
    ]
    title = f"{'#' * level} How much choosing on the test set flatters"
    return [title, "", "The same runs under both protocols.", "", *_table(headings, rows), ""]


def _saved_part(found: Sequence[Saved], level: int) -> list[str]:
    if not found:
        return []
    headings = ["Method", "Labeled", "Dice", f"{BASELINE} needs", "Labels saved (95% interval)"]
    rows = [
        [
            entry.name,
            str(entry.labeled),
            f"{entry.dice:.4f}",
            beyond(entry.needed, entry),
            f"{beyond(entry.saved, entry, entry.labeled)} "
            f"({beyond(entry.low, entry, entry.labeled)} to "
            f"{beyond(entry.high, entry, entry.labeled)})",
        ]
        for entry in found
    ]
    text = (
        "How many labeled cases the supervised baseline needs for the same mean Dice, read from its "
        "measured budgets on a logarithmic scale and never beyond them; the interval is over cases."
    )
    return [f"{'#' * level} Labels saved", "", text, "", *_table(headings, rows), ""]


def beyond(labels: float, entry: Saved, minus: int = 0) -> str:
    """A number of labels; beyond the baseline's budgets "more than" or "fewer than" that, minus some."""
    if math.isinf(labels):
        word, end = ("more", entry.most) if labels > 0 else ("fewer", entry.least)
        return f"{word} than {end - minus:g}"
    return f"{labels:.1f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in [headings, *rows]]
    return [lines[0], "|" + " --- |" * len(headings), *lines[1:]]


def _items(texts: Iterable[str]) -> list[str]:
    lines = [f"- {text}" for text in texts]
    return [*lines, ""] if lines else []


def _sup(marks: str) -> str:
    return f" <sup>{marks}</sup>" if marks else ""


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold and text else text


def _difference(comparison: Comparison | None) -> str:
    if comparison is None or comparison.difference is None:
        return ""
    interval = Interval(comparison.difference, comparison.low, comparison.high, comparison.n)
    return _interval(interval, "+.4f")


def _p(comparison: Comparison | None) -> str:
    return "" if comparison is None else format_p(comparison.p_adjusted)


def _interval(interval: Interval, form: str) -> str:
    if interval.mean is None:
        return ""
    if interval.low is None:
        return format(interval.mean, form)
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)
