"""Relations against loops over windows and over the queue."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vclipseg.networks.relation import global_relation, local_relation

WINDOWS = (3, 2, 1)  # of 8 cells, each 4 on: 16 x 12 x 8 cells


def softmax(x):
    power = np.exp(x - x.max())
    return power / power.sum()


def naive_divergence(student, teacher, queue, temperature, window, stride):
    """Mean over images and windows of the KL divergence; maps (B, E, x, y, z)."""
    counts = [(n - window) // stride + 1 for n in student.shape[2:]]
    values = []
    for s, t in zip(student, teacher, strict=True):
        for i in np.ndindex(*counts):
            part = (slice(None), *(slice(stride * n, stride * n + window) for n in i))
            relations = []
            for x in (s, t):
                a = x[part].flatten()
                cosines = [
                    a @ q[part].flatten() / np.linalg.norm(a) / np.linalg.norm(q[part])
                    for q in queue
                ]
                relations.append(softmax(np.array(cosines) / temperature))
            p, q = relations[1], relations[0]
            values.append((p * np.log(p / q)).sum())
    return np.mean(values)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_divergence_formula(kind):
    torch.manual_seed(0)
    if kind == "global":
        relation, shape = global_relation(8, 12, size=5), (12, 1, 1, 1)
    else:
        relation, shape = local_relation(2, WINDOWS, size=5), (2, 16, 12, 8)
    assert relation.queue.held.shape == (5, *shape)
    student, teacher = torch.randn(2, 3, *shape).double()
    relation.double()
    found = relation.divergence(student.float(), teacher.float(), 0.1)
    queue = relation.queue.held.numpy()
    expected = naive_divergence(
        student.numpy(), teacher.numpy(), queue, 0.1, relation.window, relation.stride
    )
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(relation.divergence(teacher, teacher, 0.1)) == pytest.approx(0, abs=1e-6)


def test_a_map_of_zeros_is_no_nan():
    relation = local_relation(2, WINDOWS, size=5)
    zeros = torch.zeros(1, 2, 16, 12, 8, requires_grad=True)
    value = relation.divergence(zeros, torch.randn(1, 2, 16, 12, 8), 0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(zeros.grad).all()


def test_published_windows():
    """700 of 20 voxels a side, each 10 on, in a patch of 112 x 112 x 80; 8 cells a side."""
    relation = local_relation(2, (10, 10, 7), size=1)
    cosines = relation.cosines(relation.student(torch.randn(1, 2, 112, 112, 80)))
    assert cosines.shape[2:].numel() == 700
    assert 112 / relation.queue.rows.shape[2] * 8 == pytest.approx(20, abs=0.5)
    assert 80 / relation.queue.rows.shape[4] * 8 == 20


def test_heads_are_the_published_layers():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    whole, pieces = global_relation(128, 512, size=1), local_relation(2, (1, 1, 1), size=1)
    assert count(whole.head) == 129 * 128 + 129 * 512
    assert count(whole.predictor) == 2 * 513 * 512
    assert count(pieces.head) == 3 * 4 + 5 * 2
    assert count(pieces.predictor) == 2 * 3 * 2


@pytest.mark.parametrize("size", [(16, 16, 16), (20, 31, 9)])
def test_memory_does_not_depend_on_the_patch(size):
    whole, pieces = global_relation(4, 6, size=3), local_relation(3, WINDOWS, size=3)
    whole.queue.push(whole.head(torch.randn(2, 4, *(n // 8 for n in size))))
    pieces.queue.push(pieces.head(torch.randn(2, 3, *size)))
    assert whole.queue.held.shape == (3, 6, 1, 1, 1)
    assert pieces.queue.held.shape == (3, 3, 16, 12, 8)
