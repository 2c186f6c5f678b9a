"""Sections and rows: what is compared with what."""

from __future__ import annotations

import numpy as np
import pytest

from made_records import BASE, GAIN, add_run
from vclipseg.statistics import bootstrap_mean_over_seeds
from vclipseg.tables.facts import GridFacts, MethodFacts, read_facts, write_facts
from vclipseg.tables.groups import replicate_name
from vclipseg.tables.latex import latex
from vclipseg.tables.markdown import markdown
from vclipseg.tables.sections import read_sections


def rows_of(grid, section=0):
    return {row.group.name: row for row in read_sections(grid)[section].rows}


def test_a_row_has_means_intervals_and_the_paired_test(grid):
    rows = rows_of(grid)
    assert list(rows) == ["supervised (faithful)", "vclipseg (faithful, random)"]
    supervised, ours = rows.values()
    table = np.stack([BASE + GAIN, BASE + GAIN + 0.02]).round(6)
    assert ours.interval("dice") == bootstrap_mean_over_seeds(table)
    assert len(ours.group.records) == 2
    assert ours.to_baseline.difference == pytest.approx(GAIN.mean() + 0.01 - 0.005)
    assert ours.to_baseline.p_adjusted == pytest.approx(2 / 2**8)
    assert supervised.to_baseline is None
    assert (ours.failures, ours.scored, ours.seconds) == (0, 16, 12.5)


def test_all_are_compared_with_the_best(grid):
    add_run(grid, "mcnet", BASE + GAIN / 2, text="")
    rows = rows_of(grid)
    best = rows.pop("vclipseg (faithful, random)")
    assert best.is_best
    assert best.to_best is None
    p = [row.to_best.p_adjusted for row in rows.values()]
    assert p == pytest.approx([3 * 2 / 2**8] * 2)  # three pairs of methods: Holm trebles all
    assert all(row.to_best.difference < 0 and not row.is_best for row in rows.values())


def test_the_best_and_ranks_are_of_the_runs_that_all_have(grid):
    """A method is not best for having had the easier seeds."""
    for seed in (0, 1):
        add_run(grid, "mcnet", BASE + 0.03, seed=seed, text="")
    add_run(grid, "mcnet", BASE + 0.4, seed=7, text="")
    section = read_sections(grid)[0]
    rows = {row.group.name: row for row in section.rows}
    lucky = rows["mcnet (faithful)"]
    assert lucky.interval("dice").mean == max(row.interval("dice").mean for row in rows.values())
    assert not lucky.is_best
    assert rows["vclipseg (faithful, random)"].is_best
    assert lucky.to_best.difference < 0
    assert section.rankings()["all"].names[0] == "vclipseg (faithful, random)"
    assert section.rankings()["all"].runs == 2
    for text in (markdown([section], {}), latex([section], "made up")):
        assert section.uneven.removesuffix(".") in text
    assert "3 methods over 8 cases, 2 runs each (" in section.rankings()["all"].claim


def test_a_row_names_the_baseline_of_another_preset(grid):
    """Where the preset does not say what the difference is from."""
    add_run(grid, "supervised", BASE - 0.1, text="", preset="robust", weights="ema")
    add_run(grid, "cps", BASE, text="", preset="plus_robust", weights="ema")
    add_run(grid, "cps", BASE, text="", preset="code")
    sections = read_sections(grid)
    against = {row.group.name: row.against for row in sections[0].rows}
    assert against.pop("cps (code)") == "supervised (faithful)"
    assert not any(against.values())
    assert latex(sections, "made up").count("against supervised (faithful)") == 1


def test_without_a_shared_run_nobody_is_best(grid):
    add_run(grid, "mcnet", BASE + 0.4, seed=7, text="")
    section = read_sections(grid)[0]
    assert not any(row.is_best or row.to_best for row in section.rows)
    assert section.rankings() == {}


def test_runs_of_other_lengths_are_told_apart(grid):
    """In every section of the data set, so that curves over budgets follow one of them."""
    for labeled in (4, 8):
        add_run(grid, "cps", BASE, text="", labeled=labeled)
    add_run(grid, "cps", BASE + 0.1, text="", steps=15000)
    add_run(grid, "cps", BASE + 0.1, text="", weights="ema")
    of_4, of_8 = ([row.group.name for row in s.rows] for s in read_sections(grid))
    last = "cps (faithful, 6000 steps, last weights)"
    assert last in of_4
    assert of_8 == [last]
    assert len(set(of_4)) == len(of_4)
    assert "supervised (faithful)" in of_4


def test_only_runs_that_both_have_are_compared(grid):
    add_run(grid, "vclipseg", BASE - 0.3, seed=7)  # the baseline has no seed 7
    _, ours = rows_of(grid).values()
    assert len(ours.group.records) == 3
    assert ours.to_baseline.difference == pytest.approx(GAIN.mean() + 0.005)


