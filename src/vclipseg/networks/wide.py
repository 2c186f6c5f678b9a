"""Narrow maps read as wide ones: neighboring voxels as further channels of one.

In the layout that convolutions like (channels last) the channels of a voxel lie before those of the next
one along the last axis. With 8 of them most of a vector register, and of a bfloat16 matrix unit, stays
empty. To read `times` voxels as one with `times` as many channels copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = torch.channels_last_3d


def widen(x: Tensor, times: int) -> Tensor:
    """(B, F, x, y, z) -> (B, times F, x, y, z / times), a view where `x` is channels last."""
    batch, channels, i, j, k = x.shape
    voxels = x.permute(0, 2, 3, 4, 1).reshape(batch, i, j, k // times, times * channels)
    return voxels.permute(0, 4, 1, 2, 3)


def narrow(wide: Tensor, times: int) -> Tensor:
    """The inverse of `widen`."""
    batch, channels, i, j, k = wide.shape
    voxels = wide.permute(0, 2, 3, 4, 1).reshape(batch, i, j, k * times, channels // times)
    return voxels.permute(0, 4, 1, 2, 3)


def is_quicker(x: Tensor) -> bool:
    """Whether the CPU computes in bfloat16 here; in float32 wide convolutions are no quicker."""
    on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return on_cpu and not torch.compiler.is_compiling()


def conv3x3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3x3 convolution with zeros around, two voxels at a time: (B, F, x, y, z), z even."""
    wide = F.conv3d(widen(x, 2), pair_weight(weight), bias.repeat(2), padding=1)
    return narrow(wide, 2)


def pair_weight(weight: Tensor) -> Tensor:
    """(G, F, 3, 3, 3) -> (2G, 2F, 3, 3, 3): what either voxel of a pair has of the pairs about it."""
    first, second = (F.pad(weight, (1 + i, 2 - i)) for i in (0, 1))  # (G, F, 3, 3, 6): three pairs
    pairs = torch.stack([first, second]).unflatten(-1, (3, 2))  # (2, G, F, 3, 3, 3, 2)
    return pairs.movedim(-1, 2).flatten(2, 3).flatten(0, 1).contiguous(memory_format=LAYOUT)


def product(x: Tensor, weight: Tensor, bias: Tensor, times: int) -> Tensor:
    """A 1x1x1 convolution by `weight` (G, F), `times` voxels at a time: z a multiple of it."""
    voxels = widen(x, times).permute(0, 2, 3, 4, 1)
    wide = F.linear(voxels, torch.block_diag(*[weight] * times), bias.repeat(times))
    return narrow(wide.permute(0, 4, 1, 2, 3), times)


def double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed 2x2x2 convolution with a stride of 2, weight (F, G, 2, 2, 2), in autocast's precision.

    Both voxels along the last axis are channels of one.
    """
    wide = weight.permute(0, 4, 1, 2, 3).flatten(1, 2)[..., None]  # (F, 2G, 2, 2, 1)
    precision = torch.get_autocast_dtype("cpu")
    inputs = (
        x.to(precision),
        wide.to(precision, memory_format=LAYOUT),
        bias.repeat(2).to(precision),
    )
    return narrow(TransposedConv.apply(*inputs), 2)


class TransposedConv(torch.autograd.Function):
    """A transposed convolution of 2x2x1 voxels, stride 2x2x1, whose bias has a quick gradient."""

    SIZES = ((2, 2, 1), (0, 0, 0), (1, 1, 1), True, (0, 0, 0), 1)  # stride, padding, dilation, ...

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, F, x, y, z), (F, G, 2, 2, 1), (G,) -> (B, G, 2x, 2y, z)."""
        ctx.save_for_backward(x, weight)
        return torch.ops.aten.convolution(x, weight, bias, *TransposedConv.SIZES)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of all three."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=LAYOUT)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *TransposedConv.SIZES, (of_x, of_weight, False)
        )
        return dx, dw, grad.sum((0, 2, 3, 4)) if of_bias else None
