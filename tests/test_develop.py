"""Scores on the development list."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

from vclipseg.data.phantom import make_phantom
from vclipseg.errors import UsageError
from vclipseg.runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
develop = importlib.import_module("develop")

RECIPE = """
name = "tiny"
[data]
labeled = 1
[method]
name = "supervised"
filters = 2
[train]
steps = 1
patch = [16, 16, 16]
tensorboard = false
threads = 1
"""


@pytest.mark.slow
def test_a_finished_run_is_scored_and_not_trained_again(tmp_path, monkeypatch):
    data = make_phantom(
        tmp_path / "data", labeled=3, unlabeled=0, test=1, shape=(24, 24, 18), spacing=4.0
    )
    recipe, run, record = (tmp_path / name for name in ("tiny.toml", "run", "record.csv"))
    recipe.write_text(RECIPE)

    def develops(*more):
        asked = f"develop.py {recipe} --data {data} --out {run} --record {record}"
        monkeypatch.setattr(sys, "argv", [*asked.split(), *more])
        develop.main()

    develops()
    model = Run.open(run).model_path
    trained_at = model.stat().st_mtime_ns
    develops()
    with pytest.raises(UsageError, match="other settings"):
        develops("--set", "train.steps=2")
    model.rename(tmp_path / "kept")
    with pytest.raises(UsageError, match="not finished"):
        develops()
    assert (tmp_path / "kept").stat().st_mtime_ns == trained_at
    with record.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == second
    assert first["cases"] == "2"  # of three labels one was used
