"""Put what results/ holds into README.md and the docs, between their markers.

    python benchmarks/readme.py

`results` markers take a short table of a grid, `table` markers all of it, with its figures, `method`
markers the rows of one method; `speed`, `modes`, `simulation`, `load`, `development` and `second` markers
what `speed.py`, `modes.py`, `annotate_next.py`, `serve_load.py`, `develop.py` and `second_test.py` found.
What has no record reads "not measured yet". tests/test_docs.py fails where a page says anything else than
this script would write.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
from second_test import Asked, comparisons, read_scores

from vclipseg.files import write_text
from vclipseg.statistics import Interval, adjust, bootstrap_mean, paired_comparison
from vclipseg.tables.facts import read_facts
from vclipseg.tables.files import pictures_of
from vclipseg.tables.markdown import markdown
from vclipseg.tables.sections import Row, Section, read_sections

ROOT = Path(__file__).parents[1]
METHODS = sorted(f"docs/methods/{path.name}" for path in (ROOT / "docs/methods").glob("*.md"))
PAGES = (
    "README.md",
    "docs/benchmark.md",
    "docs/explanation/experiments.md",
    "docs/explanation/performance.md",
    "docs/how-to/serve.md",
    *METHODS,
)
GRIDS = (
    "vclipseg-x",
    "la-1.25mm-methods",
    "la-1.25mm-4",
    "hippocampus-methods",
    "hippocampus-4",
)
OF_A_METHOD = (
    "method.",
    "teachers=",
    "labels=",
    "train.init_from=",
)  # what a development run was told of its method
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
    for page in PAGES:
        path = ROOT / page
        write_text(path, fill(path.read_text(encoding="utf-8"), ROOT / "results"))


def fill(text: str, results: Path) -> str:
    """The text with a grid's tables between `<!-- results:GRID -->` and `<!-- /results -->`.

    And all of its tables between `<!-- table:GRID -->` and `<!-- /table -->`, the rows of a method between
    `<!-- method:NAME -->` and `<!-- /method -->`, the speed of a kind of device between
    `<!-- speed:DEVICE -->` and `<!-- /speed -->`, what to annotate next between
    `<!-- simulation:NAME -->` and `<!-- /simulation -->`, what a server went through between
    `<!-- load:NAME -->` and `<!-- /load -->`, and what was tried with the recipes of a folder between
    `<!-- development:FOLDER -->` and `<!-- /development -->`, how accurate the ways to cover a volume are
    between `<!-- modes:NAME -->` and `<!-- /modes -->`, and the second test of a grid between
    `<!-- second:GRID -->` and `<!-- /second -->`.
    """
    kinds = {
        "results": show,
        "table": show_all,
        "method": show_method,
        "speed": show_speed,
        "simulation": show_simulation,
        "load": show_load,
        "development": show_development,
        "modes": show_modes,
        "second": show_second,
    }
    for kind, make in kinds.items():
        text = re.sub(
            rf"(<!-- {kind}:(\S+) -->\n).*?(<!-- /{kind} -->)",
            lambda found, make=make: found[1] + "\n" + make(results / found[2]) + "\n" + found[3],
            text,
            flags=re.DOTALL,
        )
    return text


def show(grid: Path) -> str:
    """A table of methods for each data set, label budget and width of a grid.

    Only masks as predicted, under the strict protocol; all else is in the grid's table.md.
    """
    sections = [section for section in read_sections(grid) if section.is_main]
    if not sections:
        return NOT_MEASURED
    return "\n".join([*(table(section) for section in sections), source(grid)])


def show_all(grid: Path) -> str:
    """Every section of a grid's table.md, and its figures."""
    sections, name = read_sections(grid), grid.name
    if not sections:
        return NOT_MEASURED
    pictures = [f"![{file.stem}](../results/{name}/{file.name})\n" for file in pictures_of(grid)]
    files = ", ".join(
        f"[{file}](../results/{name}/{file})" for file in ("runs.csv", "cases.csv", "table.csv")
    )
    text = [f"Records: {files}.\n", *pictures, markdown(sections, read_facts(grid), level=3)]
    return "\n".join(text).rstrip("\n") + "\n"


