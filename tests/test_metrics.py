from __future__ import annotations

import numpy as np
import pytest
import torch
from medpy.metric import binary as medpy
from monai.metrics.surface_dice import compute_surface_dice

from vclipseg import metrics


def box(shape, start, stop):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def voxel(*index, shape=(9, 9, 9)):
    mask = np.zeros(shape, dtype=bool)
    mask[index] = True
    return mask


def blobs(seed, shape=(24, 20, 16)):
    """Two overlapping ellipsoids with ragged edges."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    masks = []
    for _ in range(2):
        center = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        radii = rng.uniform(4, 8, 3)
        distance = np.linalg.norm((grid - center) / radii, axis=-1)
        masks.append(distance + rng.normal(0, 0.08, shape) < 1)
    return masks


EMPTY = np.zeros((9, 9, 9), dtype=bool)
FULL = np.ones((4, 4, 4), dtype=bool)


@pytest.mark.parametrize(
    ("reference", "prediction", "dice", "jaccard"),
    [
        (voxel(4, 4, 4), voxel(4, 4, 4), 1, 1),
        (voxel(4, 4, 4), voxel(4, 4, 5), 0, 0),
        # 2x2x2 and 2x2x4 share 8 voxels: 2*8 / (8+16), 8/16
        (box((9, 9, 9), (1, 1, 1), (3, 3, 3)), box((9, 9, 9), (1, 1, 1), (3, 3, 5)), 2 / 3, 1 / 2),
        (FULL, FULL, 1, 1),
        (voxel(4, 4, 4), EMPTY, 0, 0),
        (EMPTY, voxel(4, 4, 4), 0, 0),
        (EMPTY, EMPTY, np.nan, np.nan),
    ],
)
def test_overlap(reference, prediction, dice, jaccard):
    assert metrics.dice(reference, prediction) == pytest.approx(dice, nan_ok=True)
    assert metrics.jaccard(reference, prediction) == pytest.approx(jaccard, nan_ok=True)


@pytest.mark.parametrize(
    ("reference", "prediction", "spacing", "distance"),
    [
        (voxel(1, 4, 4), voxel(5, 4, 4), (1, 1, 1), 4),
        (voxel(1, 4, 4), voxel(5, 4, 4), (0.5, 1, 3), 2),
        (voxel(4, 4, 1), voxel(4, 4, 5), (0.5, 1, 3), 12),
        (voxel(0, 0, 0), voxel(3, 4, 0), (1, 1, 1), 5),
        (voxel(0, 0, 0), voxel(3, 4, 0), (2, 2, 9), 10),
        (FULL, FULL, (1, 2, 3), 0),
    ],
)
def test_distances_of_single_voxels_are_exact(reference, prediction, spacing, distance):
    assert metrics.hd95(reference, prediction, spacing) == pytest.approx(distance)
    assert metrics.hd95_mm(reference, prediction, spacing) == pytest.approx(distance)
    assert metrics.assd_mm(reference, prediction, spacing) == pytest.approx(distance)
    assert metrics.asd(
        prediction=prediction, reference=reference, spacing=spacing
    ) == pytest.approx(distance)


def test_two_plates_at_a_known_distance():
    near, far = box((9, 9, 9), (0, 0, 1), (9, 9, 2)), box((9, 9, 9), (0, 0, 6), (9, 9, 7))
    assert metrics.hd95(near, far) == 5
    assert metrics.assd_mm(near, far, (1, 1, 0.5)) == 2.5


def test_asd_is_one_directional_and_assd_is_pooled():
    # the reference is two voxels 8 apart, the prediction only the first of them
    reference, prediction = voxel(0, 4, 4) | voxel(8, 4, 4), voxel(0, 4, 4)
    assert metrics.asd(prediction=prediction, reference=reference) == 0
    assert metrics.asd(prediction=reference, reference=prediction) == 4
    # distances: one of 0 from the prediction; 0 and 8 from the reference
    assert metrics.assd_mm(reference, prediction, (1, 1, 1)) == pytest.approx(8 / 3)


def test_hd95_pools_both_directions():
    reference, prediction = voxel(0, 4, 4) | voxel(8, 4, 4), voxel(0, 4, 4)
    assert metrics.hd95(reference, prediction) == pytest.approx(np.percentile([0, 0, 8], 95))


@pytest.mark.parametrize("seed", range(6))
def test_voxel_metrics_are_medpys(seed):
    reference, prediction = blobs(seed)
    scores = metrics.score(reference, prediction, (0.7, 0.7, 2.0))
    assert scores["dice"] == pytest.approx(medpy.dc(prediction, reference))
    assert scores["jaccard"] == pytest.approx(medpy.jc(prediction, reference))
    assert scores["hd95_voxel"] == pytest.approx(medpy.hd95(prediction, reference))
    assert scores["asd_voxel"] == pytest.approx(medpy.asd(prediction, reference))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.625, 0.625, 0.625), (0.7, 0.8, 2.5)])
def test_mm_metrics_match_medpy_and_brute_force(seed, spacing):
    reference, prediction = blobs(seed)
    scores = metrics.score(reference, prediction, spacing)
    assert scores["hd95_mm"] == pytest.approx(medpy.hd95(prediction, reference, spacing))
    to_reference, to_prediction = brute_force(reference, prediction, spacing)
    pooled = np.concatenate([to_reference, to_prediction])
    assert scores["assd_mm"] == pytest.approx(pooled.mean())
    assert metrics.asd(
        prediction=prediction, reference=reference, spacing=spacing
    ) == pytest.approx(to_reference.mean())


def brute_force(reference, prediction, spacing):
    """All pairs of surface voxels; a surface voxel has a face neighbor outside the mask."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inside = np.ones_like(mask)
        for axis in range(3):
            for step in (-1, 1):
                inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inside) * np.array(spacing)

    points, others = surface(prediction), surface(reference)
    pairs = np.linalg.norm(points[:, None] - others[None], axis=-1)
    return pairs.min(axis=1), pairs.min(axis=0)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # the oracle's imports
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.8, 2.5)])
@pytest.mark.parametrize("tolerance_mm", [0.5, 1.0, 2.0])
def test_nsd_is_deepminds(seed, spacing, tolerance_mm):
    surface_distance = pytest.importorskip("surface_distance")
    reference, prediction = blobs(seed)
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
    expected = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)
    assert metrics.nsd(reference, prediction, spacing, tolerance_mm) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_nsd_is_monais(seed):
    masks = blobs(seed)
    expected = compute_surface_dice(
        *(torch.from_numpy(mask)[None, None] for mask in masks),
        class_thresholds=[1.0],
        include_background=True,
        spacing=[0.7, 0.8, 2.5],
        use_subvoxels=True,
    )
    assert metrics.nsd(*masks, (0.7, 0.8, 2.5), 1.0) == pytest.approx(float(expected))


