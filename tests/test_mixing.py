from __future__ import annotations

import pytest
import torch

from vclipseg.mixing import cutmix_box, random_box, swap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "share"), [((16, 16, 16), 0.67), ((9, 12, 6), 0.5)])
def test_box_takes_its_share_of_each_side(shape, share):
    box = random_box(shape, share, generator())
    sides = [int(share * size) for size in shape]
    assert box.dtype == torch.bool
    assert int(box.sum()) == sides[0] * sides[1] * sides[2]
    for axis, side in enumerate(sides):
        others = tuple(a for a in range(3) if a != axis)
        held = box.any(others[1]).any(others[0]).nonzero().flatten().tolist()
        assert held == list(range(held[0], held[0] + side))  # in one piece


def test_box_lies_anywhere():
    boxes = torch.stack([random_box((8, 8, 8), 0.5, generator(seed)) for seed in range(1500)])
    assert boxes.any(0).all()
    corners = {tuple(box.nonzero()[0].tolist()) for box in boxes}
    assert len(corners) > 50


def test_box_is_a_function_of_the_generator():
    boxes = [random_box((8, 8, 8), 0.5, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


@pytest.mark.parametrize("kind", [(2, 1), (2,)], ids=["images", "labels"])
def test_swap_exchanges_what_is_inside(kind):
    first, second = torch.randn(*kind, 4, 4, 4), torch.randn(*kind, 4, 4, 4)
    mask = random_box((4, 4, 4), 0.5, generator())
    mine, theirs = swap(first, second, mask)
    assert torch.equal(mine[..., mask], second[..., mask])
    assert torch.equal(mine[..., ~mask], first[..., ~mask])
    assert torch.equal(theirs[..., mask], first[..., mask])
    assert torch.equal(theirs[..., ~mask], second[..., ~mask])
    assert all(
        torch.equal(a, b) for a, b in zip(swap(mine, theirs, mask), (first, second), strict=True)
    )


def corners(box):
    """First and last voxel along each axis."""
    held = [box.any(d2).any(d1).nonzero().flatten() for d1, d2 in ((1, 2), (0, 2), (0, 1))]
    return [(int(h[0]), int(h[-1])) for h in held]


def test_cutmix_box_is_the_published_one():
    for seed in range(60):
        box = cutmix_box((112, 112, 80), generator(seed))
        (x0, x1), (y0, y1), (z0, z1) = corners(box)
        width = y1 - y0 + 1
        assert 57 <= width <= 111
        assert x1 - x0 + 1 == round(6272 / width)
        assert z1 - z0 + 1 == 10
        assert z0 <= 60
        assert int(box.sum()) == (x1 - x0 + 1) * width * 10  # in one piece


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 24, 6), (64, 64, 48), (3, 2, 1)])
def test_cutmix_box_fits_any_patch(shape):
    boxes = torch.stack([cutmix_box(shape, generator(seed)) for seed in range(100)])
    assert boxes.shape[1:] == shape
    planes = boxes.any(3).float().mean((1, 2))
    assert (planes - 0.5).abs().max() <= 1 / min(shape[:2])  # half of the plane, rounded
    reached = boxes.any(0)
    assert reached.any(2).any(1).all()
    assert reached.any(2).any(0).all()
    assert reached.any(1).any(0).sum() >= 0.75 * shape[2]