def show_method(method: Path) -> str:
    """Every preset of a method in the CPU grids, and how its Dice differs from supervised's."""
    lines, seen = [], set()
    for grid in GRIDS:
        for section in read_sections(method.parent / grid):
            for row in section.rows if section.is_main else ():
                run = row.group.first
                key = (run.dataset, run.labeled, run.preset, run.text, run.steps)
                if run.method == method.name and key not in seen:
                    seen.add(key)
                    lines.append(result_line(row, grid))
    if not lines:
        return NOT_MEASURED
    headings = ["Data", "Preset", "Runs", "Dice", "Minus supervised", "p", "Training, s", "Record"]
    return "\n".join(
        [
            "| " + " | ".join(headings) + " |",
            "|" + " --- |" * len(headings),
            *lines,
            "",
            "From the grids on the [benchmark](../benchmark.md) page and in the",
            "[README](../../README.md#results): 8 filters, equal steps. Means over test cases and seeds,",
            "with 95% intervals over cases; p is Wilcoxon's, after Holm over the grid's methods.",
            "",
        ]
    )


def result_line(row: Row, grid: str) -> str:
    run, against = row.group.first, row.to_baseline
    difference = p = ""
    if against and against.difference is not None:
        difference = f"{against.difference:+.3f}"
        if against.low is not None:
            difference += f" ({against.low:+.3f} to {against.high:+.3f})"
        least = against.p if against.p_adjusted is None else against.p_adjusted
        p = "" if least is None else f"{least:.2g}"
        difference += f", against {row.against}" if row.against else ""
    preset = run.preset + (f", text vectors {run.text}" if run.text else "")
    cells = [f"{run.dataset}, {run.labeled} labeled", preset, str(len(row.group.records))]
    cells += [spell(row.interval("dice"), ".3f"), difference, p, f"{row.seconds:.0f}", grid]
    return "| " + " | ".join(cells) + " |"


def show_simulation(folder: Path) -> str:
    """Each strategy of what to annotate next, and its Dice minus that of random, over cases."""
    path = folder / "cases.csv"
    if not path.is_file():
        return NOT_MEASURED
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seeds, case_ids = (sorted({row[key] for row in rows}) for key in ("seed", "case_id"))
    dice = {(row["strategy"], row["seed"], row["case_id"]): float(row["dice"]) for row in rows}
    labeled = {row["strategy"]: row["labeled"] for row in rows}
    means = {
        strategy: np.mean([[dice[strategy, s, c] for c in case_ids] for s in seeds], axis=0)
        for strategy in labeled
        if all((strategy, s, c) in dice for s in seeds for c in case_ids)
    }
    lines = ["| labels | chosen | Dice | minus random | p |", "|" + " --- |" * 5]
    others = [name for name in means if name not in ("start", "random")]
    pairs = [paired_comparison(means[name], means["random"]) for name in others]
    against = dict(zip(others, adjust(pairs), strict=True))
    for name, values in means.items():
        cells = [
            labeled[name],
            name.replace("_", "-"),
            spell(bootstrap_mean(values), ".3f"),
            "",
            "",
        ]
        if found := against.get(name):
            cells[3] = f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
            cells[4] = f"{found.p_adjusted:.2g}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{len(seeds)} seeds, {len(case_ids)} test cases.", ""])


