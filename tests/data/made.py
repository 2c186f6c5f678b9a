"""Small made volumes, folders and affines for the tests of the data layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vclipseg.data.volume import Volume, write

SHAPE = (7, 8, 6)


@st.composite
def affines(draw, shear: bool = True) -> np.ndarray:
    """Any axis order, flips, oblique, anisotropic, perhaps sheared: voxel to RAS+ mm."""
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    spacing = draw(st.tuples(*[st.floats(0.4, 5.0)] * 3))
    angles = draw(st.tuples(*[st.floats(-40.0, 40.0)] * 3))
    axes = np.eye(3)[:, order] * signs
    if shear and draw(st.booleans()):
        axes = axes + np.array([[0, 0.2, 0], [0, 0, 0], [0.1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes * spacing
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300.0, 300.0)] * 3))
    return affine


shapes = st.tuples(*[st.integers(6, 11)] * 3)


def world_grid(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """World coordinates of all voxels, `(3, X, Y, Z)` mm."""
    indices = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ indices + affine[:3, 3:]).reshape(3, *shape)


def save_image(path: Path, seed: int = 0, channels: int = 1, shape: Sequence[int] = SHAPE) -> Path:
    """A noise image."""
    noise = np.random.default_rng(seed).normal(10, 3, (channels, *shape)).astype(np.float32)
    write(Volume(noise, np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return path


def save_labels(path: Path, values: Sequence[int] = (0, 1), shape: Sequence[int] = SHAPE) -> Path:
    """Labels in which every value occurs."""
    labels = np.resize(np.repeat(np.asarray(values, dtype=np.uint8), 5), shape)
    write(Volume(labels, np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return path


def save_json(path: Path, content: object) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def nnunet_folder(
    root: Path,
    labeled: Sequence[str] = ("a", "b"),
    unlabeled: Sequence[str] = ("u",),
    test: Sequence[str] = ("t",),
    labels: dict | None = None,
    channels: int = 1,
    suffix: str = ".nii.gz",
) -> Path:
    """An nnU-Net v2 folder with imagesUn."""
    labels = labels or {"background": 0, "organ": 1}
    values = [v for v in labels.values() if isinstance(v, int)]
    description = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": labels,
        "numTraining": len(labeled),
        "file_ending": suffix,
    }
    save_json(root / "dataset.json", description)
    folders = (("imagesTr", labeled), ("imagesUn", unlabeled), ("imagesTs", test))
    for folder, case_ids in folders:
        for seed, case_id in enumerate(case_ids):
            for channel in range(channels):
                name = f"{case_id}_{channel:04d}{suffix}"
                save_image(root / folder / name, hash_seed(folder, seed, channel))
    for folder, case_ids in (("labelsTr", labeled), ("labelsTs", test)):
        for case_id in case_ids:
            save_labels(root / folder / f"{case_id}{suffix}", values)
    return root


def hash_seed(folder: str, case: int, channel: int) -> int:
    """A seed of its own for every file."""
    return ["imagesTr", "imagesUn", "imagesTs"].index(folder) * 1000 + case * 10 + channel
