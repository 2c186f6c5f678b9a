"""Memories of fixed size: first in, first out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The last `size` tensors of one shape.

    It begins with `held` standard normal ones. All of it is in `state_dict()`, and nothing of it
    depends on what is pushed.
    """

    rows: Tensor  # (size, *shape)
    pushed: Tensor  # how many rows were ever written

    def __init__(self, size: int, shape: tuple[int, ...], held: int) -> None:
        super().__init__()
        rows = torch.zeros(size, *shape)
        rows[:held].normal_()
        self.register_buffer("rows", rows)
        self.register_buffer("pushed", torch.tensor(held))

    @property
    def held(self) -> Tensor:
        """(N, *shape), what it holds, in no order that means anything."""
        return self.rows[: int(self.pushed)]

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Take (N, *shape) in; the oldest go."""
        size = len(self.rows)
        rows = rows[-size:]
        places = (torch.arange(len(rows), device=rows.device) + self.pushed) % size
        self.rows[places] = rows.to(self.rows.dtype)
        self.pushed += len(rows)