def test_nsd_tolerance_includes_itself():
    """2.8 - 0.8 is a little more than 2 for a computer."""
    shape = (20, 6, 6)
    reference, prediction = box(shape, (2, 0, 0), (18, 6, 6)), box(shape, (7, 0, 0), (18, 6, 6))
    spacing = (0.4, 9, 9)
    assert metrics.nsd(reference, prediction, spacing, 2.0) == pytest.approx(1)
    assert metrics.nsd(reference, prediction, spacing, 1.9) < 1


def test_nsd_counts_what_is_within_the_tolerance():
    shape = (12, 12, 12)
    reference, prediction = box(shape, (3, 3, 3), (9, 9, 9)), box(shape, (4, 3, 3), (10, 9, 9))
    assert metrics.nsd(reference, prediction, (1, 1, 1), 1.0) == pytest.approx(1)
    assert metrics.nsd(reference, prediction, (4, 1, 1), 1.0) < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_metrics_do_not_depend_on_the_empty_space_around(seed):
    reference, prediction = blobs(seed)
    padding = ((5, 0), (3, 7), (11, 2))
    wider = metrics.score(np.pad(reference, padding), np.pad(prediction, padding), (1, 2, 3))
    assert wider == pytest.approx(metrics.score(reference, prediction, (1, 2, 3)), abs=1e-6)


