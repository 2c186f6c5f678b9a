"""Batch normalization worked into the convolution before it: for prediction, where it is a constant."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)


def fold_batchnorm(model: M) -> M:
    """Fold, in place, every batch normalization that follows a convolution in a `Sequential`.

    The outputs stay what they were in evaluation, up to rounding; the model can no longer be trained, and
    its state no longer fits an unfolded one.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("only a model in evaluation can be folded")
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for (at, first), (after, second) in pairwise(list(sequence.named_children())):
            if isinstance(second, nn.BatchNorm3d) and isinstance(
                first, nn.Conv3d | nn.ConvTranspose3d
            ):
                transposed = isinstance(first, nn.ConvTranspose3d)
                sequence.register_module(at, fuse_conv_bn_eval(first, second, transposed))
                sequence.register_module(after, nn.Identity())
    return model
