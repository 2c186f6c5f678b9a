from __future__ import annotations

import numpy as np
import pytest
import torch

from vclipseg.sampling import draw, extremes, stratified


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def strata(count, draws):
    """The rectangles of the square as lists of indices, and how often each is drawn from."""
    e = round(np.sqrt(count))
    square = np.arange(e * e).reshape(e, e)
    cuts = [0, e // 4, 2 * (e // 4), 3 * (e // 4), e]
    rectangles = [
        square[cuts[i] : cuts[i + 1], cuts[j] : cuts[j + 1]].flatten()
        for i in range(4)
        for j in range(4)
    ]
    return rectangles, (draws * e * e // count) // 16


@pytest.mark.parametrize("antithetic", [False, True], ids=["sg", "sag"])
@pytest.mark.parametrize(
    ("count", "draws"), [(5233, 256), (16, 64), (31, 256), (400, 33), (30_000, 4096)]
)
def test_each_stratum_gives_as_many(count, draws, antithetic):
    rectangles, each = strata(count, draws)
    found = stratified(count, draws, antithetic, generator()).view(16, -1).numpy()
    assert found.shape[1] == (2 * (each // 2) if antithetic else each)
    for drawn, rectangle in zip(found, rectangles, strict=True):
        assert set(drawn) <= set(rectangle)
        if antithetic:
            half = each // 2
            assert (drawn[:half] + drawn[half:] == rectangle[0] + rectangle[-1]).all()
            assert rectangle[0] + rectangle[-1] == pytest.approx(2 * rectangle.mean())


def test_numbers_of_the_published_setting():
    assert len(stratified(5233, 256, False, None)) == 16 * 15
    assert len(stratified(5233, 256, True, None)) == 16 * (7 + 7)


@pytest.mark.parametrize("sampler", ["uniform", "sg", "sag"])
@pytest.mark.parametrize("count", [1, 3, 12, 15, 16, 17, 20, 31, 1000])
@pytest.mark.parametrize("draws", [1, 7, 256])
def test_draws_are_as_many_as_asked_and_within(sampler, count, draws):
    found = draw(sampler, count, draws, generator())
    assert found.shape == (draws,)
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < count


@pytest.mark.parametrize("sampler", ["uniform", "sg", "sag"])
def test_draws_are_a_function_of_the_generator(sampler):
    first, again, other = (draw(sampler, 300, 64, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("sampler", ["uniform", "sg", "sag"])
def test_every_candidate_is_as_likely(sampler):
    """Up to what does not fit into the strata: the last of them are somewhat larger."""
    count = 144  # e = 12: sixteen squares of 3 x 3
    found = torch.cat([draw(sampler, count, 160, generator(seed)) for seed in range(400)])
    share = torch.bincount(found, minlength=count) / len(found) * count
    assert share.min() > 0.75
    assert share.max() < 1.25
    assert float(share.std()) < 0.08


def test_stratified_means_vary_less_and_antithetic_ones_least():
    values = torch.arange(10_000) / 10_000  # neighbours are alike, as along a scan

    def spread(sampler):
        return float(
            torch.stack(
                [values[draw(sampler, len(values), 320, generator(s))].mean() for s in range(300)]
            ).std()
        )

    assert 2 * spread("sag") < spread("sg")
    assert 2 * spread("sg") < spread("uniform")


def test_few_candidates_are_drawn_uniformly():
    assert torch.equal(draw("sag", 15, 40, generator()), draw("uniform", 15, 40, generator()))


@pytest.mark.parametrize("percent", [0, 3.7, 20, 50, 100])
@pytest.mark.parametrize("count", [1, 2, 101, 1000])
def test_extremes_are_beyond_the_percentiles(percent, count):
    values = np.random.default_rng(count).random(count)
    low, high = extremes(torch.from_numpy(values), percent)
    np.testing.assert_array_equal(low, values <= np.percentile(values, percent))
    np.testing.assert_array_equal(high, values >= np.percentile(values, 100 - percent))


def test_extremes_of_equal_values_and_of_none():
    for mask in extremes(torch.ones(2, 3), 20):
        assert mask.all()
        assert mask.shape == (2, 3)
    for mask in extremes(torch.ones(0, 3), 20):
        assert mask.dtype == torch.bool
        assert mask.shape == (0, 3)
