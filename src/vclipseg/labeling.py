"""Pseudo-labels that several networks or decoders give together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def fuse(probs: list[Tensor], dices: Tensor, weighting: str) -> Tensor:
    """P = sum_i w_i p_i (VCLIPSeg, eqs. 7 to 9): the lower an output's Dice loss, the more it counts.

    Args:
        probs: (B, K, X, Y, Z) of each output.
        dices: its Dice loss on labeled patches, (outputs,).
        weighting: "dynamic" for w = softmax(1 - sigmoid(dices)), "equal", or "voxel_entropy" for
            w = softmax(-entropy) voxel by voxel.

    Returns:
        (B, K, X, Y, Z).
    """
    stacked = torch.stack(probs)  # (outputs, B, K, X, Y, Z)
    if weighting == "equal":
        return stacked.mean(0)
    if weighting == "voxel_entropy":
        entropy = torch.special.entr(stacked).sum(2, keepdim=True)
        return ((-entropy).softmax(0) * stacked).sum(0)
    weights = (1 - dices.sigmoid()).softmax(0)
    return (weights.view(-1, *[1] * probs[0].ndim) * stacked).sum(0)  # einsum would be bf16


def largest_components(labels: Tensor) -> Tensor:
    """Labels (N, X, Y, Z) with all but the largest piece of each class of each patch made background."""
    from scipy import ndimage

    found = labels.to(torch.int16).cpu().numpy()  # a quarter of the bytes to send and to read
    kept = np.zeros_like(found)
    for patch, into in zip(found, kept, strict=True):
        for k, box in enumerate(ndimage.find_objects(patch), start=1):
            if box is None:  # no voxel of this class
                continue
            pieces, _ = ndimage.label(patch[box] == k, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())
            into[box][pieces == 1 + sizes[1:].argmax()] = k
    return torch.from_numpy(kept).to(labels)
