"""Augmentation: parameters are drawn apart from applied, so a patch can be replayed.

`draw` turns a random generator into `Parameters`; `place` and `change_intensity` are pure functions of
them and an array, (C, X, Y, Z) images or (X, Y, Z) labels. What is a tensor is cut and changed on the
device where it lies, without waiting for it; the result is that of an array up to rounding, but for the
noise, which is drawn there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vclipseg.data.ignored import IGNORED
from vclipseg.settings import Settings

Box = tuple[int, int, int]
Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
A = TypeVar("A", np.ndarray, Tensor)


class AugmentSettings(Settings):
    """Which random changes a training patch goes through, besides the random crop."""

    rotate_flip: bool = False
    """Rotate by a random multiple of 90 degrees in the XY plane, then always flip X or Y (Left Atrium
    in the literature). Wrong where left and right, or front and back, tell classes apart."""
    zoom: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength z of another size: each axis of a patch shows 2^U(-z, z) times its extent, resampled."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle, in degrees: a patch is rotated about its center by U(-r, r) around each axis, in
    millimeters, and resampled. What `foreground_share` placed in a corner may leave the patch."""
    intensity: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Strength s of another contrast: with v in [0, 1] between a patch's extremes, v becomes
    a * v^g + b with g = 2^U(-s, s), a = U(1 - s/2, 1 + s/2), b = U(-s/4, s/4), and noise with a
    standard deviation of up to s/10 in half of the patches."""
    foreground_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of labeled patches that are placed around a voxel of a random foreground class."""


@dataclass(frozen=True)
class Parameters:
    """All that was drawn for one patch."""

    quarter_turns: int
    flip_axis: int | None  # 0 is X, 1 is Y
    start: Box  # of what is cut from the turned volume; negative where the volume is smaller
    extent: Box  # of what is cut, in voxels; resampled to `patch` where it differs
    patch: Box
    rotation: Matrix | None  # steps of the patch in voxels of what is cut, zoom included
    gamma: float
    scale: float
    shift: float
    noise: float  # standard deviation, as a share of the patch's range
    noise_seed: int


def draw(
    settings: AugmentSettings,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    patch: Box,
    labels: np.ndarray | None = None,
    spacing: Vector = (1.0, 1.0, 1.0),
) -> Parameters:
    """Draw the parameters of one patch of a volume of `shape` (X, Y, Z) and `spacing`, in mm.

    `labels` (X, Y, Z), if given, lets `foreground_share` place the patch.
    """
    turns = int(rng.integers(4)) if settings.rotate_flip else 0
    axis = int(rng.integers(2)) if settings.rotate_flip else None
    turned = (shape[1], shape[0], shape[2]) if turns % 2 else shape
    around = None
    if labels is not None and rng.random() < settings.foreground_share:
        around = _foreground_voxel(_turn(labels, turns, axis), rng)
    extent = _zoomed(patch, settings.zoom, rng) if settings.zoom else patch
    start, rotation = _start(turned, extent, around, rng), None
    if settings.rotate:
        sides = (spacing[1], spacing[0], spacing[2]) if turns % 2 else spacing
        rotation = _rotation(settings.rotate, sides, np.divide(extent, patch), rng)
        start, extent = _around_rotated(start, extent, patch, rotation)
    s = settings.intensity
    return Parameters(
        quarter_turns=turns,
        flip_axis=axis,
        start=start,
        extent=extent,
        patch=patch,
        rotation=rotation,
        gamma=2 ** float(rng.uniform(-s, s)),
        scale=float(rng.uniform(1 - s / 2, 1 + s / 2)),
        shift=float(rng.uniform(-s / 4, s / 4)),
        noise=max(0.0, float(rng.uniform(-s / 10, s / 10))),
        noise_seed=int(rng.integers(2**32)),
    )


def place(parameters: Parameters, array: A) -> A:
    """The patch of an image (C, X, Y, Z) or of labels (X, Y, Z), turned, cut and resampled: a copy."""
    p = parameters
    cut = _cut(_turn(array, p.quarter_turns, p.flip_axis), p.start, p.extent)
    if p.rotation is not None:
        return _rotate(cut, p.rotation, p.patch)
    return cut if p.extent == p.patch else _resize(cut, p.patch)


def change_intensity(parameters: Parameters, patch: A) -> A:
    """An image patch (C, *patch) in the contrast that was drawn; each channel by its own extremes."""
    p = parameters
    if (p.gamma, p.scale, p.shift, p.noise) == (1, 1, 0, 0):
        return patch
    if isinstance(patch, Tensor):
        return _change_tensor(p, patch)
    low = patch.min((1, 2, 3), keepdims=True)
    extent = np.maximum(patch.max((1, 2, 3), keepdims=True) - low, np.float32(1e-6))
    values = ((patch - low) / extent) ** np.float32(p.gamma)
    values = values * np.float32(p.scale) + np.float32(p.shift)
    if p.noise:
        rng = np.random.default_rng(p.noise_seed)
        values += np.float32(p.noise) * rng.standard_normal(values.shape, dtype=np.float32)
    return low + extent * values


def _change_tensor(p: Parameters, patch: Tensor) -> Tensor:
    low = patch.amin((1, 2, 3), keepdim=True)
    extent = (patch.amax((1, 2, 3), keepdim=True) - low).clamp(min=1e-6)
    values = ((patch - low) / extent) ** p.gamma * p.scale + p.shift
    if p.noise:
        generator = torch.Generator(patch.device).manual_seed(p.noise_seed)
        values += p.noise * torch.randn(patch.shape, generator=generator, device=patch.device)
    return low + extent * values


