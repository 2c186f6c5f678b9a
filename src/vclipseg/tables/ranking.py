"""Several methods on the same cases: mean ranks, Friedman's test and Nemenyi's critical difference.

    CD = q * sqrt(k (k + 1) / (6 N))

for k methods on N cases, q the Studentized range at 0.95 for k groups over sqrt(2) (Demsar, JMLR 7:1-30,
2006). Methods whose mean ranks lie within CD of each other cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from vclipseg.statistics import CONFIDENCE, MIN_CASES

LISTED = 5
"""Names in a sentence; of more the others are counted."""


@dataclass(frozen=True)
class Ranking:
    """Methods from the best mean rank to the worst.

    Attributes:
        names: of the methods.
        ranks: their mean ranks over the cases, 1 is best.
        critical_difference: of two mean ranks.
        p: of Friedman's test that all methods are alike.
        n: cases.
        runs: of each method, over which its score of a case is averaged.
    """

    names: tuple[str, ...]
    ranks: tuple[float, ...]
    critical_difference: float
    p: float
    n: int
    runs: int = 1

    @property
    def cliques(self) -> list[tuple[int, int]]:
        """First and last position of each largest run of methods that cannot be told apart."""
        found: list[tuple[int, int]] = []
        for first, rank in enumerate(self.ranks):
            last = max(i for i, other in enumerate(self.ranks) if other - rank <= self._reach)
            if last > max(first, found[-1][1] if found else 0):
                found.append((first, last))
        return found

    @property
    def _reach(self) -> float:
        return self.critical_difference + 1e-9

    @property
    def claim(self) -> str:
        """What may be said, as one plain sentence."""
        first, *others = self.ranks
        tied = [n for n, r in zip(self.names[1:], others, strict=True) if r - first <= self._reach]
        start = (
            f"Mean ranks of {len(self.names)} methods over {self.n} cases, {spell_runs(self.runs)} each "
            f"(Friedman p {_spell_p(self.p)}, critical difference {self.critical_difference:.2f}): "
        )
        if self.p >= 1 - CONFIDENCE:
            return start + "no difference between them is shown."
        if not tied:
            return start + f"{self.names[0]} is ahead of all others."
        return start + f"{self.names[0]} is first, not to be told apart from {_listed(tied)}."


def rank_methods(names: Sequence[str], scores: ArrayLike, runs: int = 1) -> Ranking | None:
    """Rank methods case by case, the highest score first, ties sharing their mean rank.

    Args:
        names: k methods.
        scores: (k, N), higher is better; cases that a method lacks (NaN) are left out.
        runs: of each method, over which its scores are averaged.

    Returns:
        None below three methods or six cases, where there is nothing to say.
    """
    table = np.asarray(scores, dtype=np.float64)
    table = np.round(table[:, np.isfinite(table).all(axis=0)], 12)
    if len(table) < 3 or table.shape[1] < MIN_CASES:
        return None
    ranks = mean_ranks(table)
    order = np.argsort(ranks, kind="stable")
    different = (table != table[0]).any()
    p = float(stats.friedmanchisquare(*table).pvalue) if different else 1.0
    return Ranking(
        names=tuple(names[i] for i in order),
        ranks=tuple(float(ranks[i]) for i in order),
        critical_difference=critical_difference(*table.shape),
        p=p,
        n=table.shape[1],
        runs=runs,
    )


def mean_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(k, N) scores -> (k,) mean ranks over the cases; the highest score of a case has rank 1."""
    return stats.rankdata(-scores, axis=0).mean(axis=1)


def critical_difference(methods: int, cases: int) -> float:
    """How far two mean ranks must be apart to differ, at 95%, after Nemenyi."""
    q = stats.studentized_range.ppf(CONFIDENCE, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * cases)))


def spell_runs(runs: int) -> str:
    """How many, in words of a sentence."""
    return f"{runs} run{'s' if runs != 1 else ''}"


def _spell_p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > LISTED:
        names = [*names[: LISTED - 1], f"{len(names) - LISTED + 1} others"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
