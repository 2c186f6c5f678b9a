from __future__ import annotations

import itertools

import numpy as np
import pytest

from vclipseg import statistics


def test_bootstrap_mean_covers_the_mean_and_is_seeded():
    values = np.random.default_rng(0).normal(0.8, 0.1, 30)
    first = statistics.bootstrap_mean(values, seed=3)
    assert first == statistics.bootstrap_mean(values, seed=3)
    assert first.mean == pytest.approx(values.mean())
    assert first.low < first.mean < first.high
    # about 1.96 standard errors on each side
    assert first.high - first.low == pytest.approx(3.92 * values.std() / np.sqrt(30), rel=0.15)


@pytest.mark.parametrize(
    ("values", "mean", "low", "n"),
    [
        ([], None, None, 0),
        ([np.nan], None, None, 0),
        ([0.5], 0.5, None, 1),
        ([0.5, np.nan], 0.5, None, 1),
        ([0.5, 0.5, 0.5], 0.5, 0.5, 3),
    ],
)
def test_bootstrap_mean_of_too_little(values, mean, low, n):
    assert statistics.bootstrap_mean(values) == statistics.Interval(mean, low, low, n)


def test_missing_values_are_left_out():
    assert statistics.bootstrap_mean([0.2, np.nan, 0.4, 0.9]) == statistics.bootstrap_mean(
        [0.2, 0.4, 0.9]
    )


def test_seeds_are_averaged_before_cases_are_resampled():
    table = np.array([[0.8, 0.6, np.nan, np.nan], [0.6, np.nan, 0.5, np.nan]])
    averaged = statistics.mean_over_seeds(table)
    np.testing.assert_allclose(averaged, [0.7, 0.6, 0.5, np.nan])
    interval = statistics.bootstrap_mean_over_seeds(table)
    assert interval == statistics.bootstrap_mean([0.7, 0.6, 0.5])
    assert interval.n == 3


def test_more_seeds_of_the_same_scores_do_not_narrow_the_interval():
    values = np.random.default_rng(1).uniform(0.5, 0.9, 12)
    assert statistics.bootstrap_mean_over_seeds(np.tile(values, (5, 1))) == (
        statistics.bootstrap_mean_over_seeds(values[None])
    )


def exact_wilcoxon(difference):
    """The two-sided p over all sign assignments."""
    difference = np.array(difference, dtype=float)
    ranks = np.abs(difference).argsort().argsort() + 1
    observed = min(ranks[difference > 0].sum(), ranks[difference < 0].sum())
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product([0, 1], repeat=len(ranks))
    ]
    return min(1.0, 2 * np.mean([value <= observed for value in sums]))


@pytest.mark.parametrize(
    "difference",
    [
        [0.01, 0.02, 0.03, 0.04, 0.05, 0.06],
        [0.01, -0.02, 0.03, 0.04, 0.05, 0.06, 0.07],
        [0.1, -0.2, 0.3],
        [-0.5],
    ],
)
def test_wilcoxon_is_exact(difference):
    comparison = statistics.paired_comparison(difference, np.zeros(len(difference)))
    assert comparison.p == pytest.approx(exact_wilcoxon(difference))
    assert comparison.difference == pytest.approx(np.mean(difference))


