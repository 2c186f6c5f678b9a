"""report.html: one file that opens offline, made from run folders and, in reach, their data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vclipseg import __version__
from vclipseg.errors import UsageError
from vclipseg.files import write_text
from vclipseg.report import cases, figures, provenance, results, slices, surface
from vclipseg.report.reading import Run, as_list, number, read_runs

__all__ = ["write_report"]


def write_report(
    runs: Sequence[Path], out: Path | None = None, data_root: Path | None = None
) -> Path:
    """Write the report of the first run, compared with the others.

    What cannot be read (no predictions, data out of reach, not evaluated yet) is said in the
    report and does not stop it.

    Args:
        runs: run folders; the first is the one reported.
        out: the file to write; `report.html` in the first run's folder by default.
        data_root: where the data set is now, if not where the run found it.

    Returns:
        The file written.

    Raises:
        UsageError: no run, a folder that is none, or a file that cannot be written.
    """
    if not runs:
        raise UsageError("no run to report: give one or more run folders")
    found = read_runs(Path(run) for run in runs)
    path = Path(out) if out else found[0].folder / "report.html"
    page = render(found, Path(data_root) if data_root else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise UsageError(f"{path}: the report cannot be written ({error.strerror})") from error
    return path


def render(runs: Sequence[Run], data_root: Path | None = None) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("vclipseg", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(show=results.show, show_p=results.show_p, number=number)
    notes = [note for run in runs for note in run.missing]
    pictures = _pictures(runs, data_root, notes)
    return environment.get_template("template.html.j2").render(
        **_numbers(runs),
        **pictures,
        run=runs[0],
        runs=runs,
        notes=notes,
        version=__version__,
        lead=provenance.lead(runs[0]),
        banners=[provenance.banners(run) for run in runs],
        facts=provenance.facts(runs),
        commands=[provenance.command(run) for run in runs],
        settings=provenance.settings(runs),
        channel=next(iter(as_list(runs[0].experiment.get("channel_names"))), None),
        charts=figures.charts(runs),
        style=_asset("style.css"),
        viewer=_asset("viewer.js"),
    )


def _numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """Tables and strip plots."""
    lcc = runs[0].lcc
    names = runs[0].class_names
    by_class: list[tuple[str | None, list[figures.Strip]]] = [(None, results.strips(runs))]
    if len(names) > 1:
        by_class += [(name, results.strips(runs, class_name=name)) for name in names]
    return {
        "several_classes": max(len(run.class_names) for run in runs) > 1,
        "metrics": results.METRICS,
        "compared": results.COMPARED,
        "tables": [(kept, results.headline_rows(runs, lcc=kept)) for kept in (lcc, not lcc)],
        "verdicts": results.verdicts(runs),
        "case_rows": results.case_rows(runs),
        "strips": [
            (name, figures.strip_plot(rows, "Dice" if name is None else f"Dice of {name}"))
            for name, rows in by_class
            if rows
        ],
    }


def _pictures(runs: Sequence[Run], data_root: Path | None, notes: list[str]) -> dict[str, Any]:
    """Slices and surfaces of the best, the median and the worst case."""
    chosen = cases.choose_cases(runs[0])
    dataset = cases.open_data(runs, data_root, notes) if chosen else None
    class_names = runs[0].class_names
    surfaces = len(chosen) * (1 + len(runs)) * max(len(class_names), 1)
    budget = surface.vertex_budget(surfaces)
    shown, scenes = [], []
    for title, case_id in chosen:
        case = cases.load_case(title, case_id, runs, dataset, notes)
        if case is None:
            continue
        drawn: list[tuple[int | None, list[slices.Panel]]] = [
            (i, slices.planes(case, i, class_names)) for i in sorted(case.predictions)
        ]
        drawn = drawn or [(None, slices.planes(case, 0, class_names))]
        scores = _scores(runs, case_id)
        titles = [_title(run, values["dice"]) for run, values in zip(runs, scores, strict=True)]
        shown.append({"case": case, "scores": scores, "rows": drawn})
        why = f"{case_id}: no surfaces"
        scene = cases.attempt(notes, why, partial(surface.make_scene, case, titles, budget))
        if scene and any(panel.meshes for panel in scene.panels):
            scenes.append(scene)
    return {
        "shown": shown,
        "scenes": [(scene, surface.draw(scene)) for scene in scenes],
        "step_mm": sorted({f"{scene.step_mm:.1f}" for scene in scenes}),
        "surfaces": surface.pack(scenes, class_names),
        "colors": surface.COLORS,
    }


def _scores(runs: Sequence[Run], case_id: str) -> list[dict[str, float]]:
    """Per run: the metrics of one case, averaged over its classes."""
    lcc = runs[0].lcc
    return [
        {m.key: run.per_case(m.key, lcc=lcc).get(case_id, float("nan")) for m in results.COMPARED}
        for run in runs
    ]


def _title(run: Run, dice: float) -> str:
    """What stands above a prediction's surface."""
    return run.name if math.isnan(dice) else f"{run.name} · Dice {dice:.3f}"


def _asset(name: str) -> Markup:
    """A file of this package for the page, as it is: it is ours, and holds no closing tag."""
    return Markup(resources.files("vclipseg.report").joinpath(name).read_text(encoding="utf-8"))