def show_speed(device: Path) -> str:
    """The rows of results/speed-DEVICE.json."""
    path = device.with_name(f"speed-{device.name}.json")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not rows:
        return NOT_MEASURED
    lines = ["| what | reference | ours | reached | target | |", "|" + " --- |" * 6]
    lines += [
        f"| {row['name']} | {quantity(row['reference'], row['unit'])} | "
        f"{quantity(row['ours'], row['unit'])} | {row['value']:.3g} | {row['target']:g} | "
        f"{'' if row['holds'] else '**missed**'} |"
        for row in rows
    ]
    notes = [f"- {row['name']}: {row['note']}." for row in rows if row["note"]]
    machines = sorted({f"{row['device']}, commit {row['commit']}" for row in rows})
    made = f"Made from [{path.name}](../../results/{path.name}): {'; '.join(machines)}.\n"
    return "\n".join([*lines, "", *notes, "", made])


def show_load(record: Path) -> str:
    """What clients saw of a server, from results/NAME.json."""
    path = record.with_name(f"{record.name}.json")
    if not path.is_file():
        return NOT_MEASURED
    found = json.loads(path.read_text(encoding="utf-8"))
    busy = sum(n for answer, n in found["answers"].items() if answer.endswith(" 503"))
    memory = found["memory_mb"]
    lines = [
        ("clients, seconds", f"{found['clients']}, {found['seconds']:g}"),
        ("requests", f"{found['requests']}, of them {busy} told to come again (503)"),
        (
            "seconds of an answer",
            f"{found['median_seconds']:g}, at most {found['slowest_seconds']:g}",
        ),
        ("crashed", "yes" if found["crashed"] else "no"),
        ("wrong answers", str(len(found["wrong"]))),
        (
            "reviews confirmed, then lost",
            f"{found['reviews_confirmed']}, {len(found['reviews_lost'])}",
        ),
        (
            "memory, MB: at the start, in the first third, at most",
            f"{memory['at_start']}, {memory['after_a_third']}, {memory['highest']}",
        ),
    ]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            *(f"| {what} | {value} |" for what, value in lines),
            "",
            f"Made from [{path.name}](../../results/{path.name}): {found['device']}, "
            f"commit {found['commit']}.",
            "",
        ]
    )


def show_development(folder: Path) -> str:
    """What results/development.csv holds of the recipes in a folder, in the order of time."""
    path = folder.with_name("development.csv")
    if not path.is_file():
        return NOT_MEASURED
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = [row for row in found if Path(row["recipe"]).parent.name == folder.name]
    if not rows:
        return NOT_MEASURED
    lines = [
        f"| {Path(row['recipe']).stem} | {changes(row['overrides'])} | {row['seed']} | "
        f"{float(row['dice']):.3f} | {beside_supervised(row, rows)} | {float(row['lowest']):.2f} | "
        f"{float(row['seconds']):.0f} | {row['commit']} |"
        for row in rows
    ]
    headings = ["Recipe", "Changed", "Seed", "Dice", "Minus supervised", "Lowest case"]
    headings += ["Training, s", "Commit"]
    return "\n".join(
        ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings), *lines, ""]
    )


def beside_supervised(row: dict[str, str], rows: list[dict[str, str]]) -> str:
    """How far a row is from the latest supervised run that was told the same but for its method.

    With a 95% interval over the cases; empty where the cases of either are not in the record.
    """
    told = " ".join(word for word in row["overrides"].split() if not word.startswith(OF_A_METHOD))
    same = [
        other
        for other in rows
        if (Path(other["recipe"]).stem, other["overrides"]) == ("supervised", told)
    ]
    if not same or row is same[-1] or not (row["case_dice"] and same[-1]["case_dice"]):
        return ""
    a, b = ([float(v) for v in of["case_dice"].split()] for of in (row, same[-1]))
    if len(a) != len(b):
        return ""
    found = paired_comparison(a, b)
    return f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def show_second(grid: Path) -> str:
    """VCLIPSeg-X beside each other method of a grid's second-test.csv."""
    path = grid / "second-test.csv"
    found = read_scores(path)
    lines = [
        f"| {ours.dataset} | {other.method} ({other.preset}) | {seeds(found, ours, other)} | {c.n} | "
        f"{c.difference:+.4f} ({c.low:+.4f} to {c.high:+.4f}) | {c.p_adjusted:.2g} |"
        for ours in found
        if ours.method == "vclipseg_x"
        for other, c in comparisons(found, ours).items()
    ]
    if not lines:
        return NOT_MEASURED
    headings = ["Data", "Against", "Seeds", "Cases", "Dice of VCLIPSeg-X minus it", "p (Holm)"]
    return "\n".join(
        [
            "| " + " | ".join(headings) + " |",
            "|" + " --- |" * len(headings),
            *lines,
            "",
            f"Made from [{path.name}](../results/{grid.name}/{path.name}).",
            "",
        ]
    )