@pytest.mark.parametrize(("n", "p"), [(4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_six_cases_are_the_fewest_that_can_reach_the_level(n, p):
    a = 0.5 + 0.01 * np.arange(1, n + 1)
    comparison = statistics.paired_comparison(a, np.full(n, 0.5), names=("ours", "theirs"))
    assert comparison.p == pytest.approx(p)
    assert comparison.significant == (n >= statistics.MIN_CASES)
    assert ("No claim" in comparison.claim) == (n < statistics.MIN_CASES)


def test_claim_of_a_difference_names_its_direction():
    a, b = np.linspace(0.80, 0.90, 10), np.linspace(0.70, 0.81, 10)
    up = statistics.paired_comparison(a, b, names=("ours", "theirs")).claim
    down = statistics.paired_comparison(b, a, names=("theirs", "ours")).claim
    assert up.startswith("ours has a higher dice than theirs, by 0.0950 on average")
    assert down.startswith("theirs has a lower dice than ours, by 0.0950 on average")
    assert "p = 0.0020, n = 10" in up


def test_no_claim_without_a_difference():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.7, 0.9, 20)
    comparison = statistics.paired_comparison(a, a + rng.normal(0, 0.02, 20))
    assert not comparison.significant
    assert comparison.claim.startswith("No difference in dice between A and B is shown")


def test_no_claim_where_ranks_and_mean_disagree():
    """Nine small gains and one collapse: the ranks say better, the mean does not."""
    difference = np.array([0.01, 0.011, 0.012, 0.013, 0.014, 0.015, 0.016, 0.017, 0.018, -0.6])
    comparison = statistics.paired_comparison(0.7 + difference, np.full(10, 0.7))
    assert comparison.difference < 0
    assert not comparison.significant


def test_equal_methods_have_p_1():
    values = np.linspace(0.5, 0.9, 8)
    comparison = statistics.paired_comparison(values, values + 1e-15)
    assert (comparison.p, comparison.difference, comparison.n) == (1.0, 0.0, 8)
    assert not comparison.significant


def test_pairs_with_a_missing_value_are_left_out():
    a, b = [0.8, np.nan, 0.6, 0.9], [0.7, 0.5, np.nan, 0.7]
    comparison = statistics.paired_comparison(a, b)
    assert comparison.n == 2
    assert comparison.mean_a == pytest.approx(0.85)
    assert comparison.mean_b == pytest.approx(0.7)
    assert "2 paired cases" in comparison.claim


def test_nothing_to_compare():
    comparison = statistics.paired_comparison([np.nan], [0.5])
    assert (comparison.n, comparison.p, comparison.difference) == (0, None, None)
    assert "No claim" in comparison.claim


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shape"):
        statistics.paired_comparison([0.5, 0.6], [0.5])


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02, None, 0.01], [0.02, None, 0.02]),
    ],
)
def test_holm(p_values, adjusted):
    assert statistics.holm(p_values) == pytest.approx(adjusted)


def test_all_pairs_are_one_family():
    rng = np.random.default_rng(0)
    scores = rng.normal([[0.8], [0.82], [0.9]], 0.05, (3, 12))
    scores[1, 4] = np.nan
    pairs = list(itertools.combinations(range(3), 2))
    plain = [statistics.paired_comparison(scores[i], scores[j]).p for i, j in pairs]
    found = statistics.holm_of_all_pairs(scores)
    assert list(found) == pairs
    assert list(found.values()) == pytest.approx(statistics.holm(plain))


def test_the_best_of_many_that_are_alike_is_rarely_called_better():
    """Tested against all pairs; against the others alone it would be wrong in one case of six."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(60):
        scores = rng.normal(0, 1, (15, 20))
        best = int(scores.mean(1).argmax())
        p = statistics.holm_of_all_pairs(scores)
        wrong += any(value < 0.05 for pair, value in p.items() if best in pair)
    assert wrong <= 5


def test_adjusted_claims_follow_holm():
    a, b = 0.5 + 0.01 * np.arange(1, 7), np.full(6, 0.5)
    one = statistics.paired_comparison(a, b)
    assert one.significant  # p = 0.031
    both = statistics.adjust([one, one])
    assert [comparison.p_adjusted for comparison in both] == pytest.approx([0.0625, 0.0625])
    assert not both[0].significant
    assert "p = 0.0625 after Holm" in both[0].claim


@pytest.mark.parametrize(
    ("p", "text"), [(None, ""), (1.0, "1.0000"), (0.0312, "0.0312"), (2e-6, "< 0.0001")]
)
def test_p_values_are_never_shown_as_zero(p, text):
    assert statistics.format_p(p) == text


def test_a_tiny_p_reads_well():
    a = 0.5 + 0.01 * np.arange(1, 21)
    claim = statistics.paired_comparison(a, np.full(20, 0.5)).claim
    assert "p < 0.0001, n = 20" in claim
