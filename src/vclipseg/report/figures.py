"""Charts as inline SVG; colours are CSS classes, so that light and dark have their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from vclipseg.report.reading import Log, Run

Logged = tuple[int, Run, Log]  # run index, run, its log

MAX_POINTS = 200
WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 30  # room for the tick labels around the plot
STYLES = ("solid", "dashed", "short dashes", "dash and dot", "dots")  # dash0 to dash4 in style.css
ROW = 46  # height of one run in a strip plot


@dataclass(frozen=True, eq=False)
class Line:
    """One curve: `run` gives the colour, `dash` the line style."""

    label: str
    x: np.ndarray  # (N,)
    y: np.ndarray  # (N,)
    run: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Strip:
    """The cases of one run on one metric, their mean and its interval."""

    run: int
    name: str
    values: dict[str, float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """One chart of the training: what it shows, what its line styles mean, and the picture."""

    title: str
    note: str
    svg: Markup


def charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart of everything the logs hold; runs are overlaid where they share a column."""
    logs = [(index, run, run.log) for index, run in enumerate(runs) if run.log]
    groups: dict[str, list[Line]] = {"total loss": _lines(logs, "total")}
    notes: dict[str, str] = {}
    for term in dict.fromkeys(term for _, _, log in logs for term in log.terms):
        groups[term] = [*_lines(logs, term), *_weighted(logs, term)]
        notes[term] = "solid: value, dashed: weight × value"
    groups["learning rate"] = _lines(logs, "lr")
    for index, run, log in logs:
        for column in log.extras:
            title, class_name, dash = _split_class(column, run.class_names)
            lines = _lines([(index, run, log)], column, class_name, dash)
            groups.setdefault(title, []).extend(lines)
            if class_name:
                told = f"{STYLES[dash % 5]}: {class_name}"
                notes[title] = ", ".join(dict.fromkeys([*notes.get(title, "").split(", "), told]))
    drawn = {
        title: [line for line in lines if _drawable(line.y)] for title, lines in groups.items()
    }
    return [
        Chart(title, notes.get(title, "").removeprefix(", "), line_chart(title, lines))
        for title, lines in drawn.items()
        if lines
    ]


def line_chart(title: str, lines: Sequence[Line]) -> Markup:
    """Curves over steps; a long one is drawn as means over equal pieces, spread shaded behind."""
    pieces = [(line, _pieces(line.x, line.y)) for line in lines]
    x_axis = _Axis([x for _, (x, _, _, _) in pieces], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([mean for _, (_, mean, _, _) in pieces], HEIGHT - BOTTOM, TOP, pad=0.06)
    parts = [_grid(x_axis, y_axis)]
    for line, (x, _, low, high) in pieces:
        if line.dash == 0:
            band = [*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))]
            inside = [(x_axis(a), y_axis(y_axis.clip(b))) for a, b in band if math.isfinite(b)]
            parts.append(_polygon(inside, f"band run{line.run % 8}"))
    for line, (x, mean, _, _) in pieces:
        style = f"line run{line.run % 8} dash{line.dash % 5}"
        points = [(x_axis(a), y_axis(b)) for a, b in zip(x, mean, strict=True)]
        told = f"{line.label}: {mean[_last(mean)]:.4g} at the end"
        shape = Markup('<path class="{}" d="{}"><title>{}</title></path>')
        parts.append(shape.format(style, _path(points), told))
        if len(points) == 1:  # a line of one point cannot be seen
            dot = Markup('<circle class="point run{}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
            parts.append(dot.format(line.run % 8, *points[0]))
    ends = "; ".join(f"{line.label} ends at {y[_last(y)]:.4g}" for line, (_, y, _, _) in pieces)
    return _svg(parts, f"{title}: {ends}", WIDTH, HEIGHT)


def strip_plot(strips: Sequence[Strip], metric: str) -> Markup:
    """One dot a case and one row a run; the same case is joined from row to row."""
    height = ROW * len(strips) + BOTTOM + TOP
    low = min((v for strip in strips for v in strip.values.values() if math.isfinite(v)), default=0)
    left, right = 16, 2 * WIDTH - 16
    axis = _Axis([np.array([min(0.9, math.floor(low * 10) / 10), 1.0])], left, right)
    middle = [TOP + ROW * (index + 0.62) for index in range(len(strips))]
    parts = [_vertical_grid(axis, TOP, height - BOTTOM)]
    for upper, lower in zip(range(len(strips)), range(1, len(strips)), strict=False):
        for case_id in strips[upper].values.keys() & strips[lower].values.keys():
            ends = [(axis(strips[row].values[case_id]), middle[row]) for row in (upper, lower)]
            path = Markup('<path class="pair" data-case="{}" d="{}"/>')
            parts.append(path.format(case_id, _path(ends)))
    for strip, y in zip(strips, middle, strict=True):
        parts.append(_strip(strip, axis, y, metric))
    label = "; ".join(f"{strip.name}: mean {strip.mean:.3f}" for strip in strips)
    return _svg(parts, f"{metric} of every case. {label}", 2 * WIDTH, height)


class _Axis:
    """Values to picture units, with round ticks."""

    def __init__(
        self, values: Sequence[np.ndarray], start: float, end: float, pad: float = 0.0
    ) -> None:
        finite = np.concatenate([np.asarray(v, float)[np.isfinite(v)] for v in values])
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        room = (high - low) * pad
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, about: int = 5) -> list[float]:
        rough = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def _strip(strip: Strip, axis: _Axis, y: float, metric: str) -> Markup:
    style = f"run{strip.run % 8}"
    parts = [
        Markup('<text class="row-name" x="16" y="{:.1f}">{}</text>').format(y - 14, strip.name)
    ]
    if math.isfinite(strip.low) and math.isfinite(strip.high):
        ends = (axis(axis.clip(strip.low)), axis(axis.clip(strip.high)))
        interval = Markup('<path class="interval {}" d="M{:.1f} {:.1f}H{:.1f}"/>')
        parts.append(interval.format(style, ends[0], y + 9, ends[1]))
    if math.isfinite(strip.mean):
        mean = Markup('<path class="mean {}" d="M{:.1f} {:.1f}v10"/>')
        parts.append(mean.format(style, axis(strip.mean), y + 4))
    dot = Markup(
        '<circle class="dot {}" data-case="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>'
    )
    for case_id, value in strip.values.items():
        if math.isfinite(value):
            told = f"{case_id}: {metric} {value:.3f} ({strip.name})"
            parts.append(dot.format(style, case_id, axis(value), y, told))
    return Markup("").join(parts)


