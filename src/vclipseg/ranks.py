"""Several processes, the ranks, that train one model together, on one machine or on many.

Each rank computes a loss L_r of its own patches, and what is minimized is their mean

    L = (1/N) sum_r L_r,    dL/dw = mean_r of the gradient that rank r is left with

(`average_gradients`, after backward). A mean over a rank's patches is its share of L as it stands, for all
ranks have as many. What is no mean, as a Dice loss is none, is written with sums over the patches of all
ranks: S = across(s) is sum_r s_r on each. Then every L_r is the loss of the joint batch, and so is L. Each
L_r depends on s_r, so backward sums what comes to S over the ranks.

`torchrun` starts the ranks. With one process, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vclipseg.errors import Stopped, UsageError, VclipsegError

T = TypeVar("T", float, Tensor)

PATIENCE = timedelta(days=1)
"""How long a rank waits for the others, who may be preparing the data."""
APART = 1_000_000_007
"""Between the seeds of two ranks."""


def count() -> int:
    """N, the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """How many `torchrun` started; they train together once they have `joined`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def is_first() -> bool:
    """Whether this is the rank that writes and speaks."""
    return rank() == 0


def local_rank() -> int:
    """Which of those on this machine it is; it has the GPU of that number."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() > 1 else 0


def local_count() -> int:
    """How many there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that `torchrun` started are ranks; without `torchrun` there is one.

    Raises:
        UsageError: there are fewer GPUs on this machine than processes.
    """
    if launched() == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"{local_count()} processes on a machine with {torch.cuda.device_count()} GPU(s); "
                "start as many as there are: torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except Stopped:  # all of them have, at the same step
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class _Across(torch.autograd.Function):
    """Sum over ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """S = sum_r x_r, the same on each rank."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """dL/dx_r = sum of dL/dS over the ranks' copies of S."""
        return _Across.forward(ctx, grad)


def across(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks, differentiable; every rank must ask for the same sums in turn."""
    return x if count() == 1 else _Across.apply(x)


def mean(x: T) -> T:
    """The mean of a number over ranks, without gradient."""
    if count() == 1:
        return x
    total = across(torch.as_tensor(x).detach()) / count()
    return total if isinstance(x, Tensor) else total.item()


def highest(number: int) -> int:
    """The highest of the ranks' numbers."""
    if count() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather(x: Tensor) -> Tensor:
    """(...) of each rank -> (N, ...), without gradient."""
    if count() == 1:
        return x[None]
    rows = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(rows, x.contiguous())
    return torch.stack(rows)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Give each parameter the mean of its gradients, in one exchange.

    None counts as 0, but stays None where every rank has it.
    """
    if count() == 1:
        return
    held = across(torch.tensor([p.grad is not None for p in parameters]).int()).tolist()
    moved = [p for p, ranks in zip(parameters, held, strict=True) if ranks]
    for p in moved:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    means = across(torch.cat([p.grad.flatten() for p in moved])) / count()  # type: ignore[union-attr]
    for p, mean in zip(moved, means.split([p.numel() for p in moved]), strict=True):
        p.grad.copy_(mean.view_as(p))  # type: ignore[union-attr]


@contextmanager
def own_draws() -> Iterator[None]:
    """Within it torch's random numbers differ between ranks; after it they go on as before, alike."""
    if count() == 1:
        yield
        return
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(own_seed(torch.initial_seed(), rank()))
        yield


def own_seed(seed: int, rank: int) -> int:
    """A seed of one of several ranks, made of the one that all have; it is none of theirs."""
    return seed + APART * (rank + 1)


@contextmanager
def in_turns() -> Iterator[None]:
    """The first rank goes ahead, then the first of each machine, then all: later ones find a full cache."""
    turn = 0 if is_first() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        wait()
    yield
    for _ in range(2 - turn):
        wait()


def wait() -> None:
    """Until all ranks are here.

    Raises:
        VclipsegError: one of them failed.
    """
    try:
        across(torch.zeros(()))
    except RuntimeError as error:
        raise VclipsegError(f"rank {rank()}: another one failed, see its message") from error
