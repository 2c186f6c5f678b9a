"""What a table of scores lets one say: confidence intervals, paired tests, and plain sentences.

Cases are what is sampled, so intervals resample cases. Missing values (NaN: a distance of an empty
prediction) are left out, and every figure carries the number of cases behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
MIN_CASES = 6  # the exact Wilcoxon signed-rank test gives p >= 2 / 2**n: 0.0625 with 5 cases
BOOTSTRAP_SAMPLES = 5000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` cases and its 95% confidence interval; None is what cannot be computed."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same cases: `difference` is the mean of A minus B over `n` cases.

    `p` is the two-sided Wilcoxon signed-rank test's; `p_adjusted` is set by `adjust`.
    """

    name_a: str
    name_b: str
    metric: str
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    p_adjusted: float | None = None

    @property
    def significant(self) -> bool:
        """Whether a difference may be claimed.

        Needs six cases, p (adjusted where it was) below 0.05, and an interval of the mean
        difference without 0: the test looks at ranks, and ranks and means can disagree.
        """
        p = self.p if self.p_adjusted is None else self.p_adjusted
        if self.n < MIN_CASES or p is None or self.low is None or self.high is None:
            return False
        return p < SIGNIFICANCE and not self.low <= 0 <= self.high

    @property
    def claim(self) -> str:
        """What may be said, as one plain sentence."""
        if self.n < MIN_CASES or self.difference is None:
            return (
                f"No claim that {self.name_a} and {self.name_b} differ in {self.metric} can be "
                f"made from {self.n} paired {'case' if self.n == 1 else 'cases'}: "
                f"an exact Wilcoxon test cannot reach p < {SIGNIFICANCE} below {MIN_CASES}."
            )
        evidence = f"95% interval {self.low:+.4f} to {self.high:+.4f}, {self._p_text}, n = {self.n}"
        if not self.significant:
            return (
                f"No difference in {self.metric} between {self.name_a} and {self.name_b} is "
                f"shown: mean difference {self.difference:+.4f} ({evidence})."
            )
        word = "higher" if self.difference > 0 else "lower"
        return (
            f"{self.name_a} has a {word} {self.metric} than {self.name_b}, "
            f"by {abs(self.difference):.4f} on average ({evidence})."
        )

    @property
    def _p_text(self) -> str:
        adjusted = self.p_adjusted is not None
        text = format_p(self.p_adjusted if adjusted else self.p)
        text = f"p {text}" if text.startswith("<") else f"p = {text}"
        return text + (" after Holm" if adjusted else "")


def bootstrap_mean(
    values: ArrayLike, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Interval:
    """The mean of the values that are there and its 95% bootstrap interval over them.

    The interval is bias-corrected and accelerated (BCa, Efron 1987), as scores near 1 are skewed.

    Args:
        values: (N,), one a case; NaN is left out.
        samples: how many bootstrap samples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        No bounds below two values; equal bounds when all values are the same.
    """
    present = _present(values)
    if present.size == 0:
        return Interval(None, None, None, 0)
    mean = float(present.mean())
    if present.size == 1:
        return Interval(mean, None, None, 1)
    if np.ptp(present) == 0:
        return Interval(mean, mean, mean, present.size)
    result = stats.bootstrap(
        (present,),
        np.mean,
        n_resamples=samples,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), present.size)


def mean_over_seeds(values: ArrayLike) -> NDArray[np.float64]:
    """Scores (S, N) of S seeds on N cases -> (N,), averaged over the seeds that have a value."""
    table = np.asarray(values, dtype=np.float64)
    count = np.isfinite(table).sum(axis=0)
    total = np.nansum(table, axis=0)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def bootstrap_mean_over_seeds(
    values: ArrayLike, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Interval:
    """The mean over cases and seeds, with an interval over cases of the seeds' average.

    Each case is first averaged over the seeds, then cases are resampled: the runs of several
    seeds share their test cases, and counting each (seed, case) pair as independent would make
    the interval too narrow. It tells how the average of these seeds would do on other cases; the
    spread between seeds is to be shown beside it, and is not in it.

    Args:
        values: (S, N), seeds by cases, NaN where there is none.
        samples: how many bootstrap samples.
        seed: of the resampling.

    Returns:
        An interval whose `n` is the number of cases.
    """
    return bootstrap_mean(mean_over_seeds(values), samples=samples, seed=seed)


def paired_comparison(
    a: ArrayLike,
    b: ArrayLike,
    *,
    names: tuple[str, str] = ("A", "B"),
    metric: str = "dice",
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two methods case by case.

    The test is Wilcoxon's signed-rank test, two-sided, exact where scipy has it so (up to 50
    pairs; with ties or zeros up to 13); it is 1 when all differences are zero.

    Args:
        a: (N,), scores of the first method, one a case.
        b: (N,), scores of the second on the same cases in the same order. A pair with a NaN is
            left out, and the means are over the pairs that remain.
        names: what to call the two.
        metric: what the scores are.
        samples: how many bootstrap samples for the interval of the mean difference.
        seed: of the resampling.

    Raises:
        ValueError: the two differ in length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores differ in shape: {first.shape} and {second.shape}")
    paired = np.isfinite(first) & np.isfinite(second)
    first, second = first[paired], second[paired]
    difference = np.round(first - second, 12)  # rounding errors are not ranks
    interval = bootstrap_mean(difference, samples=samples, seed=seed)
    return Comparison(
        name_a=names[0],
        name_b=names[1],
        metric=metric,
        mean_a=float(first.mean()) if first.size else None,
        mean_b=float(second.mean()) if second.size else None,
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        p=wilcoxon_p(difference),
        n=interval.n,
    )


def wilcoxon_p(difference: NDArray) -> float | None:
    """The two-sided p of Wilcoxon's signed-rank test; 1 if all are zero, None if there are none."""
    if difference.size == 0:
        return None
    if not difference.any():
        return 1.0
    result = stats.wilcoxon(difference)
    return float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of the p values of one family (Holm 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[index] = running
    return adjusted


def holm_of_all_pairs(scores: ArrayLike) -> dict[tuple[int, int], float | None]:
    """Wilcoxon's p of every two methods, adjusted as one family: for pairs that are chosen by their scores.

    Args:
        scores: (k, N), methods by cases, NaN where there is none.

    Returns:
        (i, j) with i < j -> p, None for two without a case in common.
    """
    table = np.asarray(scores, dtype=np.float64)
    pairs = list(combinations(range(len(table)), 2))
    p_values = [wilcoxon_p(np.round(_present(table[i] - table[j]), 12)) for i, j in pairs]
    return dict(zip(pairs, holm(p_values), strict=True))


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one family with `p_adjusted` set by `holm`; claims follow it."""
    adjusted = holm([comparison.p for comparison in comparisons])
    return [
        replace(comparison, p_adjusted=p)
        for comparison, p in zip(comparisons, adjusted, strict=True)
    ]


def format_p(p: float | None) -> str:
    """A p value in four decimals, as tables and sentences show it; empty for None."""
    if p is None:
        return ""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _present(values: ArrayLike) -> NDArray[np.float64]:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[np.isfinite(flat)]
