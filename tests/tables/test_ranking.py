"""Mean ranks, Friedman and Nemenyi against numbers worked out by hand and from the literature."""

from __future__ import annotations

import numpy as np
import pytest

from vclipseg.tables.ranking import Ranking, critical_difference, mean_ranks, rank_methods

SCORES = np.array([
    [0.9, 0.8, 0.9, 0.9, 0.7, 0.9],
    [0.8, 0.9, 0.7, 0.8, 0.6, 0.8],
    [0.7, 0.7, 0.7, 0.7, 0.5, 0.7],
])  # fmt: skip


def test_ranks_by_hand():
    # ranks a case: 1 2 3, 2 1 3, 1 2.5 2.5 (a tie), 1 2 3, 1 2 3, 1 2 3
    expected = [(1 + 2 + 1 + 1 + 1 + 1) / 6, (2 + 1 + 2.5 + 2 + 2 + 2) / 6, (3 * 5 + 2.5) / 6]
    assert mean_ranks(SCORES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)]
)
def test_critical_difference_is_that_of_the_table(methods, q):
    """q at 0.05 as in table 5a of Demsar, JMLR 7 (2006)."""
    expected = q * (methods * (methods + 1) / (6 * 20)) ** 0.5
    assert critical_difference(methods, 20) == pytest.approx(expected, rel=5e-4)


def test_methods_come_out_from_best_to_worst():
    ranking = rank_methods(["c", "a", "b"], SCORES[[2, 0, 1]])
    assert ranking.names == ("a", "b", "c")
    assert ranking.ranks == pytest.approx(sorted(mean_ranks(SCORES)))
    assert ranking.n == 6
    # Friedman without its correction for ties: 12 n / (k (k + 1)) * sum (R - (k + 1) / 2)^2
    chi2 = 12 * 6 / 12 * sum((rank - 2) ** 2 for rank in ranking.ranks)
    ties = 1 - (2**3 - 2) / (6 * (3**3 - 3))
    assert ranking.p == pytest.approx(np.exp(-chi2 / ties / 2))  # chi square of two degrees


def make(ranks, reach, p=0.001):
    return Ranking(tuple("abcdefgh"[: len(ranks)]), tuple(ranks), reach, p, 20)


def test_cliques_are_the_largest_runs_within_the_critical_difference():
    assert make((1.0, 1.5, 2.4, 4.0), 1.0).cliques == [(0, 1), (1, 2)]
    assert make((1.0, 1.5, 2.0, 4.0), 1.0).cliques == [(0, 2)]
    assert make((1.0, 3.0, 5.0), 1.0).cliques == []
    assert make((1.0, 2.0, 3.0), 5.0).cliques == [(0, 2)]


def test_claims():
    assert make((1.0, 3.0, 5.0), 1.0).claim.endswith("a is ahead of all others.")
    assert make((1.0, 1.5, 1.6, 5.0), 1.0).claim.endswith("not to be told apart from b and c.")
    many = make((1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), 1.0).claim
    assert many.endswith("not to be told apart from b, c, d, e and 3 others.")
    assert make((1.0, 3.0, 5.0), 1.0, p=0.2).claim.endswith("no difference between them is shown.")


def test_too_little_to_rank():
    assert rank_methods(["a", "b"], SCORES[:2]) is None
    assert rank_methods(["a", "b", "c"], SCORES[:, :5]) is None
    holes = SCORES.copy()
    holes[0, 0] = np.nan
    assert rank_methods(["a", "b", "c"], holes) is None  # five cases that all have


def test_equal_methods_do_not_differ():
    ranking = rank_methods(["a", "b", "c"], np.ones((3, 8)))
    assert ranking.ranks == (2.0, 2.0, 2.0)
    assert ranking.p == 1.0
