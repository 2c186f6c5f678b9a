"""How well a predicted mask agrees with a reference mask, in voxels and in millimetres.

Masks are arrays (X, Y, Z) of one class, true inside; a spacing is in mm along the same axes.
A surface is the set of voxels a binary erosion with connectivity 1 removes, and a surface distance
runs from a voxel center of one surface to the nearest of the other. What an empty mask scores:

| reference | prediction | dice, jaccard, nsd | distances | failure |
|---|---|---|---|---|
| present | present | 0 to 1 | measured | 0 |
| present | empty | 0 | NaN: undefined, left out of means | 1 |
| absent | predicted | 0: a false alarm counts | NaN | 0 |
| absent | empty | NaN: nothing to judge, left out | NaN | 0 |

`METRICS` names what `score` measures. The literature's figures are `hd95_voxel` and `asd_voxel`
(no spacing, and the second from the prediction's surface only); the others ending in `_mm` use
the spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vclipseg.nearest import Points, dilate, nearest

Mask = NDArray[np.bool_]
Spacing = Sequence[float]

DISTANCES: tuple[str, ...] = ("hd95_voxel", "asd_voxel", "hd95_mm", "assd_mm")
METRICS: tuple[str, ...] = ("dice", "jaccard", *DISTANCES, "nsd")

VOXELS = (1.0, 1.0, 1.0)
CORNERS = ndimage.generate_binary_structure(3, 3)  # and all 26 neighbors


def dice(reference: Mask, prediction: Mask) -> float:
    """Twice the shared volume over the sum of both, in [0, 1]; NaN when both are empty."""
    both = np.count_nonzero(reference & prediction)
    total = np.count_nonzero(reference) + np.count_nonzero(prediction)
    return float(2 * both / total) if total else np.nan


def jaccard(reference: Mask, prediction: Mask) -> float:
    """The shared volume over the joint volume, in [0, 1]; NaN when both are empty."""
    both = np.count_nonzero(reference & prediction)
    union = np.count_nonzero(reference | prediction)
    return float(both / union) if union else np.nan


def hd95(reference: Mask, prediction: Mask, spacing: Spacing = VOXELS) -> float:
    """The 95th percentile of the surface distances of both directions, pooled.

    Args:
        reference: (X, Y, Z).
        prediction: (X, Y, Z).
        spacing: voxel size in mm; left out, the distance is in voxels as the literature has it.

    Returns:
        A length in the unit of `spacing`; NaN when either mask is empty.
    """
    return _hd95(*surface_distances(reference, prediction, spacing))


def hd95_mm(reference: Mask, prediction: Mask, spacing: Spacing) -> float:
    """`hd95` in mm."""
    return hd95(reference, prediction, spacing)


def asd(*, prediction: Mask, reference: Mask, spacing: Spacing = VOXELS) -> float:
    """The mean distance from the prediction's surface to the reference's: one direction only.

    A prediction that is a small part of the reference scores well. It is here because published
    tables use it; prefer `assd_mm`. The order of the masks matters, so they are passed by name.

    Returns:
        A length in the unit of `spacing` (voxels when left out); NaN when either mask is empty.
    """
    return _mean(surface_distances(reference, prediction, spacing)[0])


def assd_mm(reference: Mask, prediction: Mask, spacing: Spacing) -> float:
    """The average symmetric surface distance in mm; NaN when either mask is empty.

    The mean over the distances of both directions pooled, so that every surface voxel weighs the
    same; not the mean of the two directional means (which is what MedPy calls `assd`).
    """
    return _mean(np.concatenate(surface_distances(reference, prediction, spacing)))


def nsd(reference: Mask, prediction: Mask, spacing: Spacing, tolerance_mm: float) -> float:
    """The normalized surface Dice: the share of both surfaces' area within a tolerance.

    Areas are those of surface elements between voxels (Nikolov et al. 2018, arXiv:1809.04430), as
    in DeepMind's surface-distance and in MONAI with `use_subvoxels=True`; the table of areas is
    MONAI's.

    Args:
        reference: (X, Y, Z).
        prediction: (X, Y, Z).
        spacing: voxel size in mm.
        tolerance_mm: how far apart in mm two surfaces may be and still agree.

    Returns:
        A share in [0, 1]; 0 when one mask is empty, NaN when both are.
    """
    if not reference.any() or not prediction.any():
        return 0.0 if reference.any() or prediction.any() else np.nan
    box = _joint_box(reference, prediction)
    return _nsd(reference[box], prediction[box], spacing, tolerance_mm)


def surface_distances(
    reference: Mask, prediction: Mask, spacing: Spacing = VOXELS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distance of every surface voxel of one mask to the other's surface.

    Returns:
        Distances from the prediction's surface voxels (N,) and from the reference's (N,), in the
        unit of `spacing`; both empty when either mask is empty.
    """
    if not reference.any() or not prediction.any():
        return np.empty(0), np.empty(0)
    box = _joint_box(reference, prediction)
    return _between(_surface(reference[box]), _surface(prediction[box]), spacing)


