"""Dice at other thresholds than one half, on the development list."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vclipseg.data.volume import Volume
from vclipseg.errors import UsageError
from vclipseg.networks.vnet import Head

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


def test_what_is_found_but_not_believed_shows_below_one_half():
    model = predictor(("background", "organ"))
    dices, highest = thresholds.measure(model, DATASET, ("a", "b"))
    everything = 2 * 32 / (64 + 32)
    assert dices == pytest.approx([0, 0, 1, 1, everything])
    assert highest == pytest.approx(0.35)


def test_more_than_one_structure_is_refused():
    with pytest.raises(UsageError, match="one foreground class, and the model has 2"):
        thresholds.measure(predictor(("background", "a", "b")), DATASET, ("a",))


def test_a_head_without_a_feature_for_the_organ_has_a_ceiling():
    """Whatever it reads, as features are not negative, the probability stays below that of the biases.

    Another head, that is for training only, does not count.
    """
    head = Head(3, 2)
    model = nn.ModuleDict({"first": head, "second": nn.Sequential(Head(3, 2))})
    model.training_only = ("second.",)
    with torch.no_grad():
        head.weight[1] = head.weight[0] - torch.rand_like(head.weight[0])
        head.bias[1] = -0.4
    found = thresholds.ceiling(model)
    probs = head(torch.rand(1, 3, 8, 8, 8) * torch.logspace(-6, 3, 8)).softmax(1)[:, 1]
    assert found == pytest.approx(1 / (1 + math.exp(0.4)))
    assert found - 1e-4 < probs.max() < found + 1e-6
    with torch.no_grad():
        head.weight[1, 0] = head.weight[0, 0] + 1e-3
    assert thresholds.ceiling(model) == 1


def test_a_run_measured_again_has_its_rows_once(tmp_path):
    def rows(dice, overrides="x"):
        row = dict.fromkeys(thresholds.COLUMNS, "")
        return [{**row, "recipe": "r", "overrides": overrides, "dice": dice}]

    record = tmp_path / "thresholds.csv"
    for new in (rows(0.1), rows(0.2, "y"), rows(0.3)):
        thresholds.add_rows(record, new)
    found = [(row["overrides"], row["dice"]) for row in thresholds.read_rows(record)]
    assert found == [("y", "0.2"), ("x", "0.3")]
