"""Runs for the tests of records and tables: one class, a value a case."""

from __future__ import annotations

import math

import numpy as np

from vclipseg import records
from vclipseg.scores import CaseScore

FACTS = {
    "settings_hash": "0123456789ab",
    "dataset": "la",
    "method": "vclipseg",
    "preset": "faithful",
    "text": "random",
    "labeled": 4,
    "draw": None,
    "fold": None,
    "seed": 1337,
    "filters": 16,
    "steps": 6000,
    "weights": "last",
    "seconds": 12.5,
    "device": "cpu",
    "commit": "abc1234",
}

BASE = np.linspace(0.5, 0.8, 8)
GAIN = np.linspace(0.05, 0.09, 8)


def make_scores(dice=(0.5, 0.7, 0.9), failures=0):
    """One class; the first cases are failures."""
    scores = []
    for n, value in enumerate(dice):
        failed = n < failures
        overlap, distance = (0.0, math.nan) if failed else (value, 2.0)
        for lcc in (0, 1):
            overlap_lcc = overlap + 0.05 * lcc * (not failed)
            scores.append(
                CaseScore(f"c{n}", 1, "atrium", lcc, overlap_lcc, overlap_lcc, *[distance] * 4,
                          overlap_lcc, 1.0, 1.0, int(failed))
            )  # fmt: skip
    return scores


def make_record(scores=None, lcc=False, protocol="strict", **facts):
    return records.run_record(
        scores or make_scores(), lcc=lcc, protocol=protocol, **(FACTS | facts)
    )


def add_run(grid, method, dice, *, seed=0, failures=0, protocol="strict", lcc=(False,), **facts):
    """Record a run of a method whose hash is made of what tells it apart."""
    scores = make_scores(dice, failures)
    name = f"{method}-{seed}-" + "-".join(f"{key}{value}" for key, value in facts.items())
    facts = {"settings_hash": name, "method": method, "seed": seed} | facts
    rows = [make_record(scores, lcc=kept, protocol=protocol, **facts) for kept in lcc]
    records.record(grid, rows, scores)
