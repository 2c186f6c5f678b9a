"""From a scan to what a network sees, and back: orientation, crop, intensity, spacing.

Nothing here looks at labels to decide something, so that labels cannot leak into the
images of unlabeled cases. Each step on the grid can be undone: `restore` puts
probabilities back on the scan's own grid, whatever its orientation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vclipseg.data.intensity import normalize
from vclipseg.data.plan import Plan, PlanSettings, load_plan, make_plan, save_plan
from vclipseg.data.resample import linear, resample_image, resample_labels, running_argmax
from vclipseg.data.trace import Trace, turn_and_crop
from vclipseg.data.volume import Volume, affine_spacing, turn
from vclipseg.errors import DataError

__all__ = [
    "Plan",
    "PlanSettings",
    "Trace",
    "load_plan",
    "make_plan",
    "prepare_image",
    "prepare_labels",
    "restore",
    "restore_mask",
    "save_plan",
]


def prepare_image(volume: Volume, plan: Plan) -> tuple[Volume, Trace]:
    """Turn, crop, normalize and resample an image.

    Args:
        volume: `(C, X, Y, Z)`.
        plan: What to turn, crop, normalize and resample to.

    Returns:
        float32 `(C, x, y, z)`, and how to undo it.
    """
    array, trace = turn_and_crop(volume, plan.orientation, plan.crop, plan.spacing)
    channels = [
        normalize(channel, plan.intensity_of(index), plan.window, plan.percentiles)
        for index, channel in enumerate(array)
    ]
    prepared = resample_image(
        np.stack(channels).astype(np.float32, copy=False), trace.prepared_shape
    )
    return Volume(np.ascontiguousarray(prepared), trace.prepared_affine), trace


def prepare_labels(volume: Volume, trace: Trace) -> Volume:
    """Take labels `(X, Y, Z)` through the steps that the image took.

    Raises:
        DataError: They are not on the image's grid.
    """
    if volume.shape != trace.shape:
        raise DataError(
            f"labels of shape {volume.shape} for an image of shape {trace.shape}. "
            "Run `vclipseg check` on the data set; --fix can resample labels to their image."
        )
    distance = corner_distance_mm(volume.affine, np.array(trace.affine), trace.shape)
    if distance > 0.5 * min(affine_spacing(np.array(trace.affine))):
        raise DataError(
            f"labels that lie up to {distance:.1f} mm from the image's grid. "
            "Run `vclipseg check` on the data set; --fix can resample labels to their image."
        )
    labels = turn(volume.array, trace.axes, trace.flips)[trace.slices]
    labels = resample_labels(np.ascontiguousarray(labels), trace.prepared_shape)
    return Volume(labels, trace.prepared_affine)


def corner_distance_mm(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """How far in mm two affines put the corners of one grid from each other, at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def restore(probs: np.ndarray | torch.Tensor, trace: Trace) -> np.ndarray:
    """Put class probabilities on the grid of the scan.

    What was cropped away is background.

    Args:
        probs: `(K, x, y, z)`, class 0 the background.
        trace: How the scan was prepared.

    Returns:
        float32 `(K, X, Y, Z)`.
    """
    trace.check(probs)
    whole = np.empty((len(probs), *trace.shape), dtype=np.float32)
    for index in range(len(probs)):
        inside = linear(probs[index], trace.cropped_shape).cpu().numpy()
        whole[index] = trace.undo(inside, outside=float(index == 0))
    return whole


def restore_mask(probs: np.ndarray | torch.Tensor, trace: Trace) -> Volume:
    """Put the most probable class on the grid of the scan, holding two classes at a time.

    Args:
        probs: `(K, x, y, z)`, on any device, where the work is done.
        trace: How the scan was prepared.

    Returns:
        uint8 `(X, Y, Z)` with the scan's own affine.
    """
    trace.check(probs)
    inside = (linear(probs[index], trace.cropped_shape) for index in range(len(probs)))
    return Volume(trace.undo(running_argmax(inside)), np.array(trace.affine))
