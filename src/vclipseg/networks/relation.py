"""Relations: what a network's image looks like among the images that were before.

ARCO's pre-training (You et al., NeurIPS 2023) lets a student see a queue Q of an averaged teacher's
outputs as that teacher sees it:

    KL( softmax_j(cos(t, q_j) / T) || softmax_j(cos(s, q_j) / T) ),   j = 1 .. size of the queue

t and s are maps. In the global relation they are one vector an image; in the local one they are logits
on a coarse grid, and each overlapping window of the grid has a relation of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vclipseg.networks.queues import Queue
from vclipseg.networks.vnet import PointwiseConv3d

WINDOW = 8  # cells along the side of a local window; the next begins half a window on


def pointwise(*widths: int) -> nn.Sequential:
    """1x1x1 convolutions with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ReLU(), PointwiseConv3d(before, after)]
    return nn.Sequential(*layers[1:])


class Relation(nn.Module):
    """A head for student and teacher, a predictor for the student, and the teacher's queue.

    Args:
        head: maps (B, F, x, y, z) of any grid to maps (B, E, x, y, z) of one grid.
        predictor: (B, E, x, y, z) to the same shape.
        queue: of such maps (E, x, y, z).
        window: cells along the side of a window.
        stride: cells between windows.
    """

    def __init__(
        self, head: nn.Module, predictor: nn.Module, queue: Queue, window: int, stride: int
    ) -> None:
        super().__init__()
        self.head = head
        self.predictor = predictor
        self.queue = queue
        self.window = window
        self.stride = stride

    def student(self, x: Tensor) -> Tensor:
        """s, (B, E, x, y, z)."""
        return self.predictor(self.head(x))

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) of the relations, mean over images and windows."""
        log_s, log_t = (
            (self.cosines(x.float()) / temperature).log_softmax(1) for x in (student, teacher)
        )
        return (log_t.exp() * (log_t - log_s)).sum(1).mean()

    def cosines(self, x: Tensor) -> Tensor:
        """(B, E, x, y, z) -> (B, N, windows along x, y, z) for the N maps of the queue."""
        queue = self.queue.held
        overlap = self.sums((x[:, None] * queue).sum(2))
        norms = self.sums(x.square().sum(1, keepdim=True)) * self.sums(queue.square().sum(1))
        return overlap * norms.clamp(min=1e-16).rsqrt()

    def sums(self, x: Tensor) -> Tensor:
        """Over the cells of each window, as `avg_pool3d` has them: the mean does as well."""
        return F.avg_pool3d(x, self.window, self.stride)


def global_relation(channels: int, embedding: int, size: int) -> Relation:
    """Of one vector an image, from maps of `channels`."""
    head = nn.Sequential(nn.AdaptiveAvgPool3d(1), *pointwise(channels, channels, embedding))
    queue = Queue(size, (embedding, 1, 1, 1), held=size)
    return Relation(head, pointwise(*(embedding,) * 3), queue, 1, 1)


def local_relation(channels: int, windows: tuple[int, int, int], size: int) -> Relation:
    """Of `windows` along x, y and z, each half over the next, from logits of `channels` classes."""
    cells = tuple(WINDOW // 2 * (n + 1) for n in windows)
    head = nn.Sequential(nn.AdaptiveAvgPool3d(cells), *pointwise(channels, 2 * channels, channels))
    queue = Queue(size, (channels, *cells), held=size)
    return Relation(head, pointwise(*(channels,) * 3), queue, WINDOW, WINDOW // 2)
