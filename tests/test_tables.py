from __future__ import annotations

import numpy as np
import pytest

from made_records import make_record, make_scores
from vclipseg import records
from vclipseg.statistics import bootstrap_mean_over_seeds
from vclipseg.tables import HEADING, write_table


def add(grid, method, dice, *, seed=0, failures=0, protocol="strict", **facts):
    scores = make_scores(dice, failures)
    name = f"{method}-{seed}-{protocol}-" + "-".join(map(str, facts.values()))
    row = make_record(
        scores, protocol=protocol, settings_hash=name, method=method, seed=seed, **facts
    )
    records.record(grid, [row], scores)


def rows_of(text):
    """Table rows by method, as dicts of heading -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(HEADING, row, strict=True)) for row in cells if row[0] != "Method"]


BASE = np.linspace(0.5, 0.8, 8)
GAIN = np.linspace(0.05, 0.09, 8)


@pytest.fixture
def grid(tmp_path):
    add(tmp_path, "vclipseg", BASE + GAIN, seed=1)
    add(tmp_path, "vclipseg", BASE + GAIN + 0.02, seed=0)
    add(tmp_path, "supervised", BASE, seed=0, text="")
    add(tmp_path, "supervised", BASE + 0.01, seed=1, text="")
    return tmp_path


def test_a_row_has_means_intervals_and_the_paired_test(grid):
    supervised, ours = rows_of(write_table(grid).read_text())
    assert (supervised["Method"], ours["Method"]) == ("supervised", "vclipseg")
    table = np.stack([BASE + GAIN, BASE + GAIN + 0.02]).round(6)
    interval = bootstrap_mean_over_seeds(table)
    shown = f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"
    assert ours["Dice (95% interval)"] == shown
    assert ours["Runs"] == "2"
    difference = GAIN.mean() + 0.01 - 0.005
    assert ours["Dice minus supervised (95% interval)"].startswith(f"{difference:+.4f} (")
    assert ours["p (Holm)"] == f"{2 / 2**8:.4f}"
    assert supervised["p (Holm)"] == ""
    assert ours["Dice by seed"] == "0: 0.7400, 1: 0.7200"
    assert ours["Failures"] == "0 of 16"
    assert ours["Minutes"] == "0.2"


def test_the_claim_is_written_out(grid):
    text = write_table(grid, "Left atrium").read_text()
    assert text.startswith("# Left atrium\n")
    assert "## la, 4 labeled, 16 filters, the mask as predicted\n" in text
    assert "- vclipseg (faithful, random) has a higher Dice than supervised (faithful), by" in text


def test_only_runs_that_both_have_are_compared(grid):
    add(grid, "vclipseg", BASE - 0.3, seed=7)  # the baseline has no seed 7
    _, ours = rows_of(write_table(grid).read_text())
    assert ours["Runs"] == "3"
    assert ours["Dice minus supervised (95% interval)"].startswith(f"{GAIN.mean() + 0.005:+.4f} (")


def test_p_is_adjusted_within_a_section(grid):
    add(grid, "mcnet", BASE + GAIN, text="")
    add(grid, "mcnet", BASE + GAIN, text="", labeled=8)
    add(grid, "supervised", BASE, text="", labeled=8)
    rows = rows_of(write_table(grid).read_text())
    of_4 = [row["p (Holm)"] for row in rows if row["Method"] in ("mcnet", "vclipseg")]
    assert of_4 == ["0.0156", "0.0156", "0.0078"]


def test_a_method_without_a_baseline_of_its_budget_is_not_compared(grid):
    add(grid, "mcnet", BASE + GAIN, text="", steps=15000)
    row = next(r for r in rows_of(write_table(grid).read_text()) if r["Method"] == "mcnet")
    assert row["p (Holm)"] == row["Dice minus supervised (95% interval)"] == ""


def test_the_baseline_of_the_same_preset_is_preferred(grid):
    add(grid, "supervised", BASE + 0.2, text="", preset="robust", seed=0)
    add(grid, "vclipseg", BASE + 0.2 + GAIN, preset="robust", seed=0)
    text = write_table(grid).read_text()
    assert "- vclipseg (robust, random) has a higher Dice than supervised (robust)" in text
    assert "- vclipseg (faithful, random) has a higher Dice than supervised (faithful)" in text


def test_failures_are_counted_and_few_cases_say_so(tmp_path):
    add(tmp_path, "supervised", BASE[:4], text="", failures=4)
    add(tmp_path, "vclipseg", BASE[:4], failures=1)
    text = write_table(tmp_path).read_text()
    supervised, ours = rows_of(text)
    assert supervised["Failures"] == "4 of 4"
    assert supervised["HD95 (mm)"] == ""
    assert ours["Failures"] == "1 of 4"
    assert "No claim that" in text


def test_the_papers_protocol_is_a_section_of_its_own_and_marked(grid):
    add(grid, "vclipseg", BASE + 0.1, protocol="paper")
    text = write_table(grid).read_text()
    strict, paper = text.split("## ")[1:]
    assert "paper protocol" in paper.splitlines()[0]
    assert "**Chosen on the test set" in paper
    assert "Chosen on the test set" not in strict


def test_draws_and_folds_are_runs_of_one_method(tmp_path):
    add(tmp_path, "supervised", BASE, text="", draw=1)
    add(tmp_path, "supervised", BASE, text="", draw=2, fold=0)
    (row,) = rows_of(write_table(tmp_path).read_text())
    assert row["Dice by seed"] == "0 draw 1: 0.6500, 0 draw 2 fold 0: 0.6500"


def test_an_empty_grid_is_an_empty_table(tmp_path):
    assert "| Method" not in write_table(tmp_path).read_text()
