from __future__ import annotations

import json
import math

import pytest

from vclipseg.compare import compare_runs
from vclipseg.errors import UsageError
from vclipseg.scores import CaseScore, EvaluateSettings, summarize, write_scores

SETTINGS = EvaluateSettings(bootstrap_samples=200)


def make_run(
    folder, dice, name="run", *, classes=("one",), reference_ml=2.0, test_hash="", protocol="strict"
):
    """A run folder; `dice` has a value a case, the same for each class."""
    scores = [
        CaseScore(f"c{n}", i, class_name, lcc, value, value, *[1.0] * 4, value, reference_ml, 2, 0,
                  counts=(1, 0, 0, 1))
        for n, value in enumerate(dice)
        for i, class_name in enumerate(classes, start=1)
        for lcc in (0, 1)
    ]  # fmt: skip
    write_scores(folder, scores, summarize(scores, SETTINGS, protocol=protocol))
    (folder / "experiment.json").write_text(json.dumps({"name": name}))
    (folder / "splits.json").write_text(json.dumps({"test_hash": test_hash} if test_hash else {}))
    return folder


LOW = [0.50, 0.52, 0.54, 0.56, 0.58, 0.60, 0.62, 0.64]
HIGH = [value + 0.1 + 0.001 * n for n, value in enumerate(LOW)]


def test_a_clear_difference_is_claimed(tmp_path):
    comparison = compare_runs(
        make_run(tmp_path / "a", HIGH, "ours"), make_run(tmp_path / "b", LOW, "theirs")
    )
    assert set(comparison.rows) == {"one", "mean"}
    mean = comparison.rows["mean"]
    assert mean.difference == pytest.approx(0.1035)
    assert mean.p == pytest.approx(2 / 2**8)
    text = comparison.text()
    assert "ours has a higher dice than theirs" in text
    assert "+0.1035" in text
    assert "0.0078" in text
    content = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert content["rows"]["mean"]["n"] == 8
    assert content["rows"]["one"]["claim"].startswith("ours has a higher dice")


def test_five_cases_allow_no_claim(tmp_path):
    comparison = compare_runs(make_run(tmp_path / "a", HIGH[:5]), make_run(tmp_path / "b", LOW[:5]))
    assert "No claim" in comparison.text()
    assert comparison.name_a == str(tmp_path / "a")  # both call themselves "run"


def test_classes_are_adjusted_for_each_other(tmp_path):
    comparison = compare_runs(
        make_run(tmp_path / "a", HIGH, classes=("one", "two")),
        make_run(tmp_path / "b", LOW, classes=("one", "two")),
    )
    assert list(comparison.rows) == ["one", "two", "mean"]
    assert comparison.rows["one"].p_adjusted == pytest.approx(4 / 2**8)
    assert comparison.rows["mean"].p_adjusted is None


def test_undefined_values_are_left_out(tmp_path):
    comparison = compare_runs(
        make_run(tmp_path / "a", [math.nan, *HIGH[1:]]), make_run(tmp_path / "b", LOW)
    )
    assert comparison.rows["mean"].n == 7


def test_nothing_defined_still_prints(tmp_path):
    runs = [make_run(tmp_path / name, [math.nan] * 3) for name in "ab"]
    assert "No claim" in compare_runs(*runs, metric="nsd", lcc=True).text()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dice": LOW[:7]}, "different cases or classes.* case c7, class one"),
        ({"dice": LOW, "classes": ("one", "two")}, "different cases or classes.* class two"),
        ({"dice": LOW, "reference_ml": 2.5}, "different data: the reference of case c0"),
        ({"dice": LOW, "test_hash": "sha256:2"}, "different data"),
    ],
)
def test_runs_on_different_tests_are_refused(tmp_path, other, message):
    one = make_run(tmp_path / "a", HIGH, test_hash="sha256:1")
    with pytest.raises(UsageError, match=message):
        compare_runs(one, make_run(tmp_path / "b", **other))


def test_a_run_chosen_on_the_test_set_is_marked(tmp_path):
    comparison = compare_runs(
        make_run(tmp_path / "a", HIGH, protocol="paper"), make_run(tmp_path / "b", LOW)
    )
    assert comparison.notes == (
        f"{tmp_path / 'a'}: chosen on the test set (paper protocol), so its scores are too good.",
    )
    assert comparison.notes[0] in comparison.text()


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"f1: not a metric. Choose from dice"):
        compare_runs(tmp_path, tmp_path, metric="f1")
