"""DICOM series for tests, written slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AXIAL = np.diag([-0.7, -0.9, 2.0, 1.0])
"""Voxel to RAS+ mm of a usual scan: X runs to the left, Y to the back, Z upwards."""


def oblique(angles: Sequence[float] = (8.0, -5.0, 12.0)) -> np.ndarray:
    """The same, turned by some degrees and moved."""
    affine = AXIAL.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ AXIAL[:3, :3]
    affine[:3, 3] = (31.5, -12.25, 104.0)
    return affine


def write_slice(
    path: Path,
    pixels: np.ndarray,
    affine: np.ndarray,
    number: int = 1,
    series: str = "1.2.3.4",
    description: str = "Pancreas",
    **tags: str,
) -> Path:
    """One file: pixels `(X, Y)` in HU, whose first one the affine (RAS+ mm) puts at its origin.

    `tags` such as t0008_0060="OT" are laid over those of a CT.
    """
    lps = RAS_TO_LPS @ affine
    x_mm, y_mm = np.linalg.norm(lps[:3, :2], axis=0)
    image = sitk.GetImageFromArray(np.rint(pixels).astype(np.int16).T[None])
    image.SetSpacing((x_mm, y_mm, 1.0))
    values = {
        "0008|0060": "CT",
        "0008|103e": description,
        "0010|0010": "SOMEBODY^SECRET",
        "0020|000d": "1.2.3",
        "0020|000e": series,
        "0020|0013": str(number),
        "0020|0052": f"{series}.5",
        "0020|0032": _spell(lps[:3, 3]),
        "0020|0037": _spell([*lps[:3, 0] / x_mm, *lps[:3, 1] / y_mm]),
        "0028|1052": "-1024",
        "0028|1053": "1",
        **{key[1:].replace("_", "|"): text for key, text in tags.items()},
    }
    for key, text in values.items():
        image.SetMetaData(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    slices: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    sideways_mm: float = 0.0,
    series: str = "1.2.3.4",
) -> Path:
    """A folder of slices of an array `(X, Y, Z)` in HU.

    Args:
        folder: where to.
        array: the volume.
        affine: voxel to RAS+ mm.
        slices: those to write; default: all.
        names: of the files, by slice.
        numbers: instance numbers, by slice.
        sideways_mm: how far each slice is shifted along Y against the one before.
        series: UID.
    """
    depth = array.shape[2]
    names = names or [f"1-{k + 1:03}.dcm" for k in range(depth)]
    numbers = numbers or [k + 1 for k in range(depth)]
    shift = sideways_mm * affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    for k in range(depth) if slices is None else slices:
        moved = affine.copy()
        moved[:3, 3] += k * (affine[:3, 2] + shift)
        write_slice(folder / names[k], array[:, :, k], moved, numbers[k], series)
    return folder


def _spell(values: Iterable[float]) -> str:
    """Decimals as DICOM holds them, 16 characters at most."""
    return "\\".join(f"{value:.9f}" for value in values)
