"""Masks to polygons and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path

from vclipseg.data.contours import filled, outlines

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.booleans())


def area(polygon) -> float:
    x, y = polygon.T
    return 0.5 * float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_a_mask_comes_back(mask):
    polygons = outlines(mask)
    assert np.array_equal(filled(polygons, mask.shape), mask)
    assert sum(map(area, polygons)) == pytest.approx(mask.sum())
    assert all(area(polygon) > 0 for polygon in polygons)


@settings(max_examples=30, deadline=None)
@given(mask=masks)
def test_each_polygon_is_whole_by_itself(mask):
    """Readers that fill a contour at a time, by the nonzero rule, see the same: holes are in keyholes."""
    centers = np.argwhere(np.ones_like(mask)) + np.array([0.013, 0.007])
    union = np.zeros_like(mask)
    for polygon in outlines(mask):
        inside = Path(np.vstack([polygon, polygon[:1]])).contains_points(centers)
        assert not (union & inside.reshape(mask.shape)).any()
        union |= inside.reshape(mask.shape)
    assert np.array_equal(union, mask)


def test_a_polygon_runs_along_the_edges_of_pixels():
    mask = np.zeros((5, 4), bool)
    mask[1:4, 1:3] = True
    (polygon,) = outlines(mask)
    assert {*map(tuple, polygon.tolist())} == {(0.5, 0.5), (3.5, 0.5), (3.5, 2.5), (0.5, 2.5)}


def test_holes_are_joined_by_keyholes():
    mask = np.zeros((9, 7), bool)
    mask[1:8, 1:6] = True
    mask[3, 3] = mask[5, 3] = False
    (polygon,) = outlines(mask)
    assert area(polygon) == 33
    assert len(polygon) == 4 + 2 + 4 + 4  # a bridge to the rim, and one from hole to hole


def test_pixels_that_touch_at_a_corner_are_apart():
    assert len(outlines(np.eye(3, dtype=bool))) == 3


def test_a_center_on_a_contour_is_inside():
    """Other software draws through the outermost pixels, round holes too."""
    outer = np.array([[1, 1], [5, 1], [5, 5], [1, 5]], float)
    hole = np.array([[2, 2], [4, 2], [4, 4], [2, 4]], float)
    expected = np.zeros((7, 7), bool)
    expected[1:6, 1:6] = True
    expected[3, 3] = False
    for turned in (hole, hole[::-1]):
        assert np.array_equal(filled([outer + 0.004, turned - 0.004], (7, 7)), expected)


def test_smooth_contours_and_what_is_beyond_the_image():
    turns = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=1) * 20.3 + (3.2, 24.6)
    x, y = np.indices((40, 48))
    radius = np.hypot(x - 3.2, y - 24.6)
    found = filled([circle], (40, 48))
    sure = np.abs(radius - 20.3) > 0.05
    assert np.array_equal(found[sure], (radius < 20.3)[sure])
    assert not filled([circle + 100], (40, 48)).any()
    assert not filled([], (40, 48)).any()
