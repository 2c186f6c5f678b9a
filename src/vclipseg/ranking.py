"""Which case to annotate next: strategies as pure functions of what a model says of each case.

A strategy puts candidates in order, the first to annotate first. It never sees labels.

- `uncertain`: where the opinions of a model differ most (or it finds nothing).
- `novel`: greedy k-center in the encoder's features: the case farthest from all labeled and all chosen
  before (Sener & Savarese, ICLR 2018, arXiv:1708.00489).
- `class_rare`: the mean of -log r_k over what the case shows, r_k the share of class k in what the labeled
  cases show.
- `combined`: the mean of the places in the three.
- `random`, `first`: to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vclipseg.errors import UsageError


@dataclass(frozen=True)
class Signals:
    """What a model says of a case.

    Attributes:
        uncertainty: in [0, 1].
        class_shares: share of the volume for each class but the background, (K - 1,).
        features: a description of the image, (F,).
    """

    case_id: str
    uncertainty: float
    class_shares: tuple[float, ...]
    features: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """A candidate in its place.

    Attributes:
        score: what put it there; higher comes first. Comparable within one strategy only.
        reasons: for which of "uncertain", "novel" and "class-rare" it is in the first third.
    """

    case_id: str
    score: float
    reasons: tuple[str, ...]


Scores = np.ndarray  # (N,), a number a candidate, the highest first


def rank(
    strategy: str, candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int = 0
) -> list[Choice]:
    """Candidates, the first to annotate first; equals keep their order.

    Args:
        strategy: one of `STRATEGIES`.
        candidates: cases that nobody annotated.
        labeled: cases that somebody did.
        seed: of `random`.

    Raises:
        UsageError: there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    if not candidates:
        return []
    scores = STRATEGIES[strategy](candidates, labeled, seed)
    firsts = {
        reason: _first_third(score(candidates, labeled, seed))
        for reason, score in (
            ("uncertain", uncertain),
            ("novel", novel),
            ("class-rare", class_rare),
        )
    }
    return [
        Choice(
            candidates[i].case_id,
            float(scores[i]),
            tuple(reason for reason, first in firsts.items() if i in first),
        )
        for i in np.argsort(-scores, kind="stable")
    ]


def uncertain(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """The uncertainty of each."""
    return np.array([c.uncertainty for c in candidates])


def novel(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """Distance, when its turn comes, to the nearest case that is labeled or chosen before."""
    features = _standardized([*candidates, *labeled])
    own, others = features[: len(candidates)], features[len(candidates) :]
    if not len(others):  # begin with the most usual one
        others = own.mean(0, keepdims=True)
    nearest = np.linalg.norm(own[:, None] - others[None], axis=2).min(1)  # (N,)
    scores, left = np.zeros(len(own)), set(range(len(own)))
    ceiling = np.inf
    while left:
        chosen = max(left, key=lambda i: (nearest[i], -i))
        ceiling = scores[chosen] = min(ceiling, nearest[chosen])
        nearest = np.minimum(nearest, np.linalg.norm(own - own[chosen], axis=1))
        left.remove(chosen)
    return scores


def class_rare(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """How rare, among the labeled, the classes are that each shows; 0 for what shows none."""
    known = [_composition(case) for case in (labeled or candidates)]
    shown = [c for c in known if c.sum()]
    usual = np.mean(shown, axis=0) if shown else np.ones(len(candidates[0].class_shares))
    surprise = -np.log(np.maximum(usual / max(usual.sum(), 1e-12), 1e-3))
    return np.array([float(_composition(case) @ surprise) for case in candidates])


def combined(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """The mean of the places of the three, 1 for the first and 0 for the last."""
    parts = [score(candidates, labeled, seed) for score in (uncertain, novel, class_rare)]
    return np.mean([_places(part) for part in parts], axis=0)


def at_random(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """Any order, by seed."""
    return np.random.default_rng(seed).permutation(len(candidates)).astype(float)


def in_order(candidates: Sequence[Signals], labeled: Sequence[Signals], seed: int) -> Scores:
    """As they are listed."""
    return -np.arange(len(candidates), dtype=float)


STRATEGIES: dict[str, Callable[[Sequence[Signals], Sequence[Signals], int], Scores]] = {
    "combined": combined,
    "uncertain": uncertain,
    "novel": novel,
    "class_rare": class_rare,
    "random": at_random,
    "first": in_order,
}


def _standardized(cases: Sequence[Signals]) -> np.ndarray:
    """Features (N, F) with mean 0 and deviation 1; those that never change are 0."""
    features = np.array([case.features for case in cases], dtype=float).reshape(len(cases), -1)
    deviation = features.std(0)
    return (features - features.mean(0)) / np.where(deviation > 1e-12, deviation, np.inf)


def _composition(case: Signals) -> np.ndarray:
    """Shares of the classes in the foreground, (K - 1,); 0 if there is none."""
    shares = np.array(case.class_shares)
    return shares / shares.sum() if shares.sum() else shares


def _places(scores: Scores) -> Scores:
    """1 for the highest to 0 for the lowest; equals share the mean of their places."""
    if len(scores) == 1:
        return np.ones(1)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return (below + (counts - 1) / 2)[inverse] / (len(scores) - 1)


def _first_third(scores: Scores) -> set[int]:
    """Candidates among the first third, if the strategy tells any apart."""
    if np.ptp(scores) < 1e-9:
        return set()
    third = math.ceil(len(scores) / 3)
    return set(np.argsort(-scores, kind="stable")[:third].tolist())
