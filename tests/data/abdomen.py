"""A made-up abdomen: enough of a CT to see whether a label lies on its organ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHAPE = (40, 36, 12)


def abdomen(shape: Sequence[int] = SHAPE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU, float32 of whole numbers `(X, Y, Z)`, and the pancreas in it, bool.

    Fat around a pancreas; where it would lie if it were mirrored there are other soft organs.
    """
    rng = np.random.default_rng(seed)
    x, y, z = (
        np.linspace(-1, 1, n).reshape(s)
        for n, s in zip(shape, np.eye(3, dtype=int) * -2 + 1, strict=True)
    )

    def ball(center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        near = [((u - c) / r) ** 2 for u, c, r in zip((x, y, z), center, radii, strict=True)]
        return near[0] + near[1] + near[2] < 1

    hu = np.full(tuple(shape), -1000.0)
    hu[ball((0, 0, 0), (0.95, 0.85, 3))] = -100  # fat
    hu[ball((0.45, 0.1, 0), (0.4, 0.6, 3))] = 55  # an organ on the other side
    hu[ball((-0.4, 0.5, 0), (0.4, 0.25, 3))] = 40  # and one behind
    hu[ball((0, -0.7, 0), (0.5, 0.1, 3))] = 60
    pancreas = ball((-0.35, -0.2, -0.35), (0.3, 0.17, 0.4)) | ball(
        (-0.5, -0.1, -0.1), (0.12, 0.3, 0.4)
    )
    hu[pancreas] = 150
    hu += rng.normal(0, 8, shape)
    return np.rint(hu).astype(np.float32), pancreas
