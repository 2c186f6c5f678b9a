"""Runs for the tests of records and tables: one class, a value a case."""

from __future__ import annotations

import math

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
