from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from vclipseg.errors import DataError, UsageError
from vclipseg.scores import (
    CASE_COLUMNS,
    CaseScore,
    EvaluateSettings,
    case_means,
    nnunet_summary,
    read_scores,
    summarize,
    write_scores,
    write_text,
)

NAN = math.nan
SETTINGS = EvaluateSettings(bootstrap_samples=200)


def make_score(case_id="a", class_id=1, dice=0.8, hd95=2.0, lcc=0, failure=0):
    distances = dict.fromkeys(("hd95_voxel", "asd_voxel", "hd95_mm", "assd_mm"), hd95)
    return CaseScore(
        case_id=case_id,
        class_id=class_id,
        class_name=f"class {class_id}",
        lcc=lcc,
        dice=dice,
        jaccard=dice,
        nsd=dice,
        reference_ml=1.5,
        prediction_ml=1.25,
        failure=failure,
        counts=(8, 2, 4, 86),
        **distances,
    )


FAILED = make_score("b", dice=0.0, hd95=NAN, failure=1)


def test_a_case_is_the_mean_of_its_classes():
    scores = [make_score(dice=0.9), make_score(class_id=2, dice=0.7), make_score("b", dice=NAN)]
    assert case_means(scores, "dice") == pytest.approx({"a": 0.8, "b": NAN}, nan_ok=True)
    assert case_means(scores, "dice", class_name="class 2") == {"a": 0.7}
    assert case_means(scores, "dice", lcc=True) == {}


def test_an_absent_class_is_left_out_of_the_mean():
    scores = [make_score(dice=0.9), make_score(class_id=2, dice=NAN)]
    assert case_means(scores, "dice") == {"a": 0.9}


def test_a_failure_has_no_distance_but_in_the_papers_protocol():
    scores = [make_score(hd95=4.0), FAILED]
    strict, paper = summarize(scores, SETTINGS), summarize(scores, SETTINGS, protocol="paper")
    assert strict["mean"]["hd95_mm"]["mean"] == 4.0
    assert strict["mean"]["hd95_mm"]["n"] == 1
    assert paper["mean"]["hd95_mm"]["mean"] == 2.0
    assert strict["mean"]["dice"]["mean"] == paper["mean"]["dice"]["mean"] == 0.4
    assert strict["failures"] == paper["failures"] == 1
    assert paper["protocol"] == "paper"


def test_a_false_alarm_has_no_distance_in_any_protocol():
    alarm = make_score("b", dice=0.0, hd95=NAN)
    paper = summarize([make_score(), alarm], SETTINGS, protocol="paper")
    assert paper["mean"]["hd95_mm"] == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_summary_takes_the_headline_rows():
    scores = [make_score(dice=0.5), make_score(dice=0.9, lcc=1)]
    assert summarize(scores, SETTINGS)["mean"]["dice"]["mean"] == 0.5
    settings = EvaluateSettings(lcc=True)
    assert summarize(scores, settings)["mean"]["dice"]["mean"] == 0.9


def test_summary_has_intervals_over_cases_and_classes_by_index():
    rng = np.random.default_rng(0)
    scores = [
        make_score(f"c{n}", class_id, dice=float(rng.uniform(0.6, 0.9)))
        for n in range(12)
        for class_id in (2, 1)
    ]
    summary = summarize(scores, SETTINGS, weights="ema", seconds=3.5)
    dice = summary["mean"]["dice"]
    assert dice["n"] == summary["num_cases"] == 12
    assert dice["low"] < dice["mean"] < dice["high"]
    assert list(summary["classes"]) == ["class 1", "class 2"]
    assert (summary["weights"], summary["seconds"], summary["version"]) == ("ema", 3.5, 1)


def test_files_of_a_run(tmp_path):
    scores = [make_score(), make_score(lcc=1), FAILED]
    summary = summarize(scores, SETTINGS)
    write_scores(tmp_path / "run", scores, summary)
    with (tmp_path / "run" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CASE_COLUMNS
    assert rows[0]["dice"] == "0.8"
    assert rows[2]["hd95_mm"] == ""
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8")) == summary
    names = {"cases.csv", "metrics.json", "nnunet_summary.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


def test_cases_csv_is_read_back(tmp_path):
    scores = [make_score(dice=1 / 3), FAILED]
    write_scores(tmp_path, scores, summarize(scores, SETTINGS))
    read = read_scores(tmp_path)
    assert read[0].dice == pytest.approx(1 / 3, abs=1e-6)
    assert math.isnan(read[1].hd95_mm)
    assert (read[1].failure, read[1].class_id, read[1].counts) == (1, 1, None)


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="vclipseg evaluate"):
        read_scores(tmp_path)
    (tmp_path / "cases.csv").write_text("case_id,dice\na,0.5\n")
    with pytest.raises(DataError, match="class_id"):
        read_scores(tmp_path)


def test_nnunet_summary_has_its_form(tmp_path):
    absent = make_score("b", dice=NAN, hd95=NAN)
    scores = [make_score(), absent, make_score(class_id=2, dice=0.4), make_score(lcc=1, dice=1.0)]
    write_scores(
        tmp_path, scores, summarize(scores, SETTINGS), reference_files={"a": tmp_path / "a.nii.gz"}
    )
    summary = json.loads((tmp_path / "nnunet_summary.json").read_text(encoding="utf-8"))
    assert set(summary) == {"foreground_mean", "mean", "metric_per_case"}
    first = summary["metric_per_case"][0]
    assert first["metrics"]["1"] == {
        "Dice": 0.8,
        "IoU": 0.8,
        "TP": 8,
        "FP": 2,
        "FN": 4,
        "TN": 86,
        "n_pred": 10,
        "n_ref": 12,
    }
    assert first["reference_file"] == str(tmp_path / "a.nii.gz")
    assert first["prediction_file"] == str(tmp_path / "predictions" / "a.nii.gz")
    assert math.isnan(summary["metric_per_case"][1]["metrics"]["1"]["Dice"])
    assert summary["mean"]["1"]["Dice"] == 0.8  # the absent class is left out
    assert summary["foreground_mean"]["Dice"] == pytest.approx(0.6)


def test_nnunet_summary_needs_counts(tmp_path):
    write_scores(tmp_path, [make_score()], summarize([make_score()], SETTINGS))
    with pytest.raises(ValueError, match="counts"):
        nnunet_summary(read_scores(tmp_path), {}, {})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("vclipseg.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
