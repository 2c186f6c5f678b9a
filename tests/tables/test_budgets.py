"""Labels saved, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vclipseg.tables.budgets import labels_needed, labels_saved


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        (0.7, 8.0),  # half way from 4 to 16 in log(labels)
        (0.65, 4 * 2**0.5),
        (0.8, 16.0),
        (0.85, math.sqrt(16 * 64)),
        (0.6, 4.0),
        (0.1, -math.inf),  # the smallest budget measured is more than enough
        (0.95, math.inf),
    ],
)
def test_labels_needed(target, needed):
    assert labels_needed([4, 16, 64], [0.6, 0.8, 0.9], target) == pytest.approx(needed)


def test_a_curve_that_falls_keeps_its_best():
    assert labels_needed([1, 2, 4], [0.6, 0.5, 0.8], 0.6) == 1
    assert labels_needed([1, 2, 4], [0.6, 0.5, 0.8], 0.7) == pytest.approx(2 * 2**0.5)


def test_labels_saved_at_equal_scores_are_none():
    scores = np.linspace(0.5, 0.9, 10)
    saved = labels_saved("m", 4, scores, {4: scores, 16: scores + 0.1})
    assert saved.saved == pytest.approx(0)
    assert (saved.low, saved.high) == pytest.approx((0, 0))


def test_the_interval_is_over_cases_and_may_be_open():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.7, 12)
    ours = base + rng.uniform(0.0, 0.21, 12)
    saved = labels_saved("m", 4, ours, {4: base, 16: base + 0.1})
    assert saved.low < saved.saved < saved.high
    assert saved.high == math.inf
    assert saved.most == 16
    again = labels_saved("m", 4, ours, {4: base, 16: base + 0.1})
    assert saved == again


def test_cases_that_somebody_lacks_are_left_out():
    base = np.array([0.5, 0.5, np.nan, 0.5])
    saved = labels_saved("m", 4, [0.55, 0.55, 0.9, np.nan], {4: base, 16: base + 0.1})
    assert saved.dice == pytest.approx(0.55)
    assert saved.needed == pytest.approx(8)
