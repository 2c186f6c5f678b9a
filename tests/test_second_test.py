"""The comparison on training cases that two methods left unlabeled."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from vclipseg.config import build_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.data.volume import read_image, read_labels
from vclipseg.errors import UsageError
from vclipseg.experiment import new_run, train_run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
second_test = importlib.import_module("second_test")
phantom = importlib.import_module("phantom")


OURS, OTHERS = (second_test.Asked("data", name, "robust", "1") for name in ("ours", "others"))


def scores(*of_seeds):
    return {
        seed: {f"case_{i}": dice for i, dice in enumerate(values)}
        for seed, values in enumerate(of_seeds)
    }


def test_seeds_are_averaged_before_cases_are_paired():
    rising = [0.7, 0.71, 0.72, 0.73, 0.74, 0.75, 0.76, 0.77]
    found = {OURS: scores([0.9] * 8, [0.7] * 8), OTHERS: scores(rising, rising)}
    comparison = second_test.comparisons(found, OURS)[OTHERS]
    assert (comparison.n, round(comparison.difference, 4)) == (8, 0.065)
    assert comparison.claim.startswith("ours (robust) has a higher dice than others (robust)")


def test_only_seeds_that_both_have_are_compared():
    found = {OURS: scores([0.8] * 8, [0.1] * 8), OTHERS: scores([0.7] * 8)}
    assert second_test.comparisons(found, OURS)[OTHERS].difference == pytest.approx(0.1)
    elsewhere = OTHERS._replace(dataset="other data")
    assert second_test.comparisons({**found, elsewhere: found[OTHERS]}, OURS).keys() == {OTHERS}


def trained(data, folder, steps):
    values = {
        "name": "tiny",
        "data": {"labeled": 1},
        "method": {"name": "supervised", "filters": 2},
        "train": {"steps": steps, "patch": [16, 16, 16], "tensorboard": False, "threads": 1},
    }
    run, prepared = new_run(
        build_experiment(values, {}, source="test"), data, folder, Console(quiet=True)
    )
    train_run(run, prepared.cases, Console(quiet=True))
    return run


@pytest.mark.slow
def test_runs_are_scored_on_what_they_left_unlabeled(tmp_path, monkeypatch, capsys):
    data = second_test_data(tmp_path / "data")
    runs = [trained(data, tmp_path / f"{steps}", steps=steps).folder for steps in (1, 2)]
    record = tmp_path / "record.csv"

    def scored(run):
        asked = f"second_test.py {run} --data {data} --record {record} --cases 2"
        monkeypatch.setattr(sys, "argv", asked.split())
        second_test.main()
        return capsys.readouterr().out

    assert "paired cases" not in scored(runs[0])
    assert "from 2 paired cases" in scored(runs[1])  # the second is compared with the first
    assert "from 2 paired cases" in scored(runs[1])  # once more replaces its rows
    with record.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4
    assert {row["case_id"] for row in found} == {"phantom_0001", "phantom_0002"}
    assert {row["dataset"] for row in found} == {"tiny"}


def test_two_runs_of_one_name_are_not_one(tmp_path):
    """They may differ in a setting that the record does not hold."""
    row = dict.fromkeys(second_test.COLUMNS, "x") | {"seed": 0, "dice": 0.5}
    record = tmp_path / "record.csv"
    second_test.add_rows(record, [row, row | {"settings_hash": "y", "seed": 1}])
    assert len(second_test.read_scores(record)) == 1
    second_test.add_rows(record, [row | {"settings_hash": "z"}])
    with pytest.raises(UsageError, match=r"two runs \(x, z\) of x \(x\), seed 0"):
        second_test.read_scores(record)


def test_runs_with_other_labels_are_not_compared():
    found = {OURS: scores([0.8] * 8), OTHERS: scores([0.7] * 7)}
    with pytest.raises(UsageError, match="different cases"):
        second_test.comparisons(found, OURS)


def test_the_phantom_of_the_second_test_is_what_was_unlabeled(tmp_path):
    make_phantom(tmp_path / "whole", labeled=0, unlabeled=1, test=0, classes=3)
    phantom.write_unlabeled(tmp_path / "second", 1)
    unlabeled = read_image(tmp_path / "whole/imagesUn/phantom_1000_0000.nii.gz")
    again = read_image(tmp_path / "second/imagesTr/phantom_1000_0000.nii.gz")
    labels = read_labels(tmp_path / "second/labelsTr/phantom_1000.nii.gz")
    assert np.array_equal(again.array, unlabeled.array)
    assert np.array_equal(np.unique(labels.array), [0, 1, 2, 3])


def second_test_data(folder):
    return make_phantom(folder, labeled=3, unlabeled=0, test=1, shape=(24, 24, 18), spacing=4.0)
