"""How to draw some of many: uniformly, stratified, or stratified and antithetic.

ARCO's samplers (You et al., NeurIPS 2023). N candidates stand in scan order; S are drawn with
replacement, k = 4:

    e = round(sqrt(N)); the indices 0 .. e^2 - 1 are an e x e square, filled row by row
    k x k rectangles of side floor(e / k), the last of a row and of a column taking what is left
    n = floor(floor(S e^2 / N) / k^2) draws from each rectangle                    "sg"
    floor(n / 2) draws j from each, and the mirror images (first + last) - j       "sag"

What lies beyond the candidates is left out, and what is missing is drawn uniformly. Both have less
variance than uniform draws where neighbours in scan order are alike: SG never leaves a stratum out, and
in SAG what one draw is above its stratum's mean its mirror image tends to be below.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Sampler = Literal["uniform", "sg", "sag"]

PARTS = 4  # k
FEWEST = 16  # candidates; fewer are drawn uniformly


def draw(
    sampler: Sampler, candidates: int, draws: int, generator: torch.Generator | None = None
) -> Tensor:
    """(draws,) indices into 0 .. candidates - 1, in random order, some perhaps more than once."""
    chosen = torch.empty(0, dtype=torch.int64)
    if sampler != "uniform" and candidates >= FEWEST:
        chosen = stratified(candidates, draws, sampler == "sag", generator)
        chosen = chosen[chosen < candidates]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    missing = max(draws - len(chosen), 0)
    rest = torch.randint(candidates, (missing,), generator=generator)
    return torch.cat([chosen, rest])[:draws]


def stratified(
    candidates: int, draws: int, antithetic: bool, generator: torch.Generator | None
) -> Tensor:
    """The same number of indices from each stratum, one stratum after another; some may be too high."""
    e = round(candidates**0.5)
    each = draws * e * e // candidates // PARTS**2
    start = torch.arange(PARTS) * (e // PARTS)
    length = torch.diff(start, append=torch.tensor([e]))
    first = torch.cartesian_prod(start, start)[:, None]  # (strata, 1, row and column)
    sides = torch.cartesian_prod(length, length)[:, None]
    shape = (PARTS**2, each // 2 if antithetic else each, 2)
    cells = first + (torch.rand(shape, generator=generator) * sides).long()
    if antithetic:
        cells = torch.cat([cells, 2 * first + sides - 1 - cells], 1)
    return (cells[..., 0] * e + cells[..., 1]).flatten()


def extremes(values: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """Masks of the lowest and of the highest `percent` of all values: up to and from the percentile.

    None of no values.
    """
    if not values.numel():
        return values.bool(), values.bool()
    flat = values.flatten()
    # order statistics hold for interpolated ones
    count = 1 + math.floor(percent / 100 * (len(flat) - 1))
    # kthvalue has one block of a GPU search all values; topk spreads them
    low = flat.topk(count, largest=False, sorted=False).values.amax()
    high = flat.topk(count, sorted=False).values.amin()
    return values <= low, values >= high