def _lines(logs: Sequence[Logged], column: str, class_name: str = "", dash: int = 0) -> list[Line]:
    return [
        Line(f"{run.name} {class_name}".strip(), log.steps, log.columns[column], index, dash)
        for index, run, log in logs
        if column in log.columns
    ]


def _weighted(logs: Sequence[Logged], term: str) -> list[Line]:
    lines = []
    for index, run, log in logs:
        if term in log.terms:
            values = log.columns[term] * log.columns[f"{term}_weight"]
            lines.append(Line(f"{run.name}, weighted", log.steps, values, index, 1))
    return lines


def _split_class(column: str, class_names: Sequence[str]) -> tuple[str, str, int]:
    """`prototype_left_atrium` -> ("prototype by class", "left atrium", 1)."""
    for index, class_name in enumerate(("background", *class_names)):
        ending = "_" + class_name.replace(" ", "_")
        if column.replace(" ", "_").endswith(ending) and len(column) > len(ending):
            return f"{column[: -len(ending)]} by class", class_name, index
    return column, "", 0


def _pieces(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions, means, lowest and highest values (at most MAX_POINTS each) of the finite points."""
    keep = np.isfinite(y) & np.isfinite(x)
    x, y = x[keep], y[keep]
    cuts = np.unique(np.linspace(0, len(x), min(len(x), MAX_POINTS) + 1).astype(int))[:-1]
    sizes = np.diff([*cuts, len(x)])
    means = [np.add.reduceat(values, cuts) / sizes for values in (x, y)]
    return *means, np.minimum.reduceat(y, cuts), np.maximum.reduceat(y, cuts)


def _drawable(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _last(values: np.ndarray) -> int:
    """The last finite value."""
    return int(np.flatnonzero(np.isfinite(values))[-1])


def _grid(x_axis: _Axis, y_axis: _Axis) -> Markup:
    tick = Markup(
        '<path class="grid" d="M{0} {1:.1f}H{2}"/><text class="y" x="{3}" y="{4:.1f}">{5}</text>'
    )
    rows = [
        tick.format(LEFT, y_axis(v), WIDTH - RIGHT, LEFT - 6, y_axis(v) + 3.5, _tick(v))
        for v in y_axis.ticks()
    ]
    return Markup("").join([*rows, _vertical_grid(x_axis, TOP, HEIGHT - BOTTOM)])


def _vertical_grid(axis: _Axis, top: float, bottom: float) -> Markup:
    tick = Markup(
        '<path class="grid" d="M{0:.1f} {1}V{2}"/><text class="x" x="{0:.1f}" y="{3}">{4}</text>'
    )
    return Markup("").join(
        tick.format(axis(v), top, bottom, bottom + 16, _tick(v)) for v in axis.ticks()
    )


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    shown = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in shown) if shown else ""


def _polygon(points: Sequence[tuple[float, float]], style: str) -> Markup:
    return (
        Markup('<path class="{}" d="{}Z"/>').format(style, _path(points)) if points else Markup("")
    )


def _svg(parts: Sequence[Markup], label: str, width: int, height: int) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, height, label
    )
    return head + Markup("").join(parts) + Markup("</svg>")
