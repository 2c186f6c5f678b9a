"""Figures are written where there is enough to show, and the same bytes each time."""

from __future__ import annotations

import pytest
from PIL import Image

from made_records import BASE, GAIN, add_run
from vclipseg.tables.facts import GridFacts, MethodFacts, read_facts, write_facts
from vclipseg.tables.markdown import markdown
from vclipseg.tables.plots import critical_difference_diagram, write_figures
from vclipseg.tables.ranking import Ranking
from vclipseg.tables.sections import read_sections


@pytest.fixture
def full(grid):
    add_run(grid, "mcnet", BASE + GAIN / 2, text="")
    add_run(grid, "supervised", BASE + 0.1, text="", labeled=16)
    add_run(grid, "vclipseg", BASE + 0.15, labeled=16)
    return grid


def test_both_figures_are_made_as_png_and_svg(full):
    files = write_figures(full)
    assert [file.name for file in files] == [
        "critical-difference-la-4.png",
        "critical-difference-la-4.svg",
        "label-budget-la-16-filters.png",
        "label-budget-la-16-filters.svg",
    ]
    with Image.open(files[0]) as picture:
        assert min(picture.size) > 200
    ranks, curves = files[1].read_text(encoding="utf-8"), files[3].read_text(encoding="utf-8")
    assert "critical difference" in ranks
    assert all(name in ranks for name in ("supervised (faithful)", "mcnet (faithful)"))
    assert "labeled cases" in curves
    assert "mcnet" not in curves  # one budget only is no curve


def test_methods_with_the_common_settings_have_a_diagram_of_their_own(full):
    notes = ("train.lr = 1",)
    add_run(full, "cps", BASE + GAIN, text="", preset="faithful")
    write_facts(full, GridFacts("la", methods=(MethodFacts("cps", "faithful", notes=notes),)))
    both = [
        file for file in write_figures(full) if "critical" in file.name and file.suffix == ".svg"
    ]
    assert [file.stem for file in both] == [
        "critical-difference-la-4",
        "critical-difference-la-4-common",
    ]
    assert ["cps" in file.read_text(encoding="utf-8") for file in both] == [True, False]
    assert "- Common settings only. Mean ranks of 3 methods" in markdown(
        read_sections(full), read_facts(full)
    )


def test_made_again_they_are_the_same_bytes(full):
    before = [file.read_bytes() for file in write_figures(full)]
    assert [file.read_bytes() for file in write_figures(full)] == before


def test_two_methods_and_one_budget_are_not_enough(grid):
    assert write_figures(grid) == []


def test_bars_join_what_cannot_be_told_apart():
    ranking = Ranking(("a", "b", "c"), (1.0, 1.5, 3.0), 1.0, 0.01, 20)
    (axes,) = critical_difference_diagram(ranking, "ranks").axes
    bars = [line for line in axes.lines if line.get_linewidth() > 3]
    assert len(bars) == 1
    assert bars[0].get_xdata() == pytest.approx([0.97, 1.53])
    words = [text.get_text() for text in axes.texts]
    assert "a  1.00" in words
    assert "3.00  c" in words
