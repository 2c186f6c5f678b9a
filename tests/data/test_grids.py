"""Distances between grids in mm, and labels moved between them, for affines of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import affines, shapes

from vclipseg.data.grids import (
    fit_labels,
    has_geometry,
    header_of,
    orientation,
    overhang,
    same_grid,
    turned,
)
from vclipseg.data.volume import Header, Volume, corner_shift, reorient

AXES = ("RAS", "LPS", "SLA", "PIR")
BOX = (10, 8, 6)


def _header(affine: np.ndarray, shape: tuple[int, int, int] = BOX) -> Header:
    return Header(shape, 1, affine)


def _shifted(affine: np.ndarray, *voxels: float) -> np.ndarray:
    change = np.eye(4)
    change[:3, 3] = voxels
    return affine @ change


@pytest.mark.parametrize(
    ("voxels", "mm", "largest"),
    [((0, 0, 0), 0, 0), ((1, 0, 0), 0.5, 1), ((0, 0, -2), 6, 2), ((3, 4, 0), 4.2720, 4)],
)
def test_shift_in_mm_and_voxels(voxels: tuple[int, ...], mm: float, largest: float) -> None:
    affine = np.diag([0.5, 1.0, 3.0, 1.0])
    found = corner_shift(_header(affine), _header(_shifted(affine, *voxels)))
    np.testing.assert_allclose(found, (mm, largest), atol=1e-4)


def test_a_rotation_moves_the_far_corner_most() -> None:
    """Doubling the spacing from -0.5 voxels on moves the far corner by the box's diagonal."""
    double = np.diag([2.0, 2.0, 2.0, 1.0])
    double[:3, 3] = 0.5
    mm, voxels = corner_shift(_header(np.eye(4)), _header(double))
    np.testing.assert_allclose((mm, voxels), (np.linalg.norm(BOX), 10))


@pytest.mark.parametrize(("cut", "mm"), [(0, 0.0), (1, 3.0), (2, 6.0)])
def test_overhang_in_mm(cut: int, mm: float) -> None:
    affine = np.diag([0.5, 1.0, 3.0, 1.0])
    assert overhang(_header(affine), _header(affine, (10, 8, 6 - cut))) == pytest.approx(mm)
    assert overhang(_header(affine, (10, 8, 6 - cut)), _header(affine)) == 0


def test_a_coarser_grid_that_reaches_the_last_centers_covers() -> None:
    coarse = _header(np.diag([2.0, 2.0, 2.0, 1.0]), (5, 4, 3))
    assert overhang(_header(np.eye(4)), coarse) == 0


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (np.eye(4), False),
        (np.diag([-1.0, -1, 1, 1]), False),
        (_shifted(np.diag([-1.0, 1, 1, 1]), -4.5, -3.5, -2.5), False),
        (_shifted(np.eye(4), 1, 1, 1), True),
        (np.diag([0.625, 0.625, 0.625, 1]), True),
        (np.eye(4)[[1, 0, 2, 3]], True),
    ],
)
def test_default_affines_say_nothing(affine: np.ndarray, says: bool) -> None:
    assert has_geometry(_header(affine)) == says


@settings(max_examples=40, deadline=None)
@given(affine=affines(), shape=shapes, axes=st.sampled_from(AXES))
def test_turning_a_header_is_turning_its_volume(affine, shape, axes) -> None:
    volume = Volume(np.zeros(shape, np.uint8), affine)
    assert same_grid(turned(header_of(volume), axes), header_of(reorient(volume, axes)))


@settings(max_examples=40, deadline=None)
@given(affine=affines(), shape=shapes, axes=st.sampled_from(AXES), pad=st.integers(0, 3))
def test_labels_come_back_from_any_grid_that_holds_them(affine, shape, axes, pad) -> None:
    """Padded and turned labels, put on the image's grid, are what they were."""
    labels = np.random.default_rng(0).integers(0, 4, size=shape).astype(np.uint8)
    moved = reorient(Volume(np.pad(labels, pad), _shifted(affine, -pad, -pad, -pad)), axes)
    image = Header(labels.shape, 1, affine)
    fitted = fit_labels(moved, image)
    np.testing.assert_array_equal(fitted.array, labels)
    assert same_grid(image, header_of(fitted))
    assert fitted.array.dtype == labels.dtype


@pytest.mark.parametrize("spacing", [0.4, 0.9, 2.0])
def test_resampling_takes_the_value_of_the_nearest_voxel(spacing: float) -> None:
    """Against a loop, on a grid that reaches over the edge by less than half a voxel."""
    labels = np.random.default_rng(0).choice([0, 7], size=(26, 21, 16)).astype(np.uint8)
    stored = Volume(labels, np.diag([spacing] * 3 + [1.0]))
    image = _header(_shifted(np.eye(4), -0.19, 0.11, 0.03), (5, 5, 4))
    fitted = fit_labels(stored, image)
    for index in np.ndindex(image.shape):
        world = image.affine @ (*index, 1)
        nearest = np.clip(np.rint(world[:3] / spacing).astype(int), 0, None)
        assert fitted.array[index] == labels[tuple(nearest)]


def test_labels_reach_to_the_edge_of_their_last_voxel() -> None:
    """A center on the outer edge takes the value of the voxel that it bounds."""
    stored = Volume(np.full((5, 4, 3), 3, np.uint8), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert (fit_labels(stored, _header(np.eye(4))).array == 3).all()


@settings(max_examples=20, deadline=None)
@given(affine=affines(shear=False), off=st.floats(-0.9, 0.9))
def test_rounded_headers_are_taken_over_from_the_image(affine, off) -> None:
    labels = np.random.default_rng(0).integers(0, 4, size=BOX).astype(np.uint8)
    image = _header(affine)
    moved = Volume(labels, _shifted(affine, off, 0, -off / 2))
    if orientation(image) == orientation(header_of(moved)):
        fitted = fit_labels(moved, image)
        np.testing.assert_array_equal(fitted.array, labels)
        np.testing.assert_array_equal(fitted.affine, affine)
