"""From a scan to what a network sees, and back: orientation, crop, intensity, spacing.

Nothing here looks at labels to decide something, so that labels cannot leak into the
images of unlabeled cases. Each step on the grid can be undone: `restore` puts
probabilities back on the scan's own grid, whatever its orientation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vclipseg.data.intensity import normalize
from vclipseg.data.plan import Plan, PlanSettings, load_plan, make_plan, save_plan
from vclipseg.data.resample import (
    Shape,
    linear,
    resample_image,
    resample_labels,
    resampled_affine,
    resampled_shape,
    running_argmax,
)
from vclipseg.data.volume import (
    Volume,
    affine_spacing,
    axes_and_flips,
    turn,
    turn_affine,
    turn_back,
)
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


@dataclass(frozen=True)
class Trace:
    """What was done to the grid of a volume, in the order it was done.

    Attributes:
        shape: `(X, Y, Z)` of the scan.
        affine: Rows of the scan's affine, voxel to RAS+ mm.
        axes: The axis of the scan that became X, Y and Z.
        flips: Whether these were then reversed.
        box: First and past-the-last voxel of the crop along X, Y and Z, after turning.
        prepared_shape: `(x, y, z)` that the network sees.
    """

    shape: Shape
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    box: tuple[tuple[int, int], ...]
    prepared_shape: Shape

    @property
    def turned_shape(self) -> Shape:
        """`(X, Y, Z)` of the whole scan after turning."""
        x, y, z = (self.shape[axis] for axis in self.axes)
        return x, y, z

    @property
    def cropped_shape(self) -> Shape:
        """`(X, Y, Z)` after turning and cropping."""
        x, y, z = (stop - start for start, stop in self.box)
        return x, y, z

    @property
    def slices(self) -> tuple[slice, ...]:
        """The crop as slices of the last three axes."""
        return tuple(slice(start, stop) for start, stop in self.box)

    @property
    def prepared_affine(self) -> np.ndarray:
        """`(4, 4)`, prepared voxel to RAS+ mm."""
        affine = turn_affine(np.array(self.affine), self.shape, self.axes, self.flips)
        affine[:3, 3] += affine[:3, :3] @ [start for start, _ in self.box]
        return resampled_affine(affine, self.cropped_shape, self.prepared_shape)

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trace:
        """The trace that `to_json` wrote."""
        return cls(**{key: _tuples(value) for key, value in content.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def prepare_image(volume: Volume, plan: Plan) -> tuple[Volume, Trace]:
    """Turn, crop, normalize and resample an image.

    Args:
        volume: `(C, X, Y, Z)`.
        plan: What to turn, crop, normalize and resample to.

    Returns:
        float32 `(C, x, y, z)`, and how to undo it.
    """
    axes, flips = axes_and_flips(volume.affine, plan.orientation)
    array = turn(volume.array, axes, flips)
    box = _nonzero_box(array) if plan.crop == "nonzero" else tuple((0, n) for n in array.shape[1:])
    cropped = tuple(stop - start for start, stop in box)
    spacing = affine_spacing(turn_affine(volume.affine, volume.shape, axes, flips))
    trace = Trace(
        shape=volume.shape,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axes=axes,
        flips=flips,
        box=box,
        prepared_shape=resampled_shape(cropped, spacing, plan.spacing),
    )
    array = array[(slice(None), *trace.slices)]
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
    _check_shape(probs, trace)
    whole = np.zeros((len(probs), *trace.shape), dtype=np.float32)
    whole[0] = 1
    turned = turn(whole, trace.axes, trace.flips)  # a view: what is written there is in `whole`
    for index in range(len(probs)):
        inside = linear(probs[index], trace.cropped_shape)
        turned[index][trace.slices] = inside.cpu().numpy()
    return whole


def restore_mask(probs: np.ndarray | torch.Tensor, trace: Trace) -> Volume:
    """Put the most probable class on the grid of the scan, holding two classes at a time.

    Args:
        probs: `(K, x, y, z)`, on any device, where the work is done.
        trace: How the scan was prepared.

    Returns:
        uint8 `(X, Y, Z)` with the scan's own affine.
    """
    _check_shape(probs, trace)
    inside = (linear(probs[index], trace.cropped_shape) for index in range(len(probs)))
    return put_back(running_argmax(inside), trace)


def put_back(mask: np.ndarray, trace: Trace) -> Volume:
    """A mask of what was left by the crop, at the spacing of the scan, on the grid of the scan.

    Args:
        mask: uint8 `(X, Y, Z)`, of `trace.cropped_shape`.
        trace: How the scan was prepared.

    Returns:
        uint8 `(X, Y, Z)` with the scan's own affine; what was cropped away is 0.
    """
    turned = np.zeros(trace.turned_shape, dtype=np.uint8)
    turned[trace.slices] = mask
    whole = np.ascontiguousarray(turn_back(turned, trace.axes, trace.flips))
    return Volume(whole, np.array(trace.affine))


def _check_shape(probs: np.ndarray | torch.Tensor, trace: Trace) -> None:
    if tuple(probs.shape[1:]) != trace.prepared_shape or probs.ndim != 4:
        raise ValueError(f"probs of shape {tuple(probs.shape)}, not (K, *{trace.prepared_shape})")


def _nonzero_box(image: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The smallest box around the voxels of `(C, X, Y, Z)` that are nonzero in some channel."""
    nonzero = (image != 0).any(axis=0)
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(nonzero.any(axis=others))
        box.append((int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, nonzero.shape[axis]))
    return tuple(box)
