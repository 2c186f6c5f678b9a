"""A data set of made-up left atria for the demo, tests and benchmarks (what is drawn: anatomy.py)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import label
from scipy.spatial.transform import Rotation

from vclipseg.data.anatomy import ATRIUM, draw_case
from vclipseg.data.volume import Volume, write
from vclipseg.errors import UsageError

VERSION = 1  # goes up with every change of what is drawn
SHAPE = (64, 64, 48)
SPACING_MM = 1.5
CLASS_NAMES = ("background", "left atrium", "left ventricle", "aorta")  # by label
MOST_CASES = 1000  # of a kind; the case's index is its kind's start plus its number
STARTS = {"labeled": 0, "unlabeled": MOST_CASES, "test": 2 * MOST_CASES}


def make_phantom(
    root: Path,
    *,
    labeled: int = 4,
    unlabeled: int = 30,
    test: int = 10,
    classes: int = 1,
    seed: int = 0,
    shape: Sequence[int] = SHAPE,
    spacing: float | Sequence[float] = SPACING_MM,
) -> Path:
    """Write a data set in nnU-Net's layout; a folder that already holds the same one is kept.

    Args:
        root: folder to make; appears only when it is complete.
        labeled: cases in imagesTr and labelsTr.
        unlabeled: cases in imagesUn.
        test: cases in imagesTs and labelsTs.
        classes: structures with a label, the first of `CLASS_NAMES`, 1 to 3; images are the same.
        seed: a case depends on the seed and its own number, not on how many there are.
        shape: voxels (X, Y, Z).
        spacing: mm, one number or three.

    Raises:
        UsageError: the folder holds something else, or a count is out of range.
    """
    root = Path(root)
    counts = {"labeled": labeled, "unlabeled": unlabeled, "test": test}
    if not all(0 <= count <= MOST_CASES for count in counts.values()):
        raise UsageError(f"a phantom has 0 to {MOST_CASES} cases of a kind, not {counts}")
    if not 0 < classes < len(CLASS_NAMES):
        raise UsageError(f"a phantom has 1 to {len(CLASS_NAMES) - 1} classes, not {classes}")
    drawn = {
        "version": VERSION,
        **counts,
        **({"classes": classes} if classes > 1 else {}),
        "seed": seed,
        "shape": [int(n) for n in shape],
        "spacing": _triple(spacing),
    }
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _same(root, drawn)
    unfinished = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        _write_all(unfinished, drawn, counts)
        if root.exists():
            root.rmdir()
        os.replace(unfinished, root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def phantom_case(
    seed: int,
    index: int,
    shape: Sequence[int] = SHAPE,
    spacing: float | Sequence[float] = SPACING_MM,
    classes: int = 1,
) -> tuple[Volume, Volume]:
    """One case: an image (1, X, Y, Z) float32 of whole numbers and labels (X, Y, Z) uint8.

    Voxels run left, posterior, superior ("LPS"), in a slightly oblique scanner frame.
    """
    rng = np.random.default_rng([seed, index])
    spacing_mm = _triple(spacing)
    image, labels = draw_case(rng, tuple(shape), spacing_mm)
    affine = _affine(rng, tuple(shape), spacing_mm)
    labels = np.where(labels <= classes, labels, 0).astype(np.uint8)
    return Volume(image[None], affine), Volume(_atrium_in_one_part(labels), affine)


def _same(root: Path, drawn: dict[str, Any]) -> Path:
    try:
        found = json.loads((root / "dataset.json").read_text(encoding="utf-8")).get("phantom")
    except (OSError, ValueError):
        found = None
    if found != drawn:
        what = "other files" if found is None else f"another phantom ({found})"
        raise UsageError(f"{root}: holds {what}; name a new folder or remove this one")
    return root


def _write_all(root: Path, drawn: dict[str, Any], counts: dict[str, int]) -> None:
    folders = {
        "labeled": ("imagesTr", "labelsTr"),
        "unlabeled": ("imagesUn", None),
        "test": ("imagesTs", "labelsTs"),
    }
    for kind, (images, labels) in folders.items():
        for index in range(STARTS[kind], STARTS[kind] + counts[kind]):
            image, reference = phantom_case(
                drawn["seed"], index, drawn["shape"], drawn["spacing"], drawn.get("classes", 1)
            )
            stored = Volume(image.array.astype(np.int16), image.affine)
            write(stored, root / images / f"phantom_{index:04}_0000.nii.gz")
            if labels:
                write(reference, root / labels / f"phantom_{index:04}.nii.gz")
    description = {
        "name": "Phantom",
        "description": "Made-up left atria for demo and tests; nothing of it comes from a person",
        "channel_names": {"0": "MRI"},
        "labels": {
            name: value for value, name in enumerate(CLASS_NAMES[: drawn.get("classes", 1) + 1])
        },
        "numTraining": counts["labeled"],
        "file_ending": ".nii.gz",
        "phantom": drawn,
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")


def _triple(spacing: float | Sequence[float]) -> list[float]:
    return [float(mm) for mm in np.broadcast_to(spacing, 3)]


def _affine(
    rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: Sequence[float]
) -> np.ndarray:
    """Voxel -> RAS+ mm: LPS order, tilted by a few degrees, centered somewhere in the scanner."""
    tilt = Rotation.from_euler("xyz", rng.normal(0, 6, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag(np.multiply([-1, -1, 1], spacing_mm))
    center = (np.array(shape) - 1) / 2
    affine[:3, 3] = rng.normal(0, 20, 3) - affine[:3, :3] @ center
    return affine


def _atrium_in_one_part(labels: np.ndarray) -> np.ndarray:
    """Labels without what a cut or the grid has split off the atrium."""
    parts, count = label(labels == ATRIUM, np.ones((3, 3, 3)))
    if count > 1:
        largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
        labels[(parts > 0) & (parts != largest)] = 0
    return labels