def _turn(array: A, turns: int, flip_axis: int | None) -> A:
    numbers: Any = torch if isinstance(array, Tensor) else np
    array = numbers.rot90(array, turns, (-3, -2))
    return array if flip_axis is None else numbers.flip(array, (flip_axis - 3,))


def _zoomed(patch: Box, zoom: float, rng: np.random.Generator) -> Box:
    x, y, z = (max(1, round(n * 2 ** rng.uniform(-zoom, zoom))) for n in patch)
    return (x, y, z)


def _resize(array: A, patch: Box) -> A:
    """Images (C, X, Y, Z) trilinear, labels (X, Y, Z) by the nearest voxel."""
    if isinstance(array, np.ndarray):
        return _resize(torch.from_numpy(array), patch).numpy()
    if array.ndim == 4:
        return F.interpolate(array[None], patch, mode="trilinear", align_corners=False)[0]
    for axis, (new, old) in enumerate(zip(patch, array.shape, strict=True)):
        place = (torch.arange(new, dtype=torch.float64, device=array.device) + 0.5) * old / new
        array = array.index_select(axis, place.long())
    return array


def _rotation(
    degrees: float, spacing: Vector, zoom: np.ndarray, rng: np.random.Generator
) -> Matrix:
    """Rotations around X, Y and Z by U(-degrees, degrees) each; a step of the patch is `zoom` voxels."""
    rotation = np.eye(3)
    for first, second in ((1, 2), (2, 0), (0, 1)):
        angle = math.radians(rng.uniform(-degrees, degrees))
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[second, first], turn[first, second] = math.sin(angle), -math.sin(angle)
        rotation = rotation @ turn
    mm = np.asarray(spacing)
    x, y, z = (rotation * mm[None, :] / mm[:, None] * zoom[None, :]).tolist()
    return (tuple(x), tuple(y), tuple(z))


def _around_rotated(start: Box, extent: Box, patch: Box, rotation: Matrix) -> tuple[Box, Box]:
    """Start and extent of the box around the rotated patch, with the center of the one given."""
    sides = [math.ceil(side) for side in np.abs(rotation) @ np.asarray(patch)]
    first = [s + (old - new) // 2 for s, old, new in zip(start, extent, sides, strict=True)]
    return (first[0], first[1], first[2]), (sides[0], sides[1], sides[2])


def _rotate(array: A, rotation: Matrix, patch: Box) -> A:
    """Images (C, X, Y, Z) trilinear, labels (X, Y, Z) by the nearest voxel, about their center."""
    if isinstance(array, np.ndarray):
        return _rotate(torch.from_numpy(array), rotation, patch).numpy()
    if array.ndim == 3:
        return _sample(array[None].float(), rotation, patch, "nearest")[0].to(array.dtype)
    return _sample(array, rotation, patch, "bilinear")


def _sample(image: Tensor, rotation: Matrix, patch: Box, mode: str) -> Tensor:
    """An image (C, X, Y, Z) at the voxels of the rotated patch, (C, *patch)."""
    # torch counts axes from the last, and places from -1 to 1
    shares = np.asarray(rotation) * patch / np.reshape(image.shape[1:], (3, 1))
    matrix = torch.zeros((1, 3, 4))
    matrix[0, :, :3] = torch.from_numpy(shares[::-1, ::-1].copy())
    matrix = matrix.to(image.device, non_blocking=True)
    grid = F.affine_grid(matrix, [1, 1, *patch], align_corners=False)
    return F.grid_sample(image[None], grid, mode, "border", align_corners=False)[0]


def _foreground_voxel(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    classes = [k for k in np.unique(labels) if 0 < k < IGNORED]
    if not classes:
        return None
    voxels = np.argwhere(labels == rng.choice(classes))
    return voxels[rng.integers(len(voxels))]


def _start(
    shape: tuple[int, ...],
    patch: Box,
    around: np.ndarray | None,
    rng: np.random.Generator,
) -> Box:
    start = []
    for axis, (size, length) in enumerate(zip(shape, patch, strict=True)):
        room = size - length
        low, high = min(room, 0) // 2, max(room, 0)
        if around is not None and room > 0:
            low = max(0, int(around[axis]) - length + 1)
            high = min(room, int(around[axis]))
        start.append(low if room <= 0 else int(rng.integers(low, high + 1)))
    return (start[0], start[1], start[2])


def _cut(array: A, start: Box, patch: Box) -> A:
    """A copy of the patch; beyond the volume its border is repeated."""
    if isinstance(array, Tensor):
        return _cut_tensor(array, start, patch)
    return _cut_array(array, start, patch)


def _cut_array(array: np.ndarray, start: Box, patch: Box) -> np.ndarray:
    shape = array.shape[-3:]
    axes = list(zip(start, patch, shape, strict=True))
    inner: Any = (..., *(slice(max(s, 0), min(s + p, n)) for s, p, n in axes))
    cut = array[inner]
    pads = [(max(-s, 0), max(s + p - n, 0)) for s, p, n in axes]
    if any(side for pad in pads for side in pad):
        return np.pad(cut, [(0, 0)] * (array.ndim - 3) + pads, mode="edge")
    return np.ascontiguousarray(cut)


def _cut_tensor(array: Tensor, start: Box, patch: Box) -> Tensor:
    for axis, first, length in zip((-3, -2, -1), start, patch, strict=True):
        places = torch.arange(first, first + length, device=array.device)
        array = array.index_select(axis, places.clamp(0, array.shape[axis] - 1))
    return array