def score(
    reference: Mask, prediction: Mask, spacing: Spacing, nsd_tolerance_mm: float = 2.0
) -> dict[str, float]:
    """All metrics of one mask of one case, its distances computed once.

    Args:
        reference: (X, Y, Z), boolean.
        prediction: (X, Y, Z), boolean.
        spacing: voxel size in mm.
        nsd_tolerance_mm: the tolerance of `nsd` in mm.

    Returns:
        The metrics named in `METRICS`, `reference_ml` and `prediction_ml` (volumes), and
        `failure`: 1 when the prediction is empty and the reference is not. Empty masks as in the
        table at the top of this file.
    """
    voxel_ml = float(np.prod(spacing)) / 1000
    has_reference, has_prediction = bool(reference.any()), bool(prediction.any())
    result = dict.fromkeys(METRICS, np.nan)
    if has_reference or has_prediction:
        box = _joint_box(reference, prediction)
        reference, prediction = reference[box], prediction[box]
        result |= {"dice": dice(reference, prediction), "jaccard": jaccard(reference, prediction)}
        result["nsd"] = 0.0
    if has_reference and has_prediction:
        result |= _distances(reference, prediction, spacing)
        result["nsd"] = _nsd(reference, prediction, spacing, nsd_tolerance_mm)
    result["reference_ml"] = float(np.count_nonzero(reference) * voxel_ml)
    result["prediction_ml"] = float(np.count_nonzero(prediction) * voxel_ml)
    result["failure"] = int(has_reference and not has_prediction)
    return result


def largest_component(mask: NDArray) -> NDArray:
    """Only the largest connected piece of each class, over 26 neighbors.

    Args:
        mask: (X, Y, Z), boolean, or class indices with 0 as background.

    Returns:
        The same type and shape. An empty class stays empty; of equally large pieces the first in
        array order is kept.
    """
    if mask.dtype == np.bool_:
        return _largest(mask)
    kept = np.zeros_like(mask)
    for class_id in np.unique(mask[mask > 0]):
        kept[_largest(mask == class_id)] = class_id
    return kept


def _largest(mask: Mask) -> Mask:
    components = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, CORNERS, output=components)
    sizes = np.bincount(components.ravel())
    if len(sizes) <= 2:
        return mask
    sizes[0] = 0  # the background
    return components == sizes.argmax()


def _joint_box(reference: Mask, prediction: Mask) -> tuple[slice, ...]:
    """The bounding box of both masks; outside it counts as empty, as the image's outside does."""
    both = reference | prediction
    front = np.any(both, axis=2)
    shadows = np.any(front, axis=1), np.any(front, axis=0), np.any(both, axis=(0, 1))
    ends = [np.flatnonzero(shadow)[[0, -1]] for shadow in shadows]
    return tuple(slice(first, last + 1) for first, last in ends)


def _surface(mask: Mask) -> Points:
    """Voxels with an empty face neighbor, (N, 3); beyond the array all is empty."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for start in (0, 2):
            neighbor = [slice(1, -1)] * 3
            neighbor[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(neighbor)]
    return np.argwhere(mask & ~inner)


def _between(
    reference_surface: Points, prediction_surface: Points, spacing: Spacing
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of the prediction's surface voxels, then of the reference's, (N, 3) given by index."""
    return (
        nearest(prediction_surface, reference_surface, spacing),
        nearest(reference_surface, prediction_surface, spacing),
    )


def _distances(reference: Mask, prediction: Mask, spacing: Spacing) -> dict[str, float]:
    surfaces = _surface(reference), _surface(prediction)
    voxels = _between(*surfaces, VOXELS)
    if np.allclose(spacing, spacing[0], rtol=1e-6):  # isotropic: the same distances in another unit
        mm = voxels[0] * spacing[0], voxels[1] * spacing[0]
    else:
        mm = _between(*surfaces, spacing)
    return {
        "hd95_voxel": _hd95(*voxels),
        "asd_voxel": _mean(voxels[0]),
        "hd95_mm": _hd95(*mm),
        "assd_mm": _mean(np.concatenate(mm)),
    }


def _hd95(to_reference: NDArray, to_prediction: NDArray) -> float:
    pooled = np.concatenate([to_reference, to_prediction])
    return float(np.percentile(pooled, 95)) if pooled.size else np.nan


def _mean(distances: NDArray) -> float:
    return float(distances.mean()) if distances.size else np.nan


def _nsd(reference: Mask, prediction: Mask, spacing: Spacing, tolerance_mm: float) -> float:
    limit = tolerance_mm + 1e-6  # for rounding
    ours, places, areas = _surface_elements(reference, spacing)
    theirs, their_places, their_areas = _surface_elements(prediction, spacing)
    within = areas[dilate(theirs, spacing, limit).take(places)].sum()
    within += their_areas[dilate(ours, spacing, limit).take(their_places)].sum()
    return float(within / (areas.sum() + their_areas.sum()))


def _surface_elements(
    mask: Mask, spacing: Spacing
) -> tuple[Mask, NDArray[np.intp], NDArray[np.float64]]:
    """Where the surface passes between voxels, (X + 1, Y + 1, Z + 1).

    Also by flat index (N,), and its area there in mm^2 (N,). Each 2 x 2 x 2 neighborhood has a code of
    8 bits, and each code a piece of surface.
    """
    codes = np.pad(mask, 1).view(np.uint8)
    codes = codes[1:] * 16 | codes[:-1]  # a product is quicker than a shift
    codes = codes[:, 1:] * 4 | codes[:, :-1]
    codes = codes[..., 1:] * 2 | codes[..., :-1]
    edges = (codes != 0) & (codes != 255)
    places = np.flatnonzero(edges)
    return edges, places, _area_of_codes(tuple(spacing)).take(codes.take(places))


@lru_cache
def _area_of_codes(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """The area in mm^2 of each code (256,), of which the corner (x, y, z) has the bit 4x + 2y + z."""
    from monai.metrics.utils import get_code_to_measure_table

    areas, values = get_code_to_measure_table(spacing)  # its corner (x, y, z) adds values[x, y, z]
    corners = np.arange(256)[:, None] >> np.arange(8) & 1
    return areas.numpy().astype(np.float64)[corners @ values.numpy().astype(int).ravel()]
