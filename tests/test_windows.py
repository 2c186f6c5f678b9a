from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vclipseg.windows import advance, batched, blend_weights, slabs, window_starts


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (10, 4, 4, [0, 4, 6]),
        (10, 10, 5, [0]),
        (11, 4, 7, [0, 7]),
        (5, 4, 1, [0, 1]),
        (112, 112, 18, [0]),
        (113, 112, 18, [0, 1]),
        (150, 112, 18, [0, 18, 36, 38]),
        (88, 80, 4, [0, 4, 8]),
    ],
)
def test_window_starts(size, window, stride, expected):
    assert window_starts(size, window, stride) == expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_window_starts_follow_the_published_formula(window, room, stride):
    """ceil((S - P) / stride) + 1 windows, the last clamped to S - P."""
    size = window + room
    starts = window_starts(size, window, stride)
    assert len(starts) == math.ceil((size - window) / stride) + 1
    assert starts[0] == 0
    assert starts[-1] == size - window
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))


def test_slabs_come_as_soon_as_no_window_is_missing():
    ran = []

    def run(windows):
        ran.append(len(windows))
        return windows

    image = np.random.default_rng(0).standard_normal((2, 13, 6, 5), dtype=np.float32)
    parts = slabs(image, run, (6, 4, 5), (3, 2, 5), "gaussian", 8)
    first = next(parts)
    assert ran == [2]  # two windows across; those of the next slab have not run
    assert first.shape == (2, 3, 6, 5)
    np.testing.assert_allclose(np.concatenate([first, *parts], 1), image, rtol=1e-5)
    assert ran == [2] * 4


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_advance(steps):
    held = np.arange(8.0).reshape(2, 4)
    expected = np.concatenate([held[:, steps:], np.zeros((2, steps))], 1)
    advance(held, steps, axis=1)
    np.testing.assert_array_equal(held, expected)


def test_gaussian_weights():
    weight = blend_weights((8, 4, 6), "gaussian")
    x, y, z = np.ogrid[:8, :4, :6]
    squares = ((x - 3.5) / 1) ** 2 + ((y - 1.5) / 0.5) ** 2 + ((z - 2.5) / 0.75) ** 2
    np.testing.assert_allclose(weight, np.maximum(np.exp(-squares / 2), 1e-3), rtol=1e-5)
    assert (blend_weights((3, 2, 1), "uniform") == 1).all()


def test_batched():
    assert batched([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert batched([], 2) == []


def test_slabs_of_a_tensor_are_those_of_an_array():
    import torch

    image = np.random.default_rng(0).standard_normal((2, 13, 9, 5), dtype=np.float32)
    how = ((6, 4, 5), (3, 2, 5), "gaussian", 3)
    expected = list(slabs(image, lambda windows: windows[:, :1] ** 2, *how))
    found = slabs(
        torch.from_numpy(image), lambda w: w[:, :1] ** 2, *how, torch.from_numpy, torch.stack
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, torch.Tensor)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
