"""What a phantom shows: a left atrium in late-enhanced MRI and its neighbours, made up.

Shapes are signed distances in mm in a patient's own frame (x right, y anterior, z superior),
painted over each other from back to front. What makes it hard is what makes the real thing hard:
veins are cut at a length nobody can see, the valve to the ventricle is open, the wall to the
other atrium is thinner than a voxel, and brightness, contrast, noise and anatomy vary from case to
case. Nothing of it comes from a person.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

# Difficulty: ranges are drawn from once a case.
ROTATION_DEG = 10.0  # standard deviation about each axis
SHIFT_MM = 3.0
SCALE = (0.92, 1.12)
WARP_MM = 3.0
VEIN_CUT_MM = (10.0, 18.0)
WALL_MM = (1.0, 2.2)
WALL_CONTRAST = (0.35, 0.8)  # brightness of the wall between soft tissue (0) and blood (1)
SOFT_TISSUE = (0.2, 0.5)  # brightness, where blood is 1
BLOOD_SPREAD = 0.07  # standard deviation of the other chambers' and vessels' brightness
GAMMA = (0.75, 1.35)
BIAS = 0.2
TEXTURE = 0.09
NOISE = (0.03, 0.09)

ATRIUM, VENTRICLE, AORTA = 1, 2, 3  # labels; 0 is all else

Rng = np.random.Generator


def draw_case(
    rng: Rng, shape: tuple[int, ...], spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """One case on a grid in LPS order: image (X, Y, Z) float32, labels (X, Y, Z) uint8 (`ATRIUM`, ...)."""
    points = _patient_points(rng, shape, spacing_mm)  # (3, X, Y, Z) mm
    atrium, blood = _left_atrium(rng, points)
    image, labels = _paint(rng, points, blood, float(np.mean(spacing_mm)))
    labels[atrium < 0] = ATRIUM
    return _acquire(rng, image), labels


def _patient_points(rng: Rng, shape: tuple[int, ...], spacing_mm: Sequence[float]) -> np.ndarray:
    """Where each voxel lies in the patient's frame, bent a little: (3, X, Y, Z) in mm."""
    axes = [
        sign * mm * (np.arange(n) - (n - 1) / 2)
        for sign, mm, n in zip((-1, -1, 1), spacing_mm, shape, strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    turn = Rotation.from_euler("xyz", rng.normal(0, ROTATION_DEG, 3), degrees=True).as_matrix()
    linear = (turn * rng.normal(1, 0.04, 3) / rng.uniform(*SCALE)).astype(np.float32)
    points = np.einsum("ij,jxyz->ixyz", linear, points)
    points -= _column(rng.normal(0, SHIFT_MM, 3))
    extent = np.multiply(shape, spacing_mm)
    for axis in range(3):
        points[axis] += WARP_MM * _smooth(rng, shape, np.ceil(extent / 22).astype(int) + 1)
    return points


def _smooth(rng: Rng, shape: Sequence[int], knots: ArrayLike) -> np.ndarray:
    """A smooth random field (X, Y, Z) of unit spread: Gaussian bumps on a coarse grid of knots."""
    knots_per_axis = np.broadcast_to(knots, 3)
    field = rng.standard_normal(knots_per_axis)
    for axis, (n, k) in enumerate(zip(shape, knots_per_axis, strict=True)):
        offsets = np.linspace(0, k - 1, n)[:, None] - np.arange(k)  # (n, k) in knots
        weights = np.exp(-0.5 * (offsets / 0.6) ** 2)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)  # keeps the variance
        field = np.moveaxis(np.tensordot(weights, field, (1, axis)), 0, axis)
    return field.astype(np.float32)


# Shapes: signed distances (X, Y, Z) in mm, negative inside


def _column(vector: ArrayLike) -> np.ndarray:
    return np.asarray(vector, dtype=np.float32).reshape(3, 1, 1, 1)


def _ellipsoid(points: np.ndarray, center: ArrayLike, radii: ArrayLike) -> np.ndarray:
    scaled = (points - _column(center)) / _column(radii)
    length = np.sqrt((scaled**2).sum(0)) + 1e-6
    slope = np.sqrt(((scaled / _column(radii)) ** 2).sum(0)) + 1e-6
    return length * (length - 1) / slope


def _tube(
    points: np.ndarray,
    start: ArrayLike,
    end: ArrayLike,
    radii: tuple[float, float],
    bend: ArrayLike = (0, 0, 0),
) -> tuple[np.ndarray, np.ndarray]:
    """A bent, tapering tube; its distance, and how far along it a point lies, in mm."""
    along = np.subtract(end, start)
    length = float(np.linalg.norm(along))
    from_start = points - _column(start)
    along_mm = np.tensordot(along.astype(np.float32) / length, from_start, 1)
    t = np.clip(along_mm / length, 0, 1)
    from_start -= t * _column(along) + 4 * t * (1 - t) * _column(bend)
    radius = radii[0] + t * (radii[1] - radii[0])
    return np.sqrt((from_start**2).sum(0)) - radius, along_mm


def _join(first: np.ndarray, second: np.ndarray, blend_mm: float) -> np.ndarray:
    """Union of two shapes with a fillet where they meet."""
    near = np.clip(blend_mm - np.abs(first - second), 0, None)
    return np.minimum(first, second) - near**2 / (4 * blend_mm)


# The left atrium

# Pulmonary veins: start and direction, in the patient's frame with the atrium's center at 0.
VEINS = {
    "right superior": ((17, -5, 8), (0.85, -0.15, 0.45)),
    "right inferior": ((16, -8, -8), (0.85, -0.45, -0.25)),
    "left superior": ((-18, -4, 9), (-0.75, -0.1, 0.6)),
    "left inferior": ((-17, -9, -6), (-0.8, -0.55, -0.2)),
    "left common": ((-18, -7, 2), (-0.9, -0.35, 0.15)),
    "right middle": ((18, -6, 0), (0.95, -0.25, 0.05)),
}
VALVE_CENTER, VALVE_NORMAL = (-10, 11, -10), (-0.55, 0.65, -0.52)  # toward the ventricle


def _vein_names(rng: Rng) -> list[str]:
    """Four veins in most people; a common left trunk or a third right vein in some."""
    right = ["right superior", "right inferior"]
    left = ["left common"] if rng.random() < 0.25 else ["left superior", "left inferior"]
    return right + left + (["right middle"] if rng.random() < 0.25 else [])


def _left_atrium(rng: Rng, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the labeled atrium and to its blood, which runs on into the uncut veins."""
    radii = np.array([27, 16, 18]) * rng.normal(1, 0.07, 3)
    body = _ellipsoid(points, (0, 0, 0), radii)
    bulge = _ellipsoid(points, rng.normal((-4, 5, -5), 3), rng.uniform(12, 17, 3))
    body = _join(body, bulge, 6)
    beyond_valve = np.tensordot(
        np.array(VALVE_NORMAL, np.float32), points - _column(VALVE_CENTER), 1
    )
    body = -_join(-body, -beyond_valve, 5)  # cut, with a rounded edge
    tip = rng.normal((-36, 20, 9), 4)
    appendage, _ = _tube(points, (-19, 5, 4), tip, (7.5, rng.uniform(3, 5)), rng.normal(0, 4, 3))
    body = _join(body, appendage, 3)
    atrium, blood = body, body
    for name in _vein_names(rng):
        start, toward = VEINS[name]
        direction = np.array(toward) + rng.normal(0, 0.15, 3)
        end = np.array(start) + 45 * direction / np.linalg.norm(direction)
        wide = {"left common": 8.5, "right middle": 3.5}.get(name, 6.0) * rng.normal(1, 0.12)
        vein, along_mm = _tube(points, start, end, (wide, 0.6 * wide), rng.normal(0, 4, 3))
        blood = _join(blood, vein, 4)
        cut = np.maximum(vein, along_mm - rng.uniform(*VEIN_CUT_MM))
        atrium = _join(atrium, cut, 4)
    return atrium, blood


# The image


def _paint(
    rng: Rng, points: np.ndarray, blood: np.ndarray, voxel_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """From the back to the front (the atrium): brightness without noise, blood being about 1, and labels."""
    shape = points.shape[1:]
    soft = rng.uniform(*SOFT_TISSUE)
    image, labels = np.full(shape, soft, np.float32), np.zeros(shape, np.uint8)

    def over(
        distance: np.ndarray, value: float | np.ndarray, label: int = 0, share: float = 1.0
    ) -> None:
        """Paint a shape; voxels on its border hold a part of it."""
        inside = share * np.clip(0.5 - distance / voxel_mm, 0, 1)
        image[...] += inside * (value - image)
        if share == 1:
            labels[distance < 0] = label

    apex = rng.normal((-26, 33, -24), 2)
    ventricle = _tube(points, VALVE_CENTER, apex, (11, 17))[0]
    over(ventricle - 9, 1.15 * soft)
    for distance, value, label in _surroundings(rng, points, soft):
        over(distance, value, label)
    wall_mm = rng.uniform(*WALL_MM)
    wall = soft + rng.uniform(*WALL_CONTRAST) * (1 - soft) * 0.6
    scar = np.clip(_smooth(rng, shape, 9) - 1, 0, 1) * rng.uniform(0, 1)
    over(blood - wall_mm, wall * (1 - scar) + 1.15 * scar)
    over(ventricle, rng.normal(1, BLOOD_SPREAD / 2), VENTRICLE)
    over(blood, 1.0)
    over(np.maximum(np.abs(blood) - 0.8, ventricle + 1), soft, share=rng.uniform(0, 0.4))  # valve
    return image, labels


def _surroundings(
    rng: Rng, points: np.ndarray, soft: float
) -> list[tuple[np.ndarray, float | np.ndarray, int]]:
    """Neighbours as (distance, brightness, label), back to front."""
    shape = points.shape[1:]
    lung = rng.uniform(0.04, 0.14)
    vessels = np.clip(_smooth(rng, shape, 15) - 1.1, 0, 0.7)
    muscle = soft * rng.normal(1.15, 0.08)

    def near(*place: float) -> np.ndarray:
        return rng.normal(place, 2.5)

    def chamber() -> float:
        return rng.normal(1, BLOOD_SPREAD)

    def tube(start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
        radius *= rng.normal(1, 0.1)
        return _tube(points, start, end, (radius, radius), rng.normal(0, 2, 3))[0]

    aorta = tube(near(-16, -31, -60), near(-14, -30, 60), 9)
    ascending = tube(near(2, 24, -6), near(12, 32, 60), 11)
    artery = tube(near(-22, 24, 30), near(40, -6, 27), 7.5)
    cava = tube(near(30, 14, 0), near(27, 16, 60), 7)
    right_ventricle = _ellipsoid(points, near(14, 44, -18), (24, 16, 22))
    right_atrium = _ellipsoid(points, near(33, 18, -8), (16, 20, 20))
    spine = _ellipsoid(points, near(5, -43, 0), (16, 14, 200))
    esophagus = tube(near(1, -25, -60), near(-3, -24, 60), 5)
    return [
        (_ellipsoid(points, near(56, -26, 4), (34, 34, 70)), lung + vessels, 0),
        (_ellipsoid(points, near(-58, -22, 4), (34, 36, 70)), lung + vessels, 0),
        (spine, 0.75 * soft, 0),
        (spine + 3, 0.35 * soft, 0),
        (esophagus, muscle, 0),
        (right_ventricle - 2, muscle, 0),
        (right_ventricle, chamber(), 0),
        (right_atrium - 1.5, muscle, 0),
        (cava - 1.5, muscle, 0),
        (right_atrium, right := chamber(), 0),
        (cava, right, 0),
        (aorta - 1.5, muscle, 0),
        (aorta, left := chamber(), AORTA),
        (artery - 1.5, muscle, 0),
        (artery, chamber(), 0),
        (ascending - 1.5, muscle, 0),
        (ascending, left, AORTA),
    ]


def _acquire(rng: Rng, image: np.ndarray) -> np.ndarray:
    """What the scanner adds: texture, blur, coil shading, contrast, Rician noise, its own scale."""
    shape = image.shape
    texture = 0.7 * _smooth(rng, shape, 11) + 0.7 * _smooth(rng, shape, 24)
    image = gaussian_filter(image * (1 + TEXTURE * texture), 0.5)
    image = np.clip(image, 0, None) ** rng.uniform(*GAMMA)
    image *= np.exp(BIAS * _smooth(rng, shape, 3))
    real, imaginary = rng.uniform(*NOISE) * rng.standard_normal((2, *shape), dtype=np.float32)
    image = np.hypot(image + real, imaginary)
    return np.rint(image * rng.uniform(150, 900)).astype(np.float32)
