"""The comparison on training cases that two methods left unlabeled."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

from vclipseg.config import build_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.errors import UsageError
from vclipseg.experiment import new_run, train_run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
second_test = importlib.import_module("second_test")


def rows(method, dices):
    name = {"method": method, "preset": "robust"}
    return [[{**name, "dice": dice} for dice in of_run] for of_run in dices]


def test_seeds_are_averaged_before_cases_are_paired():
    ours = rows("ours", [[0.9] * 8, [0.7] * 8])
    others = rows("others", [[0.7, 0.71, 0.72, 0.73, 0.74, 0.75, 0.76, 0.77]])
    found = second_test.compare(ours, others)
    assert (found.n, round(found.difference, 4)) == (8, 0.065)
    assert found.claim.startswith("ours (robust) has a higher dice than others (robust)")


def trained(data, folder, labeled=1):
    values = {
        "name": "tiny",
        "data": {"labeled": labeled},
        "method": {"name": "supervised", "filters": 2},
        "train": {"steps": 1, "patch": [16, 16, 16], "tensorboard": False, "threads": 1},
    }
    run, prepared = new_run(
        build_experiment(values, {}, source="test"), data, folder, Console(quiet=True)
    )
    train_run(run, prepared.cases, Console(quiet=True))
    return run


@pytest.mark.slow
def test_both_are_scored_on_what_they_left_unlabeled(tmp_path, monkeypatch, capsys):
    data = second_test_data(tmp_path / "data")
    first, second = (trained(data, tmp_path / name).folder for name in ("first", "second"))
    record = tmp_path / "record.csv"
    asked = f"second_test.py {first} --other {second} --data {data} --record {record} --cases 2"
    monkeypatch.setattr(sys, "argv", asked.split())
    second_test.main()
    assert "from 2 paired cases" in capsys.readouterr().out
    second_test.main()  # the same runs once more replace their rows
    with record.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4
    assert {row["case_id"] for row in found} == {"phantom_0001", "phantom_0002"}


@pytest.mark.slow
def test_runs_with_other_labels_are_not_compared(tmp_path):
    data = second_test_data(tmp_path / "data")
    runs = [trained(data, tmp_path / f"{n}", labeled=n) for n in (1, 2)]
    with pytest.raises(UsageError, match="different cases"):
        second_test.shared_cases(runs, 2)


def second_test_data(folder):
    return make_phantom(folder, labeled=3, unlabeled=0, test=1, shape=(24, 24, 18), spacing=4.0)