def test_p_is_adjusted_within_a_section(grid):
    for labeled in (4, 8):
        add_run(grid, "mcnet", BASE + GAIN, text="", labeled=labeled)
    add_run(grid, "supervised", BASE, text="", labeled=8)
    of_4, of_8 = read_sections(grid)
    assert [row.to_baseline.p_adjusted for row in of_4.rows[1:]] == pytest.approx([2 / 2**7] * 2)
    assert of_8.rows[1].to_baseline.p_adjusted == pytest.approx(2 / 2**8)


def test_a_method_without_a_baseline_of_its_budget_is_not_compared(grid):
    add_run(grid, "mcnet", BASE + GAIN, text="", steps=15000)
    assert rows_of(grid)["mcnet (faithful)"].to_baseline is None


def test_the_baseline_of_the_same_preset_is_preferred(grid):
    add_run(grid, "supervised", BASE + 0.2, text="", preset="robust", seed=0)
    add_run(grid, "vclipseg", BASE + 0.2 + GAIN, preset="robust", seed=0)
    add_run(grid, "vclipseg", BASE + 0.2 + GAIN, preset="robust, equal weights", seed=0)
    names = {name: row.to_baseline.name_b for name, row in rows_of(grid).items() if row.to_baseline}
    assert names == {
        "vclipseg (faithful, random)": "supervised (faithful)",
        "vclipseg (robust, random)": "supervised (robust)",
        "vclipseg (robust, equal weights, random)": "supervised (robust)",
    }


def test_sections_keep_apart_what_may_not_be_compared(grid):
    add_run(grid, "vclipseg", BASE, labeled=8)
    add_run(grid, "vclipseg", BASE, filters=8)
    add_run(grid, "vclipseg", BASE, protocol="paper")
    add_run(grid, "vclipseg", BASE, dataset="pancreas")
    titles = [section.title for section in read_sections(grid)]
    kept = "filters, the mask as predicted"
    assert titles == [
        f"la, 4 labeled, 8 {kept}",
        f"la, 4 labeled, 16 {kept}",
        f"la, 8 labeled, 16 {kept}",
        f"pancreas, 4 labeled, 16 {kept}",
        f"la, 4 labeled, 16 {kept}, paper protocol",
    ]
    assert [section.is_main for section in read_sections(grid)] == [True] * 4 + [False]


def test_the_largest_component_stands_beside_the_mask(tmp_path):
    add_run(tmp_path, "supervised", BASE, lcc=(False, True))
    plain, largest = read_sections(tmp_path)
    assert "largest component" in largest.title
    (row,) = plain.rows
    assert row.components.interval("dice").mean == pytest.approx(BASE.mean() + 0.05)
    assert largest.rows[0].components is None


def test_draws_and_folds_are_runs_of_one_method(tmp_path):
    add_run(tmp_path, "supervised", BASE, draw=1, fold=1)
    add_run(tmp_path, "supervised", BASE, draw=2, fold=0)
    (row,) = read_sections(tmp_path)[0].rows
    names = [replicate_name(record) for record in row.group.records]
    assert names == ["0 draw 2 fold 0", "0 draw 1 fold 1"]


def test_folds_stand_apart_from_the_own_test_cases(tmp_path):
    """Test cases of a fold were train cases of the other runs."""
    for fold in (None, 0, 1):
        add_run(tmp_path, "supervised", BASE, fold=fold)
    own, folds = read_sections(tmp_path)
    assert (len(own.rows[0].group.records), len(folds.rows[0].group.records)) == (1, 2)
    assert "cross-validation" in folds.title
    assert own.size != folds.size


def test_facts_give_order_notes_and_published_figures(grid):
    add_run(grid, "mcnet", BASE, text="", preset="robust")
    facts = GridFacts(
        "la",
        published="la",
        methods=(
            MethodFacts("vclipseg", "faithful", notes=("train.lr = 0.01",)),
            MethodFacts("mcnet", "robust", published="MC-Net+"),
        ),
        failed=(("bcp (robust), seed 0", "no memory"),),
    )
    write_facts(grid, facts)
    assert read_facts(grid) == {"la": facts}
    rows = rows_of(grid)
    assert list(rows) == ["supervised (faithful)", "vclipseg (faithful, random)", "mcnet (robust)"]
    supervised, ours, mcnet = rows.values()
    assert ours.notes == ("train.lr = 0.01",)
    assert (supervised.figure.name, ours.figure.name) == ("V-Net", "VCLIPSeg")
    assert mcnet.figure.name == "MC-Net+"  # the grid says so
    assert ours.gap == pytest.approx((BASE + GAIN).mean() + 0.01 - 0.8851, abs=1e-6)


def test_nothing_is_known_without_grid_json(grid):
    assert read_facts(grid) == {}
    assert all(row.figure is None and row.gap is None for row in rows_of(grid).values())


def test_an_empty_record_has_no_sections(tmp_path):
    assert read_sections(tmp_path) == []
