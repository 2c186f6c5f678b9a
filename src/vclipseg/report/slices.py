"""Slices in three planes with the outlines of reference and prediction, as inline SVG in mm."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from vclipseg.report.cases import ShownCase

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # name -> the RAS axis that is cut
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom
MAX_PIXELS = 360  # longest side of the image behind the outlines
SIMPLIFY = 0.15  # voxels an outline may be off, to be short


@dataclass(frozen=True)
class Panel:
    """One plane of one case and run."""

    plane: str
    width_mm: float
    svg: Markup


def planes(case: ShownCase, run: int, class_names: Sequence[str]) -> list[Panel]:
    """The three planes through the largest cross-section of the reference, cropped around it.

    Radiological: the patient's right is on the left, anterior or superior is up.
    """
    prediction = case.predictions.get(run)
    return [
        _panel(plane, cut, case, prediction, class_names, run) for plane, cut in cuts(case).items()
    ]


def cuts(case: ShownCase) -> dict[str, Cut]:
    """Plane -> the cut through the largest cross-section of the reference, around all masks."""
    masks = [mask for mask in (case.reference, *case.predictions.values()) if mask is not None]
    union = np.any([mask > 0 for mask in masks], axis=0)  # (X, Y, Z)
    center_of = next((mask > 0 for mask in masks if mask.any()), union)
    box = _box(union, case.spacing)
    return {
        plane: Cut(case.spacing, axis, _largest_slice(center_of, axis), box)
        for plane, axis in PLANES.items()
    }


@dataclass(frozen=True)
class Cut:
    """One plane: how a volume becomes a picture with rows down and columns right."""

    spacing: tuple[float, float, float]
    axis: int
    index: int
    box: tuple[slice, slice, slice]

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        """(X, Y, Z) -> (rows, columns)."""
        where = list(self.box)
        where[self.axis] = slice(self.index, self.index + 1)
        return np.flip(volume[tuple(where)].squeeze(self.axis).T)  # index grows to R, A, S

    @property
    def mm(self) -> tuple[float, float]:
        """Millimetres of one row and one column."""
        column, row = (self.spacing[axis] for axis in range(3) if axis != self.axis)
        return row, column

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width."""
        columns, rows = (
            part.stop - part.start for axis, part in enumerate(self.box) if axis != self.axis
        )
        return rows * self.mm[0], columns * self.mm[1]


def _panel(
    plane: str,
    cut: Cut,
    case: ShownCase,
    prediction: np.ndarray | None,
    class_names: Sequence[str],
    run: int,
) -> Panel:
    height, width = cut.size_mm
    parts = [_picture(cut, case.image, width, height)]
    if case.reference is not None:
        parts.append(_outlines(cut, case.reference, "reference", "reference", class_names))
    if prediction is not None:
        parts.append(
            _outlines(cut, prediction, f"prediction run{run % 8}", "prediction", class_names)
        )
    parts.append(_marks(EDGES[plane], width, height))
    told = f"{plane} slice {cut.index} of {case.case_id}, {width:.0f} by {height:.0f} mm"
    svg = Markup('<svg viewBox="0 0 {:.2f} {:.2f}" role="img" aria-label="{}">{}</svg>')
    return Panel(plane, width, svg.format(width, height, told, Markup("").join(parts)))


def _picture(cut: Cut, image: np.ndarray | None, width: float, height: float) -> Markup:
    if image is None:
        return Markup('<rect width="{:.2f}" height="{:.2f}" fill="#222"/>').format(width, height)
    low, high = np.percentile(image[cut.box], (0.5, 99.5))
    scaled = np.clip((cut(image) - low) / max(float(high - low), 1e-12), 0, 1)
    picture = Image.fromarray((scaled * 255).astype(np.uint8))
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    return Markup(
        '<image width="{:.2f}" height="{:.2f}" preserveAspectRatio="none" href="{}"/>'
    ).format(width, height, png_url(picture))


def png_url(picture: Image.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outlines(
    cut: Cut, mask: np.ndarray, look: str, who: str, class_names: Sequence[str]
) -> Markup:
    """Boundaries of every class; the line style tells the class, the colour who drew it."""
    picture = cut(mask)
    parts = []
    for index in (int(k) for k in np.unique(picture) if k > 0):
        name = class_names[index - 1] if index <= len(class_names) else f"class {index}"
        path = _outline(np.pad(picture == index, 1), cut.mm)
        style = f"{look} dash{(index - 1) % 5}"
        if who == "reference":  # white with a dark border shows on any grey
            parts.append(Markup('<path class="outline casing {}" d="{}"/>').format(style, path))
        shape = Markup('<path class="outline {}" d="{}"><title>{}</title></path>')
        parts.append(shape.format(style, path, f"{who}: {name}"))
    return Markup("").join(parts)


def _outline(padded: np.ndarray, mm: tuple[float, float]) -> str:
    pieces = []
    for contour in find_contours(padded.astype(np.float32), 0.5):
        points = (approximate_polygon(contour, SIMPLIFY) - 0.5) * mm  # pad of 1, centre at 0.5
        pieces.append("M" + "L".join(f"{x:.2f} {y:.2f}" for y, x in points) + "Z")
    return "".join(pieces)


def _marks(edges: str, width: float, height: float) -> Markup:
    """Which side is which, and how long a round number of millimetres is."""
    size = 0.055 * max(width, height)
    left, right, top, bottom = tuple(edges)
    text = Markup('<text class="edge" style="font-size:{:.2f}px" x="{:.2f}" y="{:.2f}">{}</text>')
    middle = (height + size) / 2
    places = [
        (0.6 * size, middle, left),
        (width - 0.6 * size, middle, right),
        (width / 2, size, top),
        (width / 2, height - 0.4 * size, bottom),
    ]
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(1.0, 0.35 * width))
    bar = Markup('<path class="scale" d="M{0:.2f} {1:.2f}h{2}"/>').format(
        0.5 * size, height - 0.5 * size, length
    )
    label = text.format(0.8 * size, 0.5 * size + length / 2, height - 0.8 * size, f"{length} mm")
    letters = [text.format(size, x, y, letter) for x, y, letter in places]
    return Markup("").join([*letters, bar, label])


def _largest_slice(mask: np.ndarray, axis: int) -> int:
    others = tuple(a for a in range(3) if a != axis)
    areas = mask.sum(axis=others)
    return int(areas.argmax()) if areas.any() else mask.shape[axis] // 2


def _box(mask: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
    """The voxels around a mask with a third of its extent (10 mm at least) on every side."""
    x, y, z = (_side(mask, axis, spacing[axis]) for axis in range(3))
    return x, y, z


def _side(mask: np.ndarray, axis: int, mm: float) -> slice:
    size = mask.shape[axis]
    hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    if not len(hit):
        return slice(0, size)
    room = max(0.33 * (hit[-1] - hit[0] + 1), 10 / mm)
    return slice(max(0, int(hit[0] - room)), min(size, int(hit[-1] + room) + 1))
