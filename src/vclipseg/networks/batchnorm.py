"""Batch normalization over the patches of all ranks, and fast on the CPU where there are few channels.

Where several processes train together, the statistics are those of the joint batch: what each has is merged.

In the layout that convolutions like (channels last), torch normalizes one voxel after another: with 8
channels most of a vector register stays empty. Here narrow maps are read as wide ones (`wide.py`), and
the statistics of their channels merged. The result is that of `torch.nn.BatchNorm3d` up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vclipseg.networks.wide import LAYOUT, narrow, widen
from vclipseg.ranks import across, count, gather

WIDTH = 64
MOST_CHANNELS = 16  # beyond, torch is as quick


_AGAIN = ContextVar("again", default=False)


@contextmanager
def statistics_left_alone() -> Iterator[None]:
    """Within it running statistics follow nothing: a batch that they know is computed again."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


class JointBatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over the batches of all ranks, on any device.

    One value a channel has no variance: there the running statistics are taken, in training too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, x, y, z) -> the same shape."""
        if not self.training or count() == 1:
            return self.alone(x)
        y, mean, var = JointNorm.apply(x, self.weight, self.bias, self.eps)
        self.follow(mean, var, count() * x.numel() // x.shape[1])
        return y

    def alone(self, x: Tensor) -> Tensor:
        """As torch does it, over the batch of this rank."""
        if self.training and x.numel() == x.shape[1]:
            return self.normalize(x)
        if torch.compiler.is_compiling() or not (self.training and _AGAIN.get()):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        spare = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, *spare, self.weight, self.bias, True, eps=self.eps)

    def normalize(self, x: Tensor) -> Tensor:
        """As in evaluation."""
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        if _AGAIN.get():
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * values / (values - 1), self.momentum)


class BatchNorm3d(JointBatchNorm3d):
    """The same, quicker in training for narrow maps on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, x, y, z) -> the same shape."""
        if not self.training or count() > 1:
            return super().forward(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not can_fold(x):
            return self.alone(x)
        y, mean, var = FoldedBatchNorm.apply(x, self.weight, self.bias, self.eps)
        self.follow(mean, var, x.numel() // x.shape[1])
        return y


class JointNorm(torch.autograd.Function):
    """y = w (x - mean) / sqrt(var + eps) + b over batch and space of all ranks, who have as many each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Also gives mean and (biased) variance, both (F,)."""
        _, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        means, variances = gather(torch.stack([mean, inverse**-2 - eps])).unbind(1)  # (N, F) each
        mean, var = merge(means, variances)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.mark_non_differentiable(mean, var)
        scale = weight * inverse
        return affine(x, scale, bias - scale * mean), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Dx = w/s (g - mean(g) - h mean(g h)) with h = (x - mean)/s and the means over all ranks."""
        x, mean, inverse, weight = ctx.saved_tensors
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        values = count() * x.numel() // x.shape[1]
        mean_gh, mean_g = across(torch.stack([for_weight, for_bias])) / values
        a = weight * inverse
        b = -a * inverse * mean_gh
        c = -a * mean_g - b * mean
        return (
            affine(grad, a, c) + affine(x, b, torch.zeros_like(b)),
            for_weight,
            for_bias,
            None,
        )


def can_fold(x: Tensor) -> bool:
    """Whether `WIDTH` values along the last axis are whole voxels, one after another in memory."""
    channels, depth = x.shape[1], x.shape[4]
    return (
        1 < channels <= MOST_CHANNELS
        and WIDTH % channels == 0
        and (depth * channels) % WIDTH == 0
        and x.is_contiguous(memory_format=LAYOUT)
    )


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale * x + shift for each of F channels (B, F, ...), in one pass; folded ones repeat theirs."""
    times = x.shape[1] // len(scale)
    zero, one = scale.new_zeros(x.shape[1]), scale.new_ones(x.shape[1])
    return torch.native_batch_norm(
        x, scale.repeat(times), shift.repeat(times), zero, one, False, 0.0, 0.0
    )[0]


def merge(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (F,) of parts of equal size from those of each part, (N, F)."""
    mean = means.mean(0)
    return mean, (variances.mean(0) + means.var(0, correction=0)).clamp(min=0)


class FoldedBatchNorm(torch.autograd.Function):
    """y = w (x - mean) / sqrt(var + eps) + b over batch and space."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Also gives mean and (biased) variance, both (F,)."""
        times = WIDTH // x.shape[1]
        wide = widen(x, times)
        one = weight.new_ones(WIDTH)  # float32, so that the statistics are
        _, means, inverses = torch.native_batch_norm(wide, one, None, None, None, True, 0.0, eps)
        means, variances = (v.view(-1, x.shape[1]) for v in (means, inverses**-2 - eps))
        mean, var = merge(means, variances)
        inverse = (var + eps).rsqrt()
        scale = weight * inverse
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.mark_non_differentiable(mean, var)
        return narrow(affine(wide, scale, bias - scale * mean), times), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Dx = w/s (g - mean(g) - h mean(g h)) with h = (x - mean)/s."""
        x, mean, inverse, weight = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        times = WIDTH // len(mean)
        wide, wide_grad = widen(x, times), widen(grad.contiguous(memory_format=LAYOUT), times)
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            wide_grad,
            wide,
            weight.new_ones(WIDTH),
            None,
            None,
            mean.repeat(times),
            inverse.repeat(times),
            True,
            0.0,
            [False, True, True],
        )
        for_weight, for_bias = (v.view(times, -1).sum(0) for v in (for_weight, for_bias))
        a = weight * inverse
        b = -a * inverse * for_weight / count
        c = -a * for_bias / count - b * mean
        dx = affine(wide_grad, a, c) + affine(wide, b, torch.zeros_like(b))
        return narrow(dx, times), for_weight, for_bias, None
