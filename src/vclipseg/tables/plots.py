"""Figures of a record, by matplotlib: the critical-difference diagram and the label-budget curve.

Each is written as PNG and SVG. Made again from the same record, the files are the same byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vclipseg.files import replacing
from vclipseg.tables.budgets import Curve, Saved
from vclipseg.tables.ranking import Ranking, spell_runs
from vclipseg.tables.sections import Section, read_sections
from vclipseg.tables.summaries import budget_curves, saved_labels

COLORS = ("#c8553d", "#2f6fa8", "#4d8f4d", "#8a5aa8", "#b08a1e", "#2f918a", "#c05a7a", "#6b6b6b")
GREY, INK = "#777777", "#222222"
MARKERS = "osD^vP*X"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "vclipseg",
}


def write_figures(grid: Path) -> list[Path]:
    """Write every figure that a record has enough in: `critical-difference-*` and `label-budget-*`.

    Raises:
        DataError: the record is damaged.
    """
    sections = [section for section in read_sections(grid) if section.is_main]
    files: list[Path] = []
    for section in sections:
        for which, ranking in section.rankings().items():
            name = f"critical-difference-{section.first.dataset}-{section.first.labeled}"
            name += "" if which == "all" else f"-{which}"
            diagram = critical_difference_diagram(ranking, _heading(section, which))
            files += save(diagram, grid / _slug(name))
    for title, curves in budget_curves(sections).items():
        saved = saved_labels([s for s in sections if s.size == title])
        files += save(label_budget(curves, saved, title), grid / _slug(f"label-budget-{title}"))
    return files


def style() -> AbstractContextManager:
    """The look of every figure; within it they are drawn and saved."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]  # names of settings


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `STEM.png` and `STEM.svg`, without a date."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    for file, metadata in zip(files, ({"Software": None}, {"Date": None}), strict=True):
        with replacing(file) as unfinished, style():
            figure.savefig(unfinished, dpi=160, bbox_inches="tight", metadata=metadata)
    return files


def critical_difference_diagram(ranking: Ranking, title: str) -> Figure:
    """Methods on an axis of mean ranks, the best on the left; bars join those not to be told apart.

    The better half is named on the left, the other on the right, as Demsar draws it.
    """
    with style():
        k = len(ranking.names)
        half = (k + 1) // 2
        cliques = ranking.cliques
        bars = 0.28 * len(cliques)
        top, step = 0.55 + bars, 0.42
        height = top + step * half
        figure = Figure(figsize=(8.6, 0.9 + 0.38 * height / step * 0.62))
        axes = figure.add_axes((0.31, 0.02, 0.38, 0.96))
        low, high = 1.0, max(float(np.ceil(ranking.ranks[-1])), 2.0)
        axes.set_xlim(low, high)
        axes.set_ylim(height, -1.35)
        axes.axis("off")
        _rank_axis(axes, low, high)
        _ruler(axes, ranking, low)
        for i, (first, last) in enumerate(cliques):
            ends = ranking.ranks[first] - 0.03, ranking.ranks[last] + 0.03
            y = 0.3 + 0.28 * i
            axes.plot(ends, (y, y), color=INK, lw=3.2, solid_capstyle="round", clip_on=False)
        for i, (name, rank) in enumerate(zip(ranking.names, ranking.ranks, strict=True)):
            left = i < half
            y = top + step * (i if left else k - 1 - i)
            edge = low - 0.04 * (high - low) if left else high + 0.04 * (high - low)
            axes.plot((rank, rank, edge), (0, y, y), color=GREY, lw=0.9, clip_on=False)
            side: dict[str, Any] = {"ha": "right" if left else "left", "va": "center"}
            words = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
            axes.text(edge + (-0.015 if left else 0.015) * (high - low), y, words, **side)
        figure.suptitle(title, x=0.5, y=1.0, va="bottom", fontsize=10)
    return figure


