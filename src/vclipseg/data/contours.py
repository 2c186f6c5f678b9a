"""Masks of one slice as closed polygons, and back.

A polygon runs along the edges of pixels, so that its area is that of the pixels and no pixel's center
lies on it. A hole is joined to its outline by a keyhole: the polygon runs to the hole, round it, and back
the way it came, along edges of pixels too. What is inside is the same by the even-odd and the nonzero rule.

Coordinates are in pixels: the center of pixel `(i, j)` is at `(i, j)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

ON_CENTER = 0.02
"""Pixels: a center as close as this to a polygon lies on it."""
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # each a left turn from the one before

Corner = tuple[int, int]
"""Corner `(i, j)` is where pixel `(i, j)` begins: at `(i - 0.5, j - 0.5)`."""


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Polygons `(N, 2)` around the pixels of a mask `(X, Y)`, counterclockwise, holes by keyholes.

    Pixels that touch at a corner only are in polygons of their own.
    """
    loops = list(_loops(mask))
    owner = {corner: number for number, loop in enumerate(loops) for corner in loop}
    joined = list(range(len(loops)))  # a hole's loop is that of its outline, once it is joined
    for number in sorted(
        (n for n, loop in enumerate(loops) if _area(loop) < 0), key=lambda n: min(loops[n])
    ):
        hole = loops[number]
        start = hole.index(min(hole))
        x, y = hole[start]
        while (x := x - 1, y) not in owner:  # to the left all is inside, up to a loop done before
            pass
        outline = joined[number] = joined[owner[x, y]]
        at = loops[outline].index((x, y))
        around = hole[start:] + hole[: start + 1]
        loops[outline][at + 1 : at + 1] = [*around, (x, y)]
    kept = (loop for number, loop in enumerate(loops) if joined[number] == number)
    return [_turns(np.array(loop)) - 0.5 for loop in kept]


def _loops(mask: np.ndarray) -> Iterator[list[Corner]]:
    """Corners along the edges between inside and outside, the inside on the left."""
    leaving = _edges(mask)
    while leaving:
        start, ways = next(iter(leaving.items()))
        corner, way = start, ways[0]
        loop = []
        while True:
            loop.append(corner)
            ways = leaving[corner]
            ways.remove(way)
            if not ways:
                del leaving[corner]
            corner = (corner[0] + _STEPS[way][0], corner[1] + _STEPS[way][1])
            onward = leaving.get(corner)
            if onward is None or (corner == start and (way + 1) % 4 not in onward):
                break
            left = (way + 1) % 4  # where two pixels touch at a corner, stay with the same one
            way = left if left in onward else onward[0]
        yield loop


def _edges(mask: np.ndarray) -> dict[Corner, list[int]]:
    """Corner -> the steps (indices of `_STEPS`) of the edges that leave it."""
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    outside = (padded[1:-1, :-2], padded[2:, 1:-1], padded[1:-1, 2:], padded[:-2, 1:-1])
    begins = ((0, 0), (1, 0), (1, 1), (0, 1))  # below, right, above, left of a pixel
    leaving: dict[Corner, list[int]] = {}
    for way, (beside, begin) in enumerate(zip(outside, begins, strict=True)):
        for i, j in (np.argwhere(inside & ~beside) + begin).tolist():
            leaving.setdefault((i, j), []).append(way)
    return leaving


def _area(loop: list[Corner]) -> float:
    """Twice the area; negative if clockwise, as holes are."""
    x, y = np.array(loop).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def _turns(corners: np.ndarray) -> np.ndarray:
    """Only the corners `(N, 2)` where a polygon turns."""
    steps = np.sign(np.roll(corners, -1, axis=0) - corners)
    return corners[(steps != np.roll(steps, 1, axis=0)).any(axis=1)]


def filled(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The pixels `(X, Y)` whose centers are within an odd number of polygons, or on one.

    Args:
        polygons: `(N, 2)` each, closed by their first point.
        shape: X, Y.
    """
    marks = np.zeros((shape[1], shape[0] + 1), dtype=np.int32)  # +1 where a run begins, -1 after it
    for row, first, last in zip(*_runs(polygons), strict=True):
        begin, end = np.ceil(first - ON_CENTER), np.floor(last + ON_CENTER) + 1
        begin, end = np.clip((begin, end), 0, shape[0]).astype(int)
        held = (row >= 0) & (row < shape[1]) & (begin < end)
        np.add.at(marks, (row[held], begin[held]), 1)
        np.add.at(marks, (row[held], end[held]), -1)
    return (np.cumsum(marks, axis=1)[:, :-1] > 0).T


def _runs(polygons: Iterable[np.ndarray]) -> tuple[list[np.ndarray], ...]:
    """Rows, and where on them something inside begins and ends: of the inside, then of the rims."""
    starts, ends = [np.empty((0, 2))], [np.empty((0, 2))]
    for polygon in polygons:
        near = np.rint(polygon)
        points = np.where(np.abs(polygon - near) < ON_CENTER, near, polygon)
        starts.append(points)
        ends.append(np.roll(points, -1, axis=0))
    a, b = np.concatenate(starts), np.concatenate(ends)
    row, x = _crossings(a, b)
    order = np.lexsort((x, row))
    row, x = row[order], x[order]
    flat = (a[:, 1] == b[:, 1]) & (a[:, 1] % 1 == 0)  # edges along a row of centers
    corner = a[:, 1] % 1 == 0
    rows = [row[::2], a[flat, 1].astype(int), a[corner, 1].astype(int)]
    firsts = [x[::2], np.minimum(a, b)[flat, 0], a[corner, 0]]
    lasts = [x[1::2], np.maximum(a, b)[flat, 0], a[corner, 0]]
    return rows, firsts, lasts


def _crossings(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of centers that edges from `a` to `b` `(N, 2)` cross, and where; the upper end is not theirs."""
    low = np.ceil(np.minimum(a, b)[:, 1]).astype(int)
    count = np.ceil(np.maximum(a, b)[:, 1]).astype(int) - low
    edge = np.repeat(np.arange(len(a)), count)
    row = low[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    (ax, ay), (bx, by) = a[edge].T, b[edge].T
    return row, ax + (row - ay) * (bx - ax) / (by - ay)
