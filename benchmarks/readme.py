"""Put what results/ holds into README.md, between its `results` markers.

    python benchmarks/readme.py

A grid without records reads "not measured yet". tests/test_docs.py fails where README.md says
anything else than this script would write.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vclipseg import tables
from vclipseg.files import write_text
from vclipseg.records import read_cases, read_runs
from vclipseg.statistics import Interval, bootstrap_mean_over_seeds
from vclipseg.tables import Group

ROOT = Path(__file__).parents[1]
COLUMNS = {  # metric -> heading and format
    "dice": ("Dice", ".3f"),
    "jaccard": ("Jaccard", ".3f"),
    "hd95_voxel": ("95HD, voxels", ".2f"),
    "asd_voxel": ("ASD, voxels", ".2f"),
    "assd_mm": ("ASSD, mm", ".2f"),
    "nsd": ("NSD", ".3f"),
}
NOT_MEASURED = "Not measured yet.\n"


def main() -> None:
    path = ROOT / "README.md"
    write_text(path, fill(path.read_text(encoding="utf-8"), ROOT / "results"))


def fill(text: str, results: Path) -> str:
    """The text with a grid's table between `<!-- results:GRID -->` and `<!-- /results -->`."""
    return re.sub(
        r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)",
        lambda found: found[1] + "\n" + show(results / found[2]) + "\n" + found[3],
        text,
        flags=re.DOTALL,
    )


def show(grid: Path) -> str:
    """A table of methods for each data set, label budget and width of a grid.

    Only masks as predicted, under the strict protocol; all else is in the grid's table.md.
    """
    sections = list(read_sections(grid))
    if not sections:
        return NOT_MEASURED
    return "\n".join([*(table(groups, tolerance(grid)) for groups in sections), source(grid)])


def read_sections(grid: Path) -> Iterable[list[Group]]:
    """The rows of each table: a method over its seeds, the supervised baseline first."""
    cases = read_cases(grid)
    records = [row for row in read_runs(grid) if row.protocol == "strict" and not row.lcc]
    sections = tables._grouped(records, tables._section_key)
    for key in sorted(sections):
        rows = tables._grouped(
            sorted(sections[key], key=tables._replicate_order), tables._group_key
        )
        yield [
            Group(tuple(runs), tuple(tuple(cases[run.key]) for run in runs))
            for runs in (rows[name] for name in sorted(rows))
        ]


def table(groups: Sequence[Group], tolerance_mm: float | None) -> str:
    first = groups[0].first
    test = {score.case_id for group in groups for scores in group.scores for score in scores}
    devices = sorted({record.device for group in groups for record in group.records})
    headings = ["Method", "Text vectors", "Runs", *(heading for heading, _ in COLUMNS.values())]
    headings += ["Failures", "Training, s"]
    claims = tables._comparisons(groups).values()
    within = "" if tolerance_mm is None else f" NSD is within {tolerance_mm:g} mm."
    return "\n".join(
        [
            f"{first.dataset}: {first.labeled} labeled cases, {len(test)} test cases, "
            f"{first.filters} filters, {', '.join(devices)}.{within}",
            "",
            "| " + " | ".join(headings) + " |",
            "|" + " --- |" * len(headings),
            *(row(group) for group in groups),
            "",
            *(f"- {comparison.claim}" for comparison in claims),
            *([""] if claims else []),
        ]
    )


def row(group: Group) -> str:
    run = group.first
    scored = sum(score.lcc == run.lcc for scores in group.scores for score in scores)
    cells = [
        f"{run.method} ({run.preset}, {run.steps} steps)",
        run.text or "none",
        str(len(group.records)),
        *(interval(group, metric, form) for metric, (_, form) in COLUMNS.items()),
        f"{sum(record.failures for record in group.records)} of {scored}",
        f"{np.mean([record.seconds for record in group.records]):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def interval(group: Group, metric: str, form: str) -> str:
    """The mean over cases and seeds, and its 95% interval."""
    per_case = group.per_case(metric)
    found = bootstrap_mean_over_seeds(tables._matrix(per_case, tables._case_ids(per_case)))
    return spell(found, form)


def spell(found: Interval, form: str) -> str:
    if found.mean is None:
        return "undefined"
    if found.low is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def tolerance(grid: Path) -> float | None:
    """How far apart in mm surfaces may be for NSD, as the grid's recipes say."""
    common = ROOT / "recipes" / grid.name / "common.toml"
    if not common.is_file():
        return None
    return tomllib.loads(common.read_text()).get("evaluate", {}).get("nsd_tolerance_mm", 2.0)


def source(grid: Path) -> str:
    name = grid.name
    return (
        f"Made from [results/{name}](results/{name}/) by `python benchmarks/readme.py`; largest "
        f"components and single seeds are in [table.md](results/{name}/table.md).\n"
    )


if __name__ == "__main__":
    main()
