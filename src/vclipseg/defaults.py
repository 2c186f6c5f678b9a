"""Settings for people's own data, decided from image sizes and the machine; a recipe needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vclipseg.data.datasets import Dataset
from vclipseg.data.plan import Plan
from vclipseg.data.trace import resampled_shape
from vclipseg.data.volume import affine_spacing, axes_and_flips, read_header, turn_affine

GPU = {"filters": 16, "steps": 15_000, "voxels": 112 * 112 * 80}
CPU = {"filters": 8, "steps": 1_000, "voxels": 64 * 64 * 48}


def own_data_defaults(dataset: Dataset, plan: Plan) -> dict[str, Any]:
    """Patch, width and length for a data set, as a layer of settings."""
    size = GPU if torch.cuda.is_available() else CPU
    shapes = [_prepared_shape(case.images[0], plan) for case in dataset.train]
    median = np.median(shapes, axis=0)
    return {
        "name": dataset.name,
        "method": {"filters": size["filters"]},
        "augment": {"rotate": 15, "zoom": 0.35, "intensity": 0.3, "foreground_share": 0.33},
        "train": {"patch": list(choose_patch(median, size["voxels"])), "steps": size["steps"]},
    }


def choose_patch(shape: np.ndarray, voxels: int) -> tuple[int, int, int]:
    """A patch of about `voxels` at most, sides multiples of 16, in the proportions of the image."""
    sides = np.ceil(shape / 16) * 16
    while sides.prod() > voxels:  # again where a thin side could not shrink
        free = sides > 16
        shrink = (voxels / sides.prod()) ** (1 / free.sum())
        sides[free] = np.maximum(16, np.floor(sides[free] * shrink / 16) * 16)
    x, y, z = (int(side) for side in sides)
    return x, y, z


def _prepared_shape(file: Path, plan: Plan) -> tuple[int, int, int]:
    header = read_header(file)
    axes, flips = axes_and_flips(header.affine, plan.orientation)
    spacing = affine_spacing(turn_affine(header.affine, header.shape, axes, flips))
    turned = [header.shape[axis] for axis in axes]
    return resampled_shape(turned, spacing, plan.spacing)