def test_a_mask_that_touches_the_border_has_its_surface_there():
    reference = box((6, 6, 6), (0, 0, 0), (6, 6, 3))
    prediction = box((6, 6, 6), (0, 0, 0), (6, 6, 5))
    scores = metrics.score(reference, prediction, (1, 1, 1))
    assert scores["hd95_voxel"] == pytest.approx(medpy.hd95(prediction, reference))
    assert scores["asd_voxel"] == pytest.approx(medpy.asd(prediction, reference))


@pytest.mark.parametrize(
    ("reference", "prediction", "overlap", "failure"),
    [
        (voxel(4, 4, 4), EMPTY, 0, 1),
        (EMPTY, voxel(4, 4, 4), 0, 0),
        (EMPTY, EMPTY, np.nan, 0),
    ],
)
def test_empty_masks(reference, prediction, overlap, failure):
    scores = metrics.score(reference, prediction, (1, 1, 2))
    for name in ("dice", "jaccard", "nsd"):
        assert scores[name] == pytest.approx(overlap, nan_ok=True)
    assert all(np.isnan(scores[name]) for name in metrics.DISTANCES)
    assert scores["failure"] == failure
    assert scores["reference_ml"] == pytest.approx(reference.sum() * 0.002)
    assert metrics.nsd(reference, prediction, (1, 1, 2), 1.0) == pytest.approx(overlap, nan_ok=True)
    assert np.isnan(metrics.hd95(reference, prediction))
    assert np.isnan(metrics.asd(prediction=prediction, reference=reference))
    assert np.isnan(metrics.assd_mm(reference, prediction, (1, 1, 1)))


def test_score_has_every_metric_and_the_volumes():
    reference, prediction = box((9, 9, 9), (0, 0, 0), (5, 5, 4)), box((9, 9, 9), (0,) * 3, (5,) * 3)
    scores = metrics.score(reference, prediction, (2, 2, 2.5))
    assert set(scores) == {*metrics.METRICS, "reference_ml", "prediction_ml", "failure"}
    assert scores["reference_ml"] == pytest.approx(1.0)
    assert scores["prediction_ml"] == pytest.approx(1.25)


def test_score_is_the_single_functions():
    reference, prediction, spacing = *blobs(1), (0.7, 0.8, 2.5)
    scores = metrics.score(reference, prediction, spacing, nsd_tolerance_mm=1.5)
    assert scores["dice"] == metrics.dice(reference, prediction)
    assert scores["jaccard"] == metrics.jaccard(reference, prediction)
    assert scores["hd95_voxel"] == metrics.hd95(reference, prediction)
    assert scores["asd_voxel"] == metrics.asd(prediction=prediction, reference=reference)
    assert scores["hd95_mm"] == metrics.hd95_mm(reference, prediction, spacing)
    assert scores["assd_mm"] == metrics.assd_mm(reference, prediction, spacing)
    assert scores["nsd"] == metrics.nsd(reference, prediction, spacing, 1.5)


def test_largest_component_keeps_one_piece():
    large, small = box((9, 9, 9), (0, 0, 0), (3, 3, 3)), voxel(8, 8, 8)
    np.testing.assert_array_equal(metrics.largest_component(large | small), large)


def test_largest_component_joins_over_corners():
    diagonal = voxel(1, 1, 1) | voxel(2, 2, 2) | voxel(3, 3, 3)
    alone = voxel(7, 7, 7) | voxel(7, 7, 8)
    np.testing.assert_array_equal(metrics.largest_component(diagonal | alone), diagonal)


def test_largest_component_treats_each_class_by_itself():
    labels = np.zeros((9, 9, 9), dtype=np.uint8)
    labels[0:3, 0:3, 0:3] = 1
    labels[3, 0:2, 0] = 2
    labels[8, 8, 8] = 1
    expected = labels.copy()
    expected[8, 8, 8] = 0
    result = metrics.largest_component(labels)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8


@pytest.mark.parametrize("mask", [EMPTY, EMPTY.astype(np.uint8), voxel(1, 2, 3)])
def test_largest_component_of_nothing_or_one_piece_is_the_mask(mask):
    np.testing.assert_array_equal(metrics.largest_component(mask), mask)
