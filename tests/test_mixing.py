from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vclipseg.mixing import (
    box_mask,
    centered_boxes,
    cutmix_box,
    maybe_boxes,
    paste,
    random_box,
    stretched_box,
    swap,
)


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


def extent(box):
    """Start and stop of a mask on each axis; it must be one whole box."""
    if not box.any():
        return None
    held = box.nonzero()
    start, stop = held.amin(0).tolist(), (held.amax(0) + 1).tolist()
    assert int(box.sum()) == math.prod(b - a for a, b in zip(start, stop, strict=True))
    return start, stop


@pytest.mark.parametrize("kind", [(3, 2), (3,)], ids=["images", "labels"])
def test_paste_row_by_row(kind):
    onto, source = torch.randn(*kind, 4, 5, 6), torch.randn(*kind, 4, 5, 6)
    masks = torch.rand(3, 4, 5, 6) < 0.5
    found = paste(onto, source, masks)
    for i in range(3):
        assert torch.equal(found[i][..., masks[i]], source[i][..., masks[i]])
        assert torch.equal(found[i][..., ~masks[i]], onto[i][..., ~masks[i]])


def test_a_box_that_sticks_out_is_cut_off():
    assert extent(box_mask((4, 5, 6), (-2, 1, 3), (2, 4, 9))) == ([0, 1, 3], [2, 4, 6])
    assert not box_mask((4, 5, 6), (-3, 1, 3), (-1, 4, 9)).any()
    assert not box_mask((4, 5, 6), (5, 1, 3), (7, 4, 9)).any()
    assert not box_mask((4, 5, 6), (1, 2, 3), (1, 4, 5)).any()


def test_centered_boxes_in_numpy():
    """Beta(4, 4) as the fourth of seven uniform numbers; centers from an eighth of the axis on."""
    shape = (16, 24, 12)
    for seed in range(20):
        rng = generator(seed)
        beta = sorted(torch.rand(7, generator=rng).tolist())[3]
        sides = [int(math.sqrt(1 - beta) * size) for size in shape]
        for box in centered_boxes(3, shape, generator(seed)):
            expected = np.zeros(shape, dtype=bool)
            low, high = [], []
            for size, side in zip(shape, sides, strict=True):
                center = int(torch.randint(size // 8, size, (), generator=rng))
                low.append(max(center - side // 2, 0))
                high.append(min(center + side // 2, size))
            expected[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = True
            assert np.array_equal(box.numpy(), expected)


def test_the_median_of_uniform_numbers_is_beta():
    """Mean 1/2 and variance 1/36 of Beta(4, 4)."""
    medians = torch.rand((20_000, 7), generator=generator()).median(1).values
    assert float(medians.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(medians.var()) == pytest.approx(1 / 36, rel=0.05)


def test_stretched_box_has_its_volume_and_lies_anywhere():
    shape = (32, 32, 24)
    shares, corners = [], set()
    for seed in range(300):
        start, stop = extent(stretched_box(shape, generator(seed)))
        share, ratio, *_ = torch.rand(5, generator=generator(seed)).tolist()
        volume = (0.02 + 0.38 * share) * math.prod(shape)
        ratio = 0.3 + (1 / 0.3 - 0.3) * ratio
        wanted = [(volume / ratio) ** (1 / 3), (volume * ratio) ** (1 / 3), volume ** (1 / 3)]
        sides = [b - a for a, b in zip(start, stop, strict=True)]
        assert sides == [min(int(w), n) for w, n in zip(wanted, shape, strict=True)]
        assert all(a >= 0 and b <= n for a, b, n in zip(start, stop, shape, strict=True))
        shares.append(volume / math.prod(shape))
        corners.add(tuple(start))
    assert min(shares) < 0.05
    assert max(shares) > 0.37
    assert len(corners) > 200


def test_reversed_box_has_its_first_and_last_axis_exchanged():
    shape, cut = (32, 32, 16), 0
    for seed in range(100):
        start, stop = extent(stretched_box(shape, generator(seed)))
        a, b = start[::-1], [min(m, n) for m, n in zip(stop[::-1], shape, strict=True)]
        found = extent(stretched_box(shape, generator(seed), reverse=True))
        if any(m >= n for m, n in zip(a, b, strict=True)):
            assert found is None
        else:
            assert found == (a, b)
        cut += found is None or b != stop[::-1]
    assert cut > 10


def test_boxes_that_may_be_empty():
    boxes = maybe_boxes(400, (8, 8, 8), generator())
    assert boxes.shape == (400, 8, 8, 8)
    assert float(boxes.flatten(1).any(1).float().mean()) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("shape", [(16, 16, 1), (1, 16, 5), (2, 2, 2)])
def test_boxes_of_thin_patches(shape):
    for seed in range(20):
        assert maybe_boxes(2, shape, generator(seed)).shape == (2, *shape)
        assert centered_boxes(2, shape, generator(seed)).shape == (2, *shape)


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
