"""Dice at other thresholds than one half, on the development list."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vclipseg.data.volume import Volume
from vclipseg.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
thresholds = importlib.import_module("thresholds")

REFERENCE = np.zeros((4, 4, 4), np.uint8)
REFERENCE[:2] = 1
FOREGROUND = np.where(REFERENCE, 0.35, 0.15).astype(np.float32)
DATASET = SimpleNamespace(
    case=lambda case_id: case_id,
    image=lambda case: case,
    labels=lambda case: Volume(REFERENCE, np.eye(4)),
)


def predictor(class_names):
    probs = Volume(np.stack([1 - FOREGROUND, FOREGROUND]), np.eye(4))
    return SimpleNamespace(class_names=class_names, probabilities=lambda image: probs)


def test_what_is_found_but_not_believed_shows_below_one_half(monkeypatch):
    monkeypatch.setattr(thresholds, "load", lambda folder: predictor(("background", "organ")))
    dices, highest = thresholds.measure(Path("run"), DATASET, ("a", "b"))
    everything = 2 * 32 / (64 + 32)
    assert dices == pytest.approx([0, 0, 1, 1, everything])
    assert highest == pytest.approx(0.35)


def test_more_than_one_structure_is_refused(monkeypatch):
    monkeypatch.setattr(thresholds, "load", lambda folder: predictor(("background", "a", "b")))
    with pytest.raises(UsageError, match="one foreground class"):
        thresholds.measure(Path("run"), DATASET, ("a",))


def test_a_run_measured_again_has_its_rows_once(tmp_path):
    def rows(dice, overrides="x"):
        row = dict.fromkeys(thresholds.COLUMNS, "")
        return [{**row, "recipe": "r", "overrides": overrides, "dice": dice}]

    record = tmp_path / "thresholds.csv"
    for new in (rows(0.1), rows(0.2, "y"), rows(0.3)):
        thresholds.add_rows(record, new)
    found = [(row["overrides"], row["dice"]) for row in thresholds.read_rows(record)]
    assert found == [("y", "0.2"), ("x", "0.3")]
