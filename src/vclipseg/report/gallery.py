"""Several methods on one case, surface above slice, as figure 2 of the VCLIPSeg paper shows them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vclipseg.errors import DataError, UsageError
from vclipseg.report import cases, surface
from vclipseg.report.reading import Run, read_run
from vclipseg.report.slices import Cut, cuts
from vclipseg.tables.plots import GREY, style

COLUMNS = 5
"""Methods in a row, the reference beside them not counted."""
VERTICES = 30_000
PIXELS = 520
REFERENCE = "#ffffff"


def gallery(
    case_id: str, runs: Sequence[tuple[str, Path]], data_root: Path | None = None
) -> Figure:
    """Reference and predictions of a case as surfaces, and on the slice through the largest area.

    Args:
        case_id: a test case.
        runs: what to call each run, and its folder with `predictions/`.
        data_root: where the data set is, if not where the runs found it.

    Raises:
        UsageError: no run has a prediction of the case.
        DataError: the data set cannot be read.
    """
    read = [replace(read_run(folder), name=name) for name, folder in runs]
    found = [run for run in read if run.prediction(case_id).is_file()]
    if not found:
        raise UsageError(f"no run has a prediction of case {case_id}")
    notes: list[str] = []
    dataset = cases.open_data(found, data_root, notes)
    case = cases.load_case("", case_id, found, dataset, notes)
    if case is None or case.reference is None or case.image is None:
        raise DataError(f"case {case_id} cannot be shown: {'; '.join(notes)}")
    with style():
        return _drawn(case, found)


def median_case(run: Path) -> str:
    """The test case of a run whose Dice is the median one: shown, it flatters nobody.

    Raises:
        UsageError: the run is not scored.
    """
    chosen = dict(cases.choose_cases(read_run(run)))
    if not chosen or "not evaluated" in chosen:
        raise UsageError(f"{run}: not evaluated, so it has no median case")
    return chosen.get("median") or next(iter(chosen.values()))


def _drawn(case: cases.ShownCase, runs: Sequence[Run]) -> Figure:
    """A band for every `COLUMNS` methods; each begins with the reference."""
    scene = surface.make_scene(case, [run.name for run in runs], VERTICES)
    pictures = _cropped(surface.pictures(scene, PIXELS))
    cut = cuts(case)["axial"]
    methods = list(zip(pictures[1:], case.predictions.items(), strict=True))
    bands = [methods[i : i + COLUMNS] for i in range(0, len(methods), COLUMNS)]
    titles = [_wrapped(run.name) for run in runs]
    lines = max(title.count("\n") + 1 for title in titles)
    sheet = _Sheet(1 + max(map(len, bands)), len(bands), lines, pictures[0], cut)
    for row, band in enumerate(bands):
        above, below = sheet.axes(row, 0)
        _surface(above, pictures[0], "reference", "")
        _slice(below, case, cut, None)
        for column, (picture, (index, mask)) in enumerate(band, start=1):
            above, below = sheet.axes(row, column)
            score = runs[index].per_case("dice").get(case.case_id, math.nan)
            words = "" if math.isnan(score) else f"Dice {score:.3f}"
            _surface(above, picture, titles[index], words)
            _slice(below, case, cut, mask)
    sheet.caption(_caption(case, cut))
    return sheet.figure


class _Sheet:
    """A figure laid out in inches: columns of a title, a surface and a slice, in bands."""

    width, gap, line, words, foot = 1.9, 0.05, 0.16, 0.24, 0.4

    def __init__(
        self, columns: int, bands: int, lines: int, picture: Image.Image, cut: Cut
    ) -> None:
        self.title = 0.1 + self.line * lines
        self.surface = self.width * picture.height / picture.width
        self.slice = self.width * cut.size_mm[0] / cut.size_mm[1]
        self.band = self.title + self.surface + self.words + self.slice + 0.12
        self.size = columns * (self.width + self.gap) - self.gap, bands * self.band + self.foot
        self.figure = Figure(figsize=self.size)

    def axes(self, band: int, column: int) -> tuple[Axes, Axes]:
        """Of the surface and of the slice."""
        left = column * (self.width + self.gap)
        top = band * self.band + self.title
        return (
            self._add(left, top, self.surface),
            self._add(left, top + self.surface + self.words, self.slice),
        )

    def caption(self, text: str) -> None:
        """Below all."""
        lines = textwrap.fill(text, int(self.size[0] * 16))
        self.figure.text(
            0, 0.9 * self.foot / self.size[1], lines, va="top", fontsize=7.5, color=GREY
        )

    def _add(self, left: float, top: float, height: float) -> Axes:
        width, total = self.size
        box = (left / width, 1 - (top + height) / total, self.width / width, height / total)
        axes = self.figure.add_axes(box)
        axes.axis("off")
        return axes


def _cropped(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """All cut to what is drawn in any of them."""
    boxes = np.array([picture.getbbox() or (0, 0, *picture.size) for picture in pictures])
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return [picture.crop((int(left), int(top), int(right), int(bottom))) for picture in pictures]


def _wrapped(name: str) -> str:
    """A method and, on lines of its own, what tells it from its variants."""
    method, bracket, details = name.partition(" (")
    return "\n".join([method, *textwrap.wrap(bracket.strip() + details, 27)])


def _surface(axes: Axes, picture: Image.Image, name: str, words: str) -> None:
    """The surface, its name above and its Dice below."""
    axes.imshow(picture, aspect="auto", interpolation="antialiased")
    axes.set_title(name, fontsize=8.5, pad=4)
    axes.text(0.5, -0.03, words, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)


def _slice(ax: Axes, case: cases.ShownCase, cut: Cut, mask: np.ndarray | None) -> None:
    """The image, the prediction as a coloured area, and the outline of the reference."""
    assert case.image is not None
    assert case.reference is not None
    low, high = np.percentile(case.image[cut.box], (0.5, 99.5))
    picture = cut(case.image)
    ax.imshow(picture, "gray", aspect="auto", interpolation="bilinear", vmin=low, vmax=high)
    if mask is not None:
        for index, area in _classes(cut(mask)):
            color = surface.COLORS[(index - 1) % len(surface.COLORS)]
            ax.contourf(area, levels=(0.5, 1.5), colors=[color], alpha=0.5)
            ax.contour(area, levels=(0.5,), colors=[color], linewidths=1.3)
    for _, area in _classes(cut(case.reference)):
        ax.contour(area, levels=(0.5,), colors="#000000", linewidths=1.9)
        ax.contour(area, levels=(0.5,), colors=REFERENCE, linewidths=1.0)


def _classes(picture: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(int(k), (picture == k).astype(float)) for k in np.unique(picture) if k > 0]


def _caption(case: cases.ShownCase, cut: Cut) -> str:
    width = cut.size_mm[1]
    return (
        f"case {case.case_id}; surfaces to one scale; axial slice {cut.index}, {width:.0f} mm wide; "
        "white: outline of the reference; colour: prediction, as predicted"
    )
