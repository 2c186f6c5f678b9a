"""What preparing does to the grid of a scan, and how it is undone; numpy alone.

An exported model goes the same way where torch is not installed (`vclipseg.lite`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vclipseg.data.formats import affine_spacing
from vclipseg.data.orientation import axes_and_flips, turn, turn_affine, turn_back
from vclipseg.data.volume import Volume

Shape = tuple[int, int, int]


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

    def undo(self, cropped: np.ndarray, outside: float = 0) -> np.ndarray:
        """An array of `cropped_shape` on the scan's grid; what was cropped away is `outside`."""
        turned = np.full(self.turned_shape, outside, dtype=cropped.dtype)
        turned[self.slices] = cropped
        return np.ascontiguousarray(turn_back(turned, self.axes, self.flips))

    def check(self, probs: Any) -> None:
        """Refuse probabilities that are not `(K, *prepared_shape)`."""
        if tuple(probs.shape[1:]) != self.prepared_shape or probs.ndim != 4:
            raise ValueError(
                f"probs of shape {tuple(probs.shape)}, not (K, *{self.prepared_shape})"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trace:
        """The trace that `to_json` wrote."""
        return cls(**{key: _tuples(value) for key, value in content.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def turn_and_crop(
    volume: Volume, orientation: str, crop: str, spacing: Sequence[float]
) -> tuple[np.ndarray, Trace]:
    """Turn and crop an image `(C, X, Y, Z)`; a view, and what is done up to the new spacing."""
    axes, flips = axes_and_flips(volume.affine, orientation)
    array = turn(volume.array, axes, flips)
    box = _nonzero_box(array) if crop == "nonzero" else tuple((0, n) for n in array.shape[1:])
    cropped = tuple(stop - start for start, stop in box)
    old_spacing = affine_spacing(turn_affine(volume.affine, volume.shape, axes, flips))
    trace = Trace(
        shape=volume.shape,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axes=axes,
        flips=flips,
        box=box,
        prepared_shape=resampled_shape(cropped, old_spacing, spacing),
    )
    return array[(slice(None), *trace.slices)], trace


def resampled_shape(shape: Sequence[int], old: Sequence[float], new: Sequence[float]) -> Shape:
    """Voxels after a change of spacing in mm, the field of view kept as nearly as can be."""
    x, y, z = (max(1, int(n * a / b + 0.5)) for n, a, b in zip(shape, old, new, strict=True))
    return x, y, z


def resampled_affine(affine: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """The affine of a grid of `new` voxels over the field of view of one of `old`."""
    factor = np.asarray(old) / np.asarray(new)
    scaled = affine.copy()
    scaled[:3, :3] = affine[:3, :3] * factor
    scaled[:3, 3] += affine[:3, :3] @ ((factor - 1) / 2)  # half a new voxel from the old corner
    return scaled


def _nonzero_box(image: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The smallest box around the voxels of `(C, X, Y, Z)` that are nonzero in some channel."""
    nonzero = (image != 0).any(axis=0)
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(nonzero.any(axis=others))
        box.append((int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, nonzero.shape[axis]))
    return tuple(box)