def seeds(found: dict[Asked, dict], ours: Asked, other: Asked) -> str:
    """Those that both have."""
    return ", ".join(map(str, sorted(found[ours].keys() & found[other].keys())))


def show_modes(record: Path) -> str:
    """The ways to cover a volume beside the literature's, from results/NAME.json."""
    path = record.with_name(f"{record.name}.json")
    if not path.is_file():
        return NOT_MEASURED
    found = json.loads(path.read_text(encoding="utf-8"))
    headings = ["way", "Dice", "minus the literature's", "largest of a case", "times as fast"]
    lines = [
        f"| {row['way']} | {row['dice']:.4f} | {row['mean_difference']:+.4f} | "
        f"{row['largest_difference']:.4f} | {row['times_as_fast']:g} |"
        for row in found["ways"]
    ]
    size, step = (" x ".join(map(str, found[key])) for key in ("patch", "stride"))
    return "\n".join(
        [
            "| " + " | ".join(headings) + " |",
            "|" + " --- |" * len(headings),
            *lines,
            "",
            f"{found['model']}, trained by `{' '.join(found['trained'])}`; {found['cases']} test cases, "
            f"windows of {size}, the literature's {step} "
            f"apart. Made from [{path.name}](../../results/{path.name}): {found['device']}, commit "
            f"{found['commit']}.",
            "",
        ]
    )


def changes(overrides: str) -> str:
    """What a run was told, without its seed, which has a column."""
    kept = [f"`{word}`" for word in overrides.split() if not word.startswith("train.seed=")]
    return " ".join(kept) or "nothing"


def quantity(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}"


def table(section: Section) -> str:
    first, tolerance_mm = section.first, section.facts.nsd_tolerance_mm
    devices = sorted({run.device for row in section.rows for run in row.group.records})
    headings = ["Method", "Text vectors", "Runs", *(heading for heading, _ in COLUMNS.values())]
    headings += ["Failures", "Training, s"]
    claims = section.comparisons
    within = "" if tolerance_mm is None else f" NSD is within {tolerance_mm:g} mm."
    return "\n".join(
        [
            f"{first.dataset}: {first.labeled} labeled cases, {len(section.cases)} test cases, "
            f"{first.filters} filters, on {'; '.join(devices)}.{within}",
            "",
            "| " + " | ".join(headings) + " |",
            "|" + " --- |" * len(headings),
            *(line(row) for row in section.rows),
            "",
            *(f"- {comparison.claim}" for comparison in claims),
            *(f"- Of the data: {remark}" for remark in section.facts.remarks),
            *([""] if claims or section.facts.remarks else []),
        ]
    )


def line(row: Row) -> str:
    run = row.group.first
    cells = [
        f"{run.method} ({run.preset}, {run.steps} steps)",
        run.text or "none",
        str(len(row.group.records)),
        *(spell(row.interval(metric), form) for metric, (_, form) in COLUMNS.items()),
        f"{row.failures} of {row.scored}",
        f"{row.seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def spell(found: Interval, form: str) -> str:
    if found.mean is None:
        return "undefined"
    if found.low is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def source(grid: Path) -> str:
    name = grid.name
    return (
        f"Made from [results/{name}](results/{name}/) by `python benchmarks/readme.py`; largest "
        f"components and single seeds are in [table.md](results/{name}/table.md).\n"
    )


if __name__ == "__main__":
    main()
