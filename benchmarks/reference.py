"""How the literature trains, predicts and measures: the yardstick of `speed.py`.

Written from its description, with what makes it slow: float32 in the plain memory layout, torch's own
layers, a case read whole from HDF5 for each patch, augmented and cut in turn with the step, windows one
at a time with every decoder computed, metrics through distance maps of whole volumes.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vclipseg.methods.base import Method
from vclipseg.networks.batchnorm import BatchNorm3d, JointBatchNorm3d
from vclipseg.networks.vnet import Conv3d, PointwiseConv3d

OURS = {
    BatchNorm3d: nn.BatchNorm3d,
    JointBatchNorm3d: nn.BatchNorm3d,
    Conv3d: nn.Conv3d,
    PointwiseConv3d: nn.Conv3d,
}


def plain(method: Method) -> Method:
    """A copy with torch's own layers in the plain memory layout."""
    method = copy.deepcopy(method).to(memory_format=torch.contiguous_format)
    for module in method.modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
    return method


def read_patch(
    path: Path, patch: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A patch (X, Y, Z) of image and label: read, turn, flip, pad and cut the whole case."""
    import h5py

    with h5py.File(path, "r") as file:
        arrays = [file["image"][:], file["label"][:].astype(np.uint8)]
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    arrays = [np.flip(np.rot90(array, turns), axis).copy() for array in arrays]
    room = [size - wanted for size, wanted in zip(arrays[0].shape, patch, strict=True)]
    if min(room) <= 0:
        sides = [max(-left // 2 + 3, 0) for left in room]
        arrays = [np.pad(array, [(side, side) for side in sides]) for array in arrays]
        room = [size - wanted for size, wanted in zip(arrays[0].shape, patch, strict=True)]
    starts = [int(rng.integers(left)) for left in room]
    box = tuple(slice(a, a + size) for a, size in zip(starts, patch, strict=True))
    image, label = (array[box] for array in arrays)
    return image.astype(np.float32), label


def window_corners(
    shape: tuple[int, ...], patch: tuple[int, ...], strides: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Corners of the windows over a volume at least as large as a patch."""
    axes = []
    for size, wanted, stride in zip(shape, patch, strides, strict=True):
        count = math.ceil((size - wanted) / stride) + 1
        axes.append([min(i * stride, size - wanted) for i in range(count)])
    return list(itertools.product(*axes))


@torch.no_grad()
def run_window(method: Method, window: np.ndarray) -> np.ndarray:
    """Foreground probability (X, Y, Z) of a window; every decoder is computed, the first is taken."""
    batch = torch.from_numpy(window[None, None].astype(np.float32))
    logits: list[Tensor] = method.network(batch).logits
    return torch.softmax(logits[0], 1)[0, 1].numpy()


def predict(
    method: Method, image: np.ndarray, patch: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """Foreground probability (X, Y, Z): the mean of every window over a voxel."""
    total, visits = np.zeros(image.shape, np.float32), np.zeros(image.shape, np.float32)
    for corner in window_corners(image.shape, patch, strides):
        box = tuple(slice(a, a + size) for a, size in zip(corner, patch, strict=True))
        total[box] += run_window(method, image[box])
        visits[box] += 1
    return total / visits


def measure(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float, float, float]:
    """Dice, Jaccard, 95HD and ASD in voxels."""
    from medpy.metric import binary

    return (
        binary.dc(prediction, label),
        binary.jc(prediction, label),
        binary.hd95(prediction, label),
        binary.asd(prediction, label),
    )
