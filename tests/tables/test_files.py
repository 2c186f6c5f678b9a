"""table.md, table.csv and table.tex."""

from __future__ import annotations

import csv
import re

import pytest

from made_records import BASE, GAIN, add_run
from vclipseg.tables.facts import GridFacts, MethodFacts, read_facts, write_facts
from vclipseg.tables.files import CSV_COLUMNS, write_tables


def written(grid):
    """The three files as text."""
    write_tables(grid)
    return [
        (grid / name).read_text(encoding="utf-8") for name in ("table.md", "table.csv", "table.tex")
    ]


def tables_of(text):
    """Every table of a page: its rows as dicts of heading -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def test_markdown_has_means_with_intervals_and_tests(grid):
    text, _, _ = written(grid)
    (supervised, ours) = tables_of(text)[0]
    assert ours["Method"] == "vclipseg (faithful, random)"
    assert re.fullmatch(r"\*\*0\.7300 \(0\.\d{4} to 0\.\d{4}\)\*\*", ours["Dice"])
    assert ours["Dice minus supervised"].startswith("+0.0750 (+0.0")
    assert (ours["p (Holm)"], supervised["p (Holm)"]) == ("0.0078", "")
    assert (ours["p (Holm), best"], supervised["p (Holm), best"]) == ("", "0.0078")
    assert ours["Dice by run"] == "0: 0.7400, 1: 0.7200"
    assert (ours["Failures"], ours["Seconds"]) == ("0 of 16", "12")
    assert "- vclipseg (faithful, random) has a higher Dice than supervised (faithful), by" in text


def test_of_many_runs_the_spread_is_shown(tmp_path):
    for seed in range(6):
        add_run(tmp_path, "supervised", BASE + 0.01 * seed, seed=seed)
    ((row,),) = tables_of(written(tmp_path)[0])
    assert row["Dice by run"] == "sd 0.0187, 0.6500 to 0.7000"


def test_footnotes_say_what_differs_and_where_figures_are_from(grid):
    notes = ("train.lr = 0.01",)
    methods = tuple(
        MethodFacts(name, "faithful", notes=notes) for name in ("supervised", "vclipseg")
    )
    write_facts(
        grid, GridFacts("la", title="Mine", published="la", methods=methods, common="All alike.")
    )
    text, _, _ = written(grid)
    assert text.startswith("# Mine\n")
    assert "\nAll alike.\n" in text
    supervised, ours = tables_of(text)[0]
    assert supervised["Method"].endswith("<sup>1</sup>")
    assert ours["Method"].endswith("<sup>1</sup>")
    heading = "Published, full size: Dice / Jaccard / 95HD / ASD"
    assert ours[heading] == "0.8851 / 0.7949 / 10.48 / 2.28 <sup>3</sup>"
    assert ours["Gap to full size"] == "-0.1551"
    assert "<sup>1</sup> train.lr = 0.01  \n" in text
    assert (
        "<sup>3</sup> published: VCLIPSeg paper, Tables 1 and 3; checkpoint: best on test" in text
    )


def test_at_full_size_the_gap_is_one_of_reproduction(grid):
    write_facts(grid, GridFacts("la", published="la", full_size=True))
    text, _, tex = written(grid)
    assert tables_of(text)[0][0]["Gap"] == "+0.1537"
    assert "full size" not in text
    assert "full size" not in tex


def test_failed_cells_are_told(grid):
    write_facts(grid, GridFacts("la", failed=(("bcp (robust), seed 0", "no memory"),)))
    assert "- bcp (robust), seed 0: no memory\n" in written(grid)[0]


def test_a_grid_that_is_not_complete_says_so(grid):
    write_facts(grid, GridFacts("la", cells=9, missing=5))
    assert "**Not complete yet: 4 of the grid's 9 runs.**\n" in written(grid)[0]
    write_facts(grid, GridFacts("la", cells=4))
    assert "Not complete" not in written(grid)[0]


def test_what_is_to_be_said_of_the_data_stands_below_every_table(grid):
    assert "Of the data" not in written(grid)[0]
    remark = "Cut around the labels, 100%."
    write_facts(grid, GridFacts("la", remarks=(remark,)))
    assert read_facts(grid)["la"].remarks == (remark,)
    text, _, tex = written(grid)
    assert text.count(f"- Of the data: {remark}\n") == len(tables_of(text)) > 0
    assert r"\par\footnotesize Cut around the labels, 100\%." in tex


def test_grids_on_several_data_sets_may_share_a_record(grid):
    add_run(grid, "supervised", BASE, text="", dataset="pancreas")
    write_facts(grid, GridFacts("la", title="Atria", common="Of atria.", cells=100))
    write_facts(grid, GridFacts("pancreas", title="Pancreas", common="Of pancreas."))
    write_facts(
        grid, GridFacts("la", title="Atria", common="Of left atria.", cells=100, missing=96)
    )
    text, _, _ = written(grid)
    assert text.startswith("# Atria; Pancreas\n")
    assert "\nla: Of left atria.\n\nla: **Not complete yet: 4 of the grid's 100 runs.**\n" in text
    assert "\npancreas: Of pancreas.\n\n## la, 4" in text


def test_failures_are_counted_and_few_cases_say_so(tmp_path):
    add_run(tmp_path, "supervised", BASE[:4], text="", failures=4)
    add_run(tmp_path, "vclipseg", BASE[:4], failures=1)
    text, _, tex = written(tmp_path)
    supervised, ours = tables_of(text)[0]
    assert (supervised["Failures"], ours["Failures"]) == ("4 of 4", "1 of 4")
    assert supervised["95HD (voxels)"] == ""
    assert "No claim that" in text
    assert " & -- & " in tex


def test_the_papers_protocol_is_marked_and_its_flattery_measured(grid):
    for seed in (0, 1):  # the same runs, chosen on the test set
        add_run(grid, "vclipseg", BASE + GAIN + 0.05, seed=seed, protocol="paper", failures=1)
    text, table, tex = written(grid)
    strict, paper, flattery = text.split("\n## ")[1:]
    assert "paper protocol" in paper.splitlines()[0]
    assert "**Chosen on the test set" in paper
    assert "Chosen on the test set" not in strict
    (row,) = tables_of(flattery)[0]
    assert row["Method"] == "vclipseg (faithful, random)"
    assert row["Flattered by"].startswith(
        "-0.0350 ("
    )  # 7 cases gain 0.04, one fails and loses 0.56
    (marked,) = tables_of(paper)[0]
    assert marked["95HD (voxels)"].startswith("1.75 (")  # seven cases of 2.0, and a failure of 0
    assert [row["protocol"] for row in csv.DictReader(table.splitlines())] == ["strict"] * 2 + [
        "paper"
    ]
    assert tex.count(r"\textbf{Chosen on the test set.}") == 1


def test_labels_saved_are_told(tmp_path):
    for labeled, dice in ((4, 0.0), (16, 0.2)):
        add_run(tmp_path, "supervised", BASE + dice, text="", labeled=labeled)
    add_run(tmp_path, "vclipseg", BASE + 0.1, labeled=4)
    add_run(tmp_path, "vclipseg", BASE + 0.3, labeled=16)
    text = written(tmp_path)[0]
    of_4, of_16 = tables_of(text.split("## Labels saved")[1])[0]
    assert of_4["supervised needs"] == "8.0"  # half way on a logarithmic axis
    assert of_4["Labels saved (95% interval)"] == "4.0 (4.0 to 4.0)"
    assert of_16["supervised needs"] == "more than 16"
    assert of_16["Labels saved (95% interval)"].startswith("more than 0 (")


def test_a_table_says_what_its_runs_were_computed_on(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path, "supervised", BASE, text="", seed=seed, device="A, 1 thread(s), bf16")
    assert "- All runs computed on: A, 1 thread(s), bf16.\n" in written(tmp_path)[0]
    add_run(tmp_path, "caml", BASE, text="", device="B, 1 thread(s), fp32")
    told = "computed on: A, 1 thread(s), bf16 (2); B, 1 thread(s), fp32 (1). Seconds"
    assert told in written(tmp_path)[0]


def test_a_table_of_uneven_rows_says_which_runs_rank(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path, "supervised", BASE, text="", seed=seed)
        add_run(tmp_path, "vclipseg", BASE, seed=seed)
    assert "more runs than others" not in written(tmp_path)[0]
    add_run(tmp_path, "caml", BASE, text="", seed=1)
    assert "of the runs that all have (seed 1)" in written(tmp_path)[0]
    add_run(tmp_path, "cps", BASE, text="", seed=2)
    assert "of the runs that all have (seed none)" in written(tmp_path)[0]


def test_labels_are_saved_over_the_seeds_that_all_have(tmp_path):
    """The baseline's second seed is better; that is nothing that the method would save."""
    for labeled, dice in ((4, 0.0), (16, 0.2)):
        for seed, more in ((0, 0.0), (1, 0.1)):
            add_run(tmp_path, "supervised", BASE + dice + more, text="", labeled=labeled, seed=seed)
    add_run(tmp_path, "vclipseg", BASE, labeled=4)
    (row,) = tables_of(written(tmp_path)[0].split("## Labels saved")[1])[0]
    assert row["Labels saved (95% interval)"] == "0.0 (0.0 to 0.0)"


