"""Pictures of the docs that are drawn, not taken: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from vclipseg.data.contours import outlines
from vclipseg.data.dicom_seg import COLORS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent / "images"


def contours(path: Path) -> None:
    """A made-up slice of two organs, the one with a hole: their contours, and a part of it enlarged."""
    x, y = np.indices((72, 56))
    wall = ((x - 30) / 22) ** 2 + ((y - 28) / 18) ** 2 < 1
    wall &= ((x - 26) / 9) ** 2 + ((y - 26) / 6.5) ** 2 > 1
    beside = (((x - 57) / 9) ** 2 + ((y - 30) / 13) ** 2 < 1) & ~wall
    noise = np.random.default_rng(0).normal(0, 0.05, x.shape)
    image = 0.25 + 0.35 * wall + 0.55 * beside + noise
    figure, (whole, part) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, width in ((whole, 1.4), (part, 2.4)):
        axes.imshow(image.T, cmap="gray", vmin=0, vmax=1.1, interpolation="nearest")
        for mask, color in ((wall, COLORS[0]), (beside, COLORS[1])):
            for polygon in outlines(mask):
                closed = np.vstack([polygon, polygon[:1]])
                axes.plot(*closed.T, color=color, lw=width, solid_joinstyle="miter")
        axes.set_axis_off()
    part.set(xlim=(6.5, 24.5), ylim=(34.5, 20.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    contours(IMAGES / "contours.png")
