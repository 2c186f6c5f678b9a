"""Surfaces of reference and predictions side by side, as figure 2 of the VCLIPSeg paper shows them.

Marching cubes in mm, thinned until the page stays small, packed as 16-bit numbers for viewer.js; the
same surfaces drawn with Pillow stand in where a browser has no WebGL, and in print.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import KDTree
from skimage.measure import marching_cubes

from vclipseg.report.cases import ShownCase
from vclipseg.report.slices import png_url

COLORS = ("#d98e6e", "#7db0d6", "#93c592", "#c6a0d6", "#d8c46a", "#7cc7c0", "#e08ca0", "#a9a9a9")
TOTAL_VERTICES = 72_000  # of a whole report, at about 25 bytes each
MOST, FEWEST = 7_000, 700  # vertices of one surface
YAW, PITCH = -0.5, 0.3  # radians: seen from the front, a little from the left and above


@dataclass(frozen=True, eq=False)
class Mesh:
    """One class's surface.

    Attributes:
        points: (N, 3) RAS+ mm.
        faces: (M, 3) indices into points.
        errors: (N,) mm to the reference's surface, positive outside of it; None without reference.
    """

    class_index: int
    points: np.ndarray
    faces: np.ndarray
    errors: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Panel:
    """What one part of the view shows: the reference (run None) or the prediction of a run."""

    title: str
    run: int | None
    meshes: tuple[Mesh, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """One case, seen in panels that turn together."""

    title: str
    case_id: str
    step_mm: float
    panels: tuple[Panel, ...]


def make_scene(case: ShownCase, run_names: Sequence[str], budget: int) -> Scene:
    """Surfaces of every class and panel of a case, all thinned alike so that they compare.

    Args:
        case: masks on one RAS grid.
        run_names: by run index.
        budget: vertices one surface may have.
    """
    masks: list[tuple[str, int | None, np.ndarray]] = []
    if case.reference is not None:
        masks.append(("reference", None, case.reference))
    masks += [(run_names[run], run, mask) for run, mask in case.predictions.items()]
    classes = sorted({int(k) for _, _, mask in masks for k in np.unique(mask) if k > 0})
    stride = _stride([mask for _, _, mask in masks], classes, case.spacing, budget)
    edges = {k: _reference_edges(case, k) for k in classes}
    panels = []
    for title, run, mask in masks:
        found = [_mesh(case, mask, k, stride, None if run is None else edges[k]) for k in classes]
        panels.append(Panel(title, run, tuple(mesh for mesh in found if mesh)))
    step = max(s * mm for s, mm in zip(stride, case.spacing, strict=True))
    return Scene(case.title, case.case_id, step, tuple(panels))


def vertex_budget(num_surfaces: int) -> int:
    """Vertices a surface may have when a report shows this many."""
    return int(np.clip(TOTAL_VERTICES / max(num_surfaces, 1), FEWEST, MOST))


def pack(scenes: Sequence[Scene], class_names: Sequence[str]) -> dict[str, Any]:
    """What viewer.js reads: JSON with base64 little-endian numbers, one scale a case."""
    limit = error_limit(scenes)
    return {
        "colors": COLORS,
        "classNames": list(class_names),
        "limit": limit,
        "yaw": YAW,
        "pitch": PITCH,
        "scenes": [_pack_scene(scene, limit) for scene in scenes],
    }


def error_limit(scenes: Sequence[Scene]) -> float:
    """A round number of mm at which the error colours end: most of the errors are below."""
    errors = [mesh.errors for s in scenes for p in s.panels for mesh in p.meshes]
    finite = np.concatenate([np.abs(e) for e in errors if e is not None] or [np.zeros(1)])
    top = float(np.percentile(finite, 95))
    return next((mm for mm in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if mm >= top), 100.0)


def draw(scene: Scene, size: int = 260) -> dict[str, str]:
    """Panel title -> PNG data URL, from the viewer's first point of view."""
    titles = [panel.title for panel in scene.panels]
    return dict(zip(titles, map(png_url, pictures(scene, size)), strict=False))


def pictures(scene: Scene, size: int) -> list[Image.Image]:
    """Each panel from the viewer's first point of view, all to one scale; none without a surface."""
    points = [mesh.points for panel in scene.panels for mesh in panel.meshes]
    if not points:
        return []
    center, reach = _extent(points)
    return [_draw_panel(panel, center, reach, size) for panel in scene.panels]


