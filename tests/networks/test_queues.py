from __future__ import annotations

import torch

from vclipseg.networks.queues import Queue


def numbered(*values):
    return torch.tensor(values).float()[:, None].expand(-1, 2)


def test_first_in_first_out():
    queue = Queue(3, (2,), held=0)
    assert queue.held.shape == (0, 2)
    queue.push(numbered(1, 2))
    assert queue.held[:, 0].tolist() == [1, 2]
    queue.push(numbered(3, 4))
    assert set(queue.held[:, 0].tolist()) == {2, 3, 4}
    queue.push(numbered(5, 6, 7, 8, 9))
    assert set(queue.held[:, 0].tolist()) == {7, 8, 9}
    queue.push(numbered(10))
    assert set(queue.held[:, 0].tolist()) == {8, 9, 10}
    queue.push(numbered()[:0])
    assert set(queue.held[:, 0].tolist()) == {8, 9, 10}


def test_it_begins_with_random_tensors_and_loses_them_first():
    torch.manual_seed(0)
    queue = Queue(3, (2,), held=1)
    (first,) = queue.held.tolist()
    assert all(first)
    queue.push(numbered(1, 2))
    assert first in queue.held.tolist()
    queue.push(numbered(3))
    assert set(queue.held[:, 0].tolist()) == {1, 2, 3}


def test_state_is_of_one_shape_and_complete():
    queue, other = Queue(4, (2,), held=1), Queue(4, (2,), held=1)
    shapes = {k: v.shape for k, v in queue.state_dict().items()}
    queue.push(numbered(1, 2))
    assert {k: v.shape for k, v in queue.state_dict().items()} == shapes
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(numbered(3, 4))
    assert torch.equal(queue.held, other.held)


def test_what_is_held_has_no_gradient():
    queue = Queue(2, (2,), held=0)
    queue.push(torch.ones(1, 2, requires_grad=True))
    assert not queue.held.requires_grad
    assert not list(queue.parameters())