def test_a_method_below_the_baselines_smallest_budget_saves_fewer_than_none(tmp_path):
    for labeled, dice in ((4, 0.0), (16, 0.2)):
        add_run(tmp_path, "supervised", BASE + dice, text="", labeled=labeled)
    add_run(tmp_path, "vclipseg", BASE - 0.3, labeled=4)
    (row,) = tables_of(written(tmp_path)[0].split("## Labels saved")[1])[0]
    assert row["supervised needs"] == "fewer than 4"
    assert row["Labels saved (95% interval)"] == "fewer than 0 (fewer than 0 to fewer than 0)"


def test_figures_are_shown(grid):
    for labeled in (16, 4):
        (grid / f"critical-difference-la-{labeled}.png").touch()
    four, sixteen = (
        f"![critical-difference-la-{n}](critical-difference-la-{n}.png)" for n in (4, 16)
    )
    assert f"{four}\n\n{sixteen}" in written(grid)[0]


def test_csv_has_everything_of_a_row(grid):
    write_facts(grid, GridFacts("la", published="la"))
    rows = list(csv.DictReader(written(grid)[1].splitlines()))
    assert list(rows[0]) == list(CSV_COLUMNS)
    supervised, ours = rows
    assert float(ours["dice"]) == pytest.approx(0.73)
    assert float(ours["dice_low"]) < 0.73 < float(ours["dice_high"])
    assert float(ours["baseline_difference"]) == pytest.approx(0.075)
    assert float(ours["baseline_p_holm"]) == pytest.approx(2 / 2**8, abs=1e-6)
    assert (ours["best_name"], supervised["best_name"]) == ("", "vclipseg (faithful, random)")
    assert float(ours["published_dice"]) == 0.8851
    assert (ours["runs"], ours["cases"], ours["full_size"]) == ("2", "8", "0")


def test_latex_is_a_table_with_booktabs(grid):
    write_facts(
        grid,
        GridFacts(
            "la", published="la", methods=(MethodFacts("vclipseg", "faithful", None, ("a_b",)),)
        ),
    )
    tex = written(grid)[2]
    assert r"\begin{tabular}{l" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1
    head = next(line for line in tex.splitlines() if line.startswith("Method"))
    body = [line for line in tex.splitlines() if line.startswith(("supervised", "vclipseg"))]
    assert len(body) == 2
    assert {line.count("&") for line in (head, *body)} == {13}
    assert r"\textbf{73.00 {\scriptsize (" in body[1]
    assert "$+7.50$ & 0.0078" in body[1]
    assert r"$^{2}$ a\_b" in tex


def test_an_empty_record_makes_empty_tables(tmp_path):
    text, table, _ = written(tmp_path)
    assert "| Method" not in text
    assert len(table.splitlines()) == 1
