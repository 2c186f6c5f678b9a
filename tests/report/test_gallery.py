"""Several methods on one case: surfaces and slices side by side."""

from __future__ import annotations

import csv

import pytest
from matplotlib.image import AxesImage

from vclipseg.errors import DataError, UsageError
from vclipseg.report.gallery import COLUMNS, gallery, median_case
from vclipseg.tables.plots import save


def test_a_column_for_the_reference_and_each_method(two_runs, tmp_path):
    ours, baseline = two_runs
    case = median_case(ours)
    figure = gallery(case, [("ours (robust, some words on it)", ours), ("baseline", baseline)])
    assert len(figure.axes) == 2 * 3
    titles = [axes.get_title() for axes in figure.axes[::2]]
    assert titles == ["reference", "ours\n(robust, some words on it)", "baseline"]
    for axes in figure.axes:
        assert [artist for artist in axes.get_children() if isinstance(artist, AxesImage)]
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sum(word.startswith("Dice 0.") for word in words) == 2
    files = save(figure, tmp_path / "figure")
    assert all(file.stat().st_size > 1000 for file in files)


def test_many_methods_are_shown_in_bands(two_runs):
    ours, _ = two_runs
    many = [(f"method {n}", ours) for n in range(COLUMNS + 1)]
    figure = gallery(median_case(ours), many)
    assert len(figure.axes) == 2 * (COLUMNS + 1) + 2 * 2  # each band begins with the reference


def test_the_median_case_is_the_one_in_the_middle(two_runs):
    with (two_runs[0] / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["lcc"] == "0"]
    dice: dict[str, list[float]] = {}
    for row in rows:
        dice.setdefault(row["case_id"], []).append(float(row["dice"]))
    ranked = sorted(dice, key=lambda case: (-sum(dice[case]) / len(dice[case]), case))
    assert median_case(two_runs[0]) == (ranked[len(ranked) // 2] if len(ranked) > 2 else ranked[0])


def test_a_case_that_nobody_predicted(two_runs):
    with pytest.raises(UsageError, match="no run has a prediction of case nobody"):
        gallery("nobody", [("ours", two_runs[0])])


def test_data_that_are_gone_are_told(two_runs, tmp_path):
    with pytest.raises(DataError, match="cannot be shown"):
        gallery(median_case(two_runs[0]), [("ours", two_runs[0])], tmp_path / "gone")
