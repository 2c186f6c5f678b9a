"""What is said about two runs, from made-up Dice values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vclipseg.report.reading import read_runs
from vclipseg.report.results import headline_rows, show, show_p, show_seconds, verdicts
from vclipseg.scores import CASE_COLUMNS, CaseScore, write_rows

BASE = np.linspace(0.7, 0.9, 12)
JITTER = 0.004 * np.array([1, -1] * 6) * np.linspace(0.8, 1.2, 12)  # no ties, mean near 0


def scored(folder: Path, dice, method: str = "vclipseg", name: str = "", **metrics) -> Path:
    folder.mkdir()
    rows = [
        CaseScore(f"case_{i}", 1, "organ", lcc, float(d), float(d) / 2, *[1.0] * 7, failure=0)
        for i, d in enumerate(dice)
        for lcc in (0, 1)
    ]
    write_rows(folder / "cases.csv", CASE_COLUMNS, [vars(row) for row in rows])
    settings = {"method": {"name": method}}
    experiment = {"name": name or folder.name, "class_names": ["background", "organ"]}
    (folder / "experiment.json").write_text(json.dumps(experiment | {"settings": settings}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize(
    ("gain", "n", "kind", "title", "said"),
    [
        (0.05 + JITTER, 12, "better", "ours was better than plain", "0.050 higher (95% interval"),
        (-0.05 + JITTER, 12, "worse", "plain was better than ours", "0.050 lower"),
        (JITTER, 12, "even", "plain was as good as ours", "is not to be expected"),
        (0 * JITTER, 12, "even", "plain was as good as ours", "the two have the same Dice"),
        (30 * JITTER, 12, "unclear", "No difference between ours and plain is shown", "anything"),
        (0.05 + JITTER, 5, "unclear", "Too few cases", "Below 6 cases no such claim can be made"),
    ],
)
def test_verdict_follows_the_numbers(tmp_path, gain, n, kind, title, said):
    ours = scored(tmp_path / "ours", (BASE + gain)[:n])
    plain = scored(tmp_path / "plain", BASE[:n], method="supervised")
    (verdict,) = verdicts(read_runs([ours, plain]))
    assert verdict.kind == kind
    assert title in verdict.title
    assert said in verdict.text
    assert ("simpler model" in verdict.text) == (kind in ("even", "worse"))
    assert verdict.compared[0].numbers.n == n
    assert verdict.cautions[-1].startswith("One training run each")


def test_several_runs_share_one_holm_family(tmp_path):
    ours = scored(tmp_path / "ours", BASE + 0.05 + JITTER)
    others = [scored(tmp_path / name, BASE + shift) for name, shift in (("a", 0), ("b", 0.02))]
    found = verdicts(read_runs([ours, *others]))
    assert [verdict.run for verdict in found] == [1, 2]
    assert all(v.compared[0].numbers.p_adjusted >= v.compared[0].numbers.p for v in found)
    assert "after Holm" in found[0].text


def test_runs_on_other_cases_are_not_compared(tmp_path):
    ours = scored(tmp_path / "ours", BASE)
    fewer = scored(tmp_path / "fewer", BASE[:8])
    (verdict,) = verdicts(read_runs([ours, fewer]))
    assert verdict.title == "ours and fewer are not compared"
    assert "different cases" in verdict.text
    assert not verdict.compared


def test_cautions_name_what_was_not_alike(tmp_path):
    ours = scored(tmp_path / "ours", BASE, protocol="paper")
    other = scored(tmp_path / "other", BASE, method="mcnet")
    for folder, labeled in ((ours, ["a"]), (other, ["b"])):
        content = {"labeled": labeled, "unlabeled": [], "transductive": folder == other}
        (folder / "splits.json").write_text(json.dumps(content))
    (verdict,) = verdicts(read_runs([ours, other]))
    said = " ".join(verdict.cautions)
    assert "The labeled cases of the two runs differ." in said
    assert "The checkpoint of ours was chosen on these very cases." in said
    assert "other saw the test images in training." in said


def test_headline_has_a_row_a_run_and_counts_failures(tmp_path):
    runs = read_runs([scored(tmp_path / "a", BASE), scored(tmp_path / "b", BASE[:3])])
    rows = headline_rows(runs, lcc=False)
    assert [(row.run_name, row.num_cases, row.failures) for row in rows] == [
        ("a", 12, 0),
        ("b", 3, 0),
    ]
    assert rows[0].cells[0].mean == pytest.approx(BASE.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("names", "methods", "shown"),
    [
        (("x", "y"), ("m", "m"), ["x", "y"]),
        (("x", "x"), ("m", "n"), ["m", "n"]),
        (("x", "x", "y"), ("m", "n", "n"), ["x · m", "x · n", "y · n"]),
        (("x", "x"), ("m", "m"), ["first", "second"]),
    ],
)
def test_runs_have_names_that_tell_them_apart(tmp_path, names, methods, shown):
    folders = [
        scored(tmp_path / folder, BASE[:2], method, name)
        for folder, name, method in zip(("first", "second", "third"), names, methods, strict=False)
    ]
    assert [run.name for run in read_runs(folders)] == shown


def test_one_folder_twice_is_told_apart(tmp_path):
    folder = scored(tmp_path / "a", BASE[:2])
    assert [run.name for run in read_runs([folder, folder])] == ["a 1", "a 2"]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show(0.12345, 3), "0.123"),
        (show(None, 3), "–"),
        (show(float("nan"), 3), "–"),
        (show_p(0.0004), "< 0.001"),
        (show_p(0.5), "0.500"),
        (show_p(None), "–"),
        (show_seconds(2.34), "2.3 s"),
        (show_seconds(80), "80 s"),
        (show_seconds(600), "10 min"),
        (show_seconds(7200), "2.0 h"),
        (show_seconds(float("nan")), "–"),
    ],
)
def test_numbers_for_people(shown, text):
    assert shown == text
