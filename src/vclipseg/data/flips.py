"""Which way round a label lies on its CT, where its header cannot be trusted to say.

A label that has its image's voxels may still be mirrored against them: tools that write labels often
lose or invent the header. Each of the eight mirrorings is put to the test of the image itself:

- its voxels are soft tissue (`share`), and
- they are more often so than the `SHELL` voxels around them (`contrast`), as the border of an organ
  follows the tissue's, which that of a mirrored label does only by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation

from vclipseg.data.grids import format_mm, header_of
from vclipseg.data.orientation import axes_and_flips, turn, turn_affine
from vclipseg.data.volume import SNAP_VOXELS, Volume, corner_shift
from vclipseg.errors import DataError

SOFT_TISSUE_HU = (-50.0, 200.0)
SHELL = 3
"""Thickness in voxels of what is compared with the inside."""
PLAUSIBLE = 0.7
"""A label of which less than this share is soft tissue is none of a soft organ."""
CLEAR = 0.1
"""One way round is clear if its contrast exceeds that of every other by this."""

Flips = tuple[bool, ...]
ALL_FLIPS: tuple[Flips, ...] = tuple(product((False, True), repeat=3))


@dataclass(frozen=True)
class Evidence:
    """How well a mirroring agrees with the image; shares of voxels, from 0 to 1."""

    share: float
    contrast: float


@dataclass(frozen=True)
class Fit:
    """How a label was laid on its image.

    Attributes:
        axes: the axis of the label that became X, Y and Z.
        flipped: which of these were then reversed, such as "y"; "" for none.
        by: "header" if the label's own header put it there, "tissue" if only the image told.
        header_off_mm: how far from the image's corners the header puts the label's.
        share, contrast: of the way round that was taken.
        next_contrast: of the best other way round.
    """

    axes: tuple[int, ...]
    flipped: str
    by: str
    header_off_mm: float
    share: float
    contrast: float
    next_contrast: float

    def to_json(self) -> dict[str, Any]:
        """Rounded, for a record."""
        values = {**vars(self), "axes": list(self.axes)}
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


def fit_label(labels: Volume, image: Volume) -> tuple[np.ndarray, Fit]:
    """Lay a binary label of a soft organ on the grid of its CT.

    The header's word is taken if it puts the label on the image's grid and the image does not clearly
    speak for another way round; else the image decides.

    Args:
        labels: `(X, Y, Z)`, 0 outside of the organ.
        image: `(1, X, Y, Z)` in HU.

    Returns:
        bool `(X, Y, Z)` on the image's grid, and how it got there.

    Raises:
        DataError: The label has other numbers of voxels, not one class, agrees with the image no way
            round, or with several of them alike.
    """
    axes, flips = axes_and_flips(labels.affine, image.orientation)
    inside = turn(labels.array, axes, flips) > 0
    as_header = Volume(inside, turn_affine(labels.affine, labels.shape, axes, flips))
    if as_header.shape != image.shape:
        raise DataError(
            f"the label has {_times(as_header.shape)} voxels, the image {_times(image.shape)}. Is it "
            "the label of this scan, and is the series whole?"
        )
    values = np.unique(labels.array[labels.array > 0])
    if len(values) != 1:
        what = f"holds the classes {', '.join(map(str, values))}" if len(values) else "is empty"
        raise DataError(f"the label {what}; it is to mark one organ. Get a fresh copy of it.")
    off_mm, off_voxels = corner_shift(header_of(image), header_of(as_header))
    evidence = dict(zip(ALL_FLIPS, weigh(inside, image.array[0]), strict=True))
    more = _decide(evidence, off_voxels < SNAP_VOXELS, off_mm)
    others = [e.contrast for flips, e in evidence.items() if flips != more]
    fit = Fit(
        axes=axes,
        flipped=_names(tuple(a != b for a, b in zip(flips, more, strict=True))),
        by="header" if off_voxels < SNAP_VOXELS and not any(more) else "tissue",
        header_off_mm=off_mm,
        share=evidence[more].share,
        contrast=evidence[more].contrast,
        next_contrast=max(others),
    )
    return _mirrored(inside, more), fit


def weigh(inside: np.ndarray, hu: np.ndarray) -> list[Evidence]:
    """The evidence for each of `ALL_FLIPS` of a mask `(X, Y, Z)` on a CT of that shape."""
    box = _box(inside, SHELL)
    organ = inside[box]
    shell = binary_dilation(organ, iterations=SHELL) & ~organ
    found = []
    for flips in ALL_FLIPS:
        part = _mirrored(hu, flips)[box]
        soft = (part >= SOFT_TISSUE_HU[0]) & (part <= SOFT_TISSUE_HU[1])
        share = float(soft[organ].mean())
        around = float(soft[shell].mean()) if shell.any() else share
        found.append(Evidence(share, share - around))
    return found


def _decide(evidence: dict[Flips, Evidence], header_agrees: bool, off_mm: float) -> Flips:
    """Which mirroring of the label, as its header turns it, is the true one."""
    likely = [flips for flips in ALL_FLIPS if evidence[flips].share >= PLAUSIBLE]
    if not likely:
        best = max(e.share for e in evidence.values())
        low, high = SOFT_TISSUE_HU
        raise DataError(
            f"no way round is the label in soft tissue ({low:g} to {high:g} HU): {best:.0%} of it at "
            "best. Is it the label of this scan, and is the scan in HU?"
        )
    most = max(evidence[flips].contrast for flips in likely)
    leading = [flips for flips in likely if evidence[flips].contrast > most - CLEAR]
    as_it_is = ALL_FLIPS[0]
    if header_agrees and as_it_is in leading:
        return as_it_is
    if len(leading) == 1:
        return leading[0]
    ways = ", ".join(f"reversed along {n}" if (n := _names(f)) else "as it is" for f in leading)
    raise DataError(
        f"the label fits the image {len(leading)} ways round ({ways}), and its header, which puts it "
        f"{format_mm(off_mm)} mm off the image, does not say which. Look at both, and correct the "
        "label's header."
    )


def _mirrored(array: np.ndarray, flips: Flips) -> np.ndarray:
    """A view."""
    return turn(array, (0, 1, 2), flips)


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The box around the true voxels, wider by a margin where there is room."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(hit[0] - margin, 0), hit[-1] + 1 + margin))
    return tuple(box)


def _names(flips: Flips) -> str:
    return "".join(name for name, flip in zip("xyz", flips, strict=True) if flip)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
