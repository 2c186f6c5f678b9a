"""The label-budget curve: Dice against the number of labeled cases, and the labels that a method saves.

`labels saved` at n labels is how many more the supervised baseline would need for the same Dice: its
curve is read backwards, straight between measured budgets on a logarithmic axis, and never beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vclipseg.statistics import BOOTSTRAP_SAMPLES, CONFIDENCE, Interval

TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Curve:
    """A method's mean Dice, with its interval, at each number of labeled cases, ascending."""

    name: str
    labeled: tuple[int, ...]
    dice: tuple[Interval, ...]
    baseline: bool = False


@dataclass(frozen=True)
class Saved:
    """Labels that a method saves at one budget.

    Attributes:
        name: of the method.
        labeled: the labels it has.
        dice: its mean Dice.
        needed: labels with which the baseline gets there; inf if not with its largest budget, -inf if it is
            further with its smallest.
        low: the lower end of the 95% interval of `saved`, over cases; -inf as of `needed`.
        high: the upper end; inf if beyond the baseline's largest budget.
        least: the baseline's smallest budget.
        most: its largest.
    """

    name: str
    labeled: int
    dice: float
    needed: float
    low: float
    high: float
    least: int
    most: int

    @property
    def saved(self) -> float:
        """`needed` minus `labeled`."""
        return self.needed - self.labeled


def labels_needed(budgets: Sequence[int], dice: Sequence[float], target: float) -> float:
    """With how many labels a curve reaches a target, on straight lines over log(labels).

    Where the curve falls, its best value so far counts: more labels do not take away what fewer gave.

    Args:
        budgets: ascending numbers of labels.
        dice: the scores there.
        target: the score asked for.

    Returns:
        -inf if the smallest budget scores higher already; inf if the largest is not enough.
    """
    best = np.maximum.accumulate(np.asarray(dice, dtype=np.float64))
    if target <= best[0]:
        return float(budgets[0]) if target == best[0] else -math.inf
    for i in range(1, len(budgets)):
        if target <= best[i]:
            share = (target - best[i - 1]) / (best[i] - best[i - 1])
            low, high = math.log(budgets[i - 1]), math.log(budgets[i])
            return math.exp(low + share * (high - low))
    return math.inf


def labels_saved(
    name: str,
    labeled: int,
    scores: ArrayLike,
    baseline: Mapping[int, ArrayLike],
    *,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Saved:
    """How many labels a method saves, with a bootstrap interval over the cases that all share.

    Args:
        name: of the method.
        labeled: its labels.
        scores: (N,), one a case.
        baseline: number of labels -> (N,) of the supervised baseline, same cases in the same order.
        samples: how many times the cases are resampled.
        seed: of the resampling.
    """
    budgets = sorted(baseline)
    table = np.stack([np.asarray(scores), *(np.asarray(baseline[n]) for n in budgets)])
    table = table[:, np.isfinite(table).all(axis=0)]  # (1 + budgets, N)
    means = table.mean(axis=1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(table.shape[1], size=(samples, table.shape[1]))
    found = np.array([_needed(budgets, table[:, draw].mean(axis=1)) for draw in draws])
    low, high = _quantiles(found)
    return Saved(
        name=name,
        labeled=labeled,
        dice=float(means[0]),
        needed=_needed(budgets, means),
        low=low - labeled,
        high=high - labeled,
        least=budgets[0],
        most=budgets[-1],
    )


def _needed(budgets: Sequence[int], means: NDArray[np.float64]) -> float:
    return labels_needed(budgets, means[1:].tolist(), float(means[0]))


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile, of values that may be infinite."""
    ordered = np.sort(values)
    last = len(ordered) - 1
    return float(ordered[round(TAIL * last)]), float(ordered[round((1 - TAIL) * last)])