def _rank_axis(axes: Axes, low: float, high: float) -> None:
    axes.plot((low, high), (0, 0), color=INK, lw=1.2, clip_on=False)
    every = max(1, round((high - low) / 8))
    for rank in np.arange(low, high + 0.01, 0.5):
        whole = float(rank).is_integer() and (rank - low) % every == 0
        axes.plot((rank, rank), (-0.14 if whole else -0.07, 0), color=INK, lw=1, clip_on=False)
        if whole:
            axes.text(rank, -0.22, f"{rank:.0f}", ha="center", va="bottom")


def _ruler(axes: Axes, ranking: Ranking, low: float) -> None:
    """How long the critical difference is."""
    y, end = -0.82, low + ranking.critical_difference
    axes.plot((low, end), (y, y), color=INK, lw=1.4, clip_on=False)
    for x in (low, end):
        axes.plot((x, x), (y - 0.09, y + 0.09), color=INK, lw=1.4, clip_on=False)
    of = f"n = {ranking.n} cases, {spell_runs(ranking.runs)} each"
    words = f"critical difference {ranking.critical_difference:.2f}, {of}"
    axes.text(low, y - 0.14, words, ha="left", va="bottom", fontsize=8, color=GREY)


def label_budget(curves: Sequence[Curve], saved: Sequence[Saved], title: str) -> Figure:
    """Mean Dice against the number of labeled cases, with 95% intervals over cases.

    An arrow shows the largest number of labels that a method saves within what was measured.
    """
    with style():
        figure = Figure(figsize=(6.6, 4.1))
        axes = figure.add_subplot()
        ordered = sorted(curves, key=lambda curve: not curve.baseline)
        others = 0
        for curve in ordered:
            color = GREY if curve.baseline else COLORS[others % len(COLORS)]
            marker = MARKERS[0 if curve.baseline else 1 + others % (len(MARKERS) - 1)]
            others += not curve.baseline
            _curve(axes, curve, color, marker)
        budgets = sorted({n for curve in curves for n in curve.labeled})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(n) for n in budgets])
        axes.xaxis.minorticks_off()
        axes.set_xlabel("labeled cases")
        axes.set_ylabel("Dice")
        axes.grid(axis="y", color="#e4e4e4", lw=0.8)
        axes.set_axisbelow(True)
        axes.set_title(f"Dice against labeled cases: {title}", fontsize=10, loc="left")
        _arrow(axes, saved)
        axes.legend(frameon=False, loc="lower right")
        figure.text(0.99, 0.0, "bands: 95% intervals over test cases", ha="right", va="top",
                    fontsize=7.5, color=GREY)  # fmt: skip
    return figure


def _curve(axes: Axes, curve: Curve, color: str, marker: str) -> None:
    x = np.array(curve.labeled, dtype=float)
    means = np.array([np.nan if d.mean is None else d.mean for d in curve.dice])
    low = np.array([m if d.low is None else d.low for d, m in zip(curve.dice, means, strict=True)])
    high = np.array(
        [m if d.high is None else d.high for d, m in zip(curve.dice, means, strict=True)]
    )
    axes.fill_between(x, low, high, color=color, alpha=0.14, lw=0)
    dash = "--" if curve.baseline else "-"
    axes.plot(x, means, color=color, marker=marker, ms=5, lw=1.8, ls=dash, label=curve.name)


def _arrow(axes: Axes, saved: Sequence[Saved]) -> None:
    """From the method that saves the largest share to where the baseline gets as far."""
    finite = [entry for entry in saved if np.isfinite(entry.needed) and entry.saved > 0.5]
    if not finite:
        return
    entry = max(finite, key=lambda entry: entry.needed / entry.labeled)
    ends = (entry.labeled, entry.dice), (entry.needed, entry.dice)
    arrow = {"arrowstyle": "->", "color": INK, "lw": 1.1, "shrinkA": 5, "shrinkB": 2}
    axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow, zorder=5)
    words = f"{entry.labeled} labels instead of {entry.needed:.0f}"
    axes.annotate(words, ends[1], (9, -5), textcoords="offset points", va="top", fontsize=8)


def _heading(section: Section, which: str) -> str:
    run = section.first
    some = "" if which == "all" else ", common settings"
    return f"{run.dataset}, {run.labeled} labeled{some}: mean rank by Dice, best on the left"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