def _mesh(
    case: ShownCase, mask: np.ndarray, k: int, stride: tuple[int, ...], edges: KDTree | None
) -> Mesh | None:
    """One class's surface in RAS mm; None where the mask has none."""
    if not (mask == k).any():
        return None
    corner, box = _cropped(mask == k)
    field, level = _field(box, stride)
    points, faces, _, _ = marching_cubes(field, level, gradient_direction="ascent")
    voxels = points * stride + (np.array(stride) - 1) / 2 + corner
    world = voxels @ case.affine[:3, :3].T + case.affine[:3, 3]
    if np.linalg.det(case.affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    errors = None
    if edges is not None and case.reference is not None:
        inside = map_coordinates((case.reference == k).astype(np.float32), voxels.T, order=1) > 0.5
        distance, _ = edges.query(world)
        errors = np.where(inside, -distance, distance)
    return Mesh(k, world.astype(np.float32), faces, errors)


def _field(box: np.ndarray, stride: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """What is smooth of a mask, and the level at which its surface is drawn."""
    field = gaussian_filter(_coarse(box, stride), 0.6)
    return field, min(0.5, 0.5 * float(field.max()))  # a thin structure is drawn thick, not dropped


def _reference_edges(case: ShownCase, k: int) -> KDTree | None:
    """The centres of the faces between the reference's voxels and others, in mm."""
    if case.reference is None or not (case.reference == k).any():
        return None
    corner, box = _cropped(case.reference == k)
    found = []
    for axis in range(3):
        half = np.eye(3)[axis] / 2
        found.append(np.argwhere(np.diff(box.astype(np.int8), axis=axis)) + half + corner)
    voxels = np.concatenate(found)
    return KDTree(voxels @ case.affine[:3, :3].T + case.affine[:3, 3])


def _cropped(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask's box with three empty voxels around it, and the box's corner in voxels."""
    where = np.argwhere(mask)
    low, high = where.min(0), where.max(0) + 1
    box = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return low - 3, np.pad(box, 3)


def _coarse(mask: np.ndarray, stride: tuple[int, ...]) -> np.ndarray:
    """Share of the mask in every block of `stride` voxels."""
    padded = np.pad(mask, [(0, -size % s + s) for size, s in zip(mask.shape, stride, strict=True)])
    x, y, z = (size // s for size, s in zip(padded.shape, stride, strict=True))
    blocks = padded.reshape(x, stride[0], y, stride[1], z, stride[2])
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def _stride(
    masks: Sequence[np.ndarray], classes: Sequence[int], spacing: Sequence[float], budget: int
) -> tuple[int, ...]:
    """Voxels to put together along each axis so that no surface is over the budget."""
    boxes = [_cropped(mask == k)[1] for mask in masks for k in classes if (mask == k).any()]
    step = min(spacing)
    while True:
        stride = tuple(max(1, round(step / mm)) for mm in spacing)
        if all(_crossings(*_field(box, stride)) <= budget for box in boxes):
            return stride
        step *= 1.15


def _crossings(field: np.ndarray, level: float) -> int:
    """Neighbours on both sides of a level: marching cubes makes one vertex of each pair."""
    mask = field > level
    return sum(int(np.count_nonzero(np.diff(mask.view(np.int8), axis=axis))) for axis in range(3))


def _extent(points: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Centre, and the farthest point's distance from it, in mm."""
    low = np.min([p.min(0) for p in points], axis=0)
    high = np.max([p.max(0) for p in points], axis=0)
    center = (low + high) / 2
    return center, float(max(np.linalg.norm(p - center, axis=1).max() for p in points)) or 1.0


def _pack_scene(scene: Scene, limit: float) -> dict[str, Any]:
    points = [mesh.points for panel in scene.panels for mesh in panel.meshes]
    center, reach = _extent(points) if points else (np.zeros(3), 1.0)

    def packed(mesh: Mesh) -> dict[str, Any]:
        errors = mesh.errors
        shares = None if errors is None else np.clip(errors / limit, -1, 1) * 127
        return {
            "class": mesh.class_index,
            "points": _base64((mesh.points - center) / reach * 32767, "<i2"),
            "faces": _base64(mesh.faces, "<u2"),
            "errors": None if shares is None else _base64(shares, "<i1"),
        }

    panels = [{"title": p.title, "meshes": [packed(m) for m in p.meshes]} for p in scene.panels]
    return {"caseId": scene.case_id, "reach": reach, "panels": panels}


def _base64(numbers: np.ndarray, dtype: str) -> str:
    whole = np.rint(numbers) if np.issubdtype(numbers.dtype, np.floating) else numbers
    return base64.b64encode(np.ascontiguousarray(whole.astype(dtype)).tobytes()).decode()


def _rotation() -> np.ndarray:
    """RAS -> (right, up, towards the viewer), as viewer.js begins."""
    front = np.array([[-1, 0, 0], [0, 0, 1], [0, 1, 0]])
    c, s = np.cos(YAW), np.sin(YAW)
    yaw = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c, s = np.cos(PITCH), np.sin(PITCH)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ yaw @ front


def _draw_panel(panel: Panel, center: np.ndarray, reach: float, size: int) -> Image.Image:
    """Triangles from back to front, shaded by how they face the viewer."""
    canvas = Image.new("RGBA", (2 * size, 2 * size))
    brush = ImageDraw.Draw(canvas)
    triangles, colors = [], []
    for mesh in panel.meshes:
        view = (mesh.points - center) @ _rotation().T / reach  # (N, 3)
        corners = view[mesh.faces]  # (M, 3, 3)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        facing = np.abs(normal[:, 2]) / np.maximum(np.linalg.norm(normal, axis=1), 1e-12)
        base = np.array(Image.new("RGB", (1, 1), COLORS[(mesh.class_index - 1) % 8]))[0, 0]
        triangles.append(corners)
        colors.append(base * (0.3 + 0.7 * facing[:, None]))
    if triangles:
        corners, shades = np.concatenate(triangles), np.concatenate(colors).astype(int)
        pixels = size + corners[..., :2] * [0.97 * size, -0.97 * size]
        for i in np.argsort(corners[..., 2].mean(1)):
            brush.polygon([tuple(p) for p in pixels[i]], fill=(*shades[i].tolist(), 255))
    return canvas.resize((size, size), Image.Resampling.LANCZOS)
