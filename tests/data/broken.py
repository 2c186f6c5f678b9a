"""A small healthy data set, and one function for each way it can be broken."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from vclipseg.data.volume import Volume, read_image, read_labels, reorient, write

SHAPE = (12, 10, 8)
SPACING = (0.8, 1.0, 2.0)
TRAIN = tuple(f"train{i}" for i in range(6))
TEST = ("test0", "test1")
UNLABELED = ("extra0",)


def make_healthy(root: Path) -> Path:
    """nnU-Net layout: 6 labeled, 1 unlabeled and 2 test cases with two classes, slightly oblique."""
    for seed, case_id in enumerate(TRAIN + TEST + UNLABELED):
        write(_image(seed), image_file(root, case_id))
        if case_id not in UNLABELED:
            write(Volume(_labels(seed), affine()), label_file(root, case_id))
    describe(root, channel_names={"0": "CT"})
    return root


def image_file(root: Path, case_id: str, channel: int = 0) -> Path:
    folder = "imagesTs" if case_id in TEST else "imagesUn" if case_id in UNLABELED else "imagesTr"
    return root / folder / f"{case_id}_{channel:04d}.nii.gz"


def label_file(root: Path, case_id: str) -> Path:
    return root / ("labelsTs" if case_id in TEST else "labelsTr") / f"{case_id}.nii.gz"


def affine() -> np.ndarray:
    """A scanner's affine: 0.8 x 1 x 2 mm, tilted by 5 degrees, far from the origin."""
    angle = np.deg2rad(5)
    tilt = np.array(
        [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = tilt @ np.diag(SPACING)
    matrix[:3, 3] = (-31.0, 12.5, 140.0)
    return matrix


def _image(seed: int) -> Volume:
    noise = np.random.default_rng(seed).normal(100, 20, size=(1, *SHAPE))
    return Volume(noise.astype(np.float32), affine())


def _labels(seed: int) -> np.ndarray:
    """Two boxes at a place of their own, so that every flip and shift shows."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    x = 1 + seed % 3
    labels[x : x + 4, 2:5, 1:4] = 1
    labels[x + 2 : x + 5, 5:8, 3:5] = 2
    return labels


def describe(root: Path, channel_names: dict[str, str]) -> None:
    description = {
        "name": "Small",
        "channel_names": channel_names,
        "labels": {"background": 0, "liver": 1, "tumor": 2},
        "numTraining": len(TRAIN),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))


def move_label(root: Path, change: np.ndarray, case_id: str = "train1") -> None:
    """Change the affine in a label's header, not its voxels."""
    file = label_file(root, case_id)
    labels = read_labels(file)
    write(Volume(labels.array, labels.affine @ change), file)


def shift(x: float, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    """A shift by so many voxels."""
    change = np.eye(4)
    change[:3, 3] = (x, y, z)
    return change


def edit_labels(root: Path, edit: Callable[[np.ndarray], None], *case_ids: str) -> None:
    for case_id in case_ids:
        file = label_file(root, case_id)
        labels = read_labels(file)
        edit(labels.array)
        write(labels, file)


def edit_image(root: Path, edit: Callable[[np.ndarray], None], *case_ids: str) -> None:
    for case_id in case_ids:
        file = image_file(root, case_id)
        image = read_image(file)
        edit(image.array)
        write(image, file)


# ---- files -----------------------------------------------------------------------------


def truncated_image(root: Path) -> None:
    file = image_file(root, "train1")
    file.write_bytes(file.read_bytes()[:-700])


def truncated_label(root: Path) -> None:
    file = label_file(root, "test1")
    file.write_bytes(file.read_bytes()[:-40])


def empty_file(root: Path) -> None:
    image_file(root, "train1").write_bytes(b"")


def other_content(root: Path) -> None:
    image_file(root, "extra0").write_text("<html>404 Not Found</html>")


def flat_image(root: Path) -> None:
    flat = np.ones((12, 10), dtype=np.float32)
    nib.save(nib.Nifti1Image(flat, np.eye(4)), image_file(root, "train1"))


def flat_nrrd(root: Path) -> None:
    image_file(root, "train1").unlink()
    flat = sitk.GetImageFromArray(np.ones((12, 10), dtype=np.float32))
    sitk.WriteImage(flat, str(root / "imagesTr" / "train1_0000.nrrd"))


def label_with_channels(root: Path) -> None:
    write(Volume(np.zeros((2, *SHAPE), dtype=np.uint8), affine()), label_file(root, "train1"))


def series_over_time(root: Path) -> None:
    image = read_image(image_file(root, "train1"))
    write(Volume(np.repeat(image.array, 3, axis=0), affine()), image_file(root, "train1"))


def nan_voxels(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array[0, :2, 0, 0] = np.nan
        array[0, 5, 5, 5] = np.inf

    edit_image(root, edit, "train1")


def only_nan(root: Path) -> None:
    edit_image(root, lambda array: array.fill(np.nan), "train1")


def constant_image(root: Path) -> None:
    edit_image(root, lambda array: array.fill(7), "train1")


# ---- label and image -------------------------------------------------------------------


def rounded_header(root: Path) -> None:
    move_label(root, shift(0.05, 0.3))


def shifted_label(root: Path) -> None:
    move_label(root, shift(3))


def lost_header(root: Path) -> None:
    file = label_file(root, "train1")
    write(Volume(read_labels(file).array, np.eye(4)), file)


def flipped_label(root: Path) -> None:
    file = label_file(root, "train1")
    write(reorient(read_labels(file), "LAS"), file)


def permuted_label(root: Path) -> None:
    file = label_file(root, "test1")
    write(reorient(read_labels(file), "SLP"), file)


def flipped_and_rounded_label(root: Path) -> None:
    """Turned without loss, then moved by so much that resampling would shift the labels."""
    flipped_label(root)
    move_label(root, shift(0.6))


def flipped_header(root: Path) -> None:
    move_label(root, np.diag([-1.0, 1.0, 1.0, 1.0]))


def finer_label(root: Path) -> None:
    """Twice the voxels along z, half the spacing, over the same field of view."""
    file = label_file(root, "train1")
    labels = read_labels(file)
    change = np.diag([1.0, 1.0, 0.5, 1.0])
    change[2, 3] = -0.25
    write(Volume(np.repeat(labels.array, 2, axis=2), labels.affine @ change), file)


def larger_flipped_label(root: Path) -> None:
    """Two more voxels on every side, and axes stored another way."""
    file = label_file(root, "train1")
    labels = read_labels(file)
    padded = Volume(np.pad(labels.array, 2), labels.affine @ shift(-2, -2, -2))
    write(reorient(padded, "LIP"), file)


def cropped_label(root: Path) -> None:
    file = label_file(root, "train1")
    labels = read_labels(file)
    write(Volume(labels.array[:, :, :6], labels.affine), file)


def lost_header_and_shape(root: Path) -> None:
    file = label_file(root, "train1")
    write(Volume(np.repeat(read_labels(file).array, 2, axis=2), np.eye(4)), file)


def add_channel(root: Path, change: np.ndarray) -> None:
    for case_id in TRAIN + TEST + UNLABELED:
        image = read_image(image_file(root, case_id))
        moved = image.affine @ change if case_id == "train1" else image.affine
        write(Volume(image.array / 2 + 7, moved), image_file(root, case_id, channel=1))
    describe(root, channel_names={"0": "T1", "1": "T2"})


def rounded_channel(root: Path) -> None:
    add_channel(root, shift(0.2))


def flipped_channel(root: Path) -> None:
    add_channel(root, np.eye(4))
    file = image_file(root, "train1", channel=1)
    write(reorient(read_image(file), "RPS"), file)


def shifted_channel(root: Path) -> None:
    add_channel(root, shift(0, 5))


# ---- label values ----------------------------------------------------------------------


def unknown_value(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array[0, 0, :3] = 9

    edit_labels(root, edit, "train1")


def fractional_values(root: Path) -> None:
    file = label_file(root, "train1")
    write(Volume(read_labels(file).array * np.float32(0.37), affine()), file)


def empty_label(root: Path) -> None:
    edit_labels(root, lambda array: array.fill(0), "train1")


def absent_class(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array[array == 2] = 1

    edit_labels(root, edit, *TRAIN)


# ---- cases and splits ------------------------------------------------------------------


def no_labels(root: Path) -> None:
    shutil.rmtree(root / "labelsTr")


def lonely_label(root: Path) -> None:
    image_file(root, "train1").unlink()


def recompressed_test_copy(root: Path) -> None:
    content = gzip.decompress(image_file(root, "train1").read_bytes())
    image_file(root, "test1").write_bytes(gzip.compress(content, compresslevel=1))


def turned_unlabeled_copy(root: Path) -> None:
    """The axes too differ from those of the others, which is a second problem."""
    copy = reorient(read_image(image_file(root, "test1")), "LSP")
    write(copy, image_file(root, "extra0"))


def copy_in_train(root: Path) -> None:
    shutil.copy(image_file(root, "train1"), image_file(root, "extra0"))


def copy_in_test(root: Path) -> None:
    shutil.copy(image_file(root, "test0"), image_file(root, "test1"))


def shared_subject(root: Path) -> None:
    """The same files, listed in a CSV that knows of patients."""
    (root / "dataset.json").unlink()
    lines = ["case_id,image,label,split,subject"]
    for case_id in TRAIN + TEST:
        image = image_file(root, case_id).relative_to(root)
        label = label_file(root, case_id).relative_to(root)
        subject = "anna" if case_id in ("train1", "test1") else case_id
        split = "test" if case_id in TEST else "train"
        lines.append(f"{case_id},{image},{label},{split},{subject}")
    (root / "cases.csv").write_text("\n".join(lines))


# ---- what is unusual -------------------------------------------------------------------


def change_affine(root: Path, change: np.ndarray, *case_ids: str) -> None:
    for case_id in case_ids:
        for file in (image_file(root, case_id), label_file(root, case_id)):
            if file.is_file():
                image = nib.load(file)
                voxels = np.asanyarray(image.dataobj)
                write(Volume(voxels, image.affine @ change), file)


def spacing_in_cm(root: Path) -> None:
    change_affine(root, np.diag([0.1, 0.1, 0.1, 1.0]), "train1")


def many_spacings(root: Path) -> None:
    change_affine(root, np.diag([1.0, 1.0, 4.0, 1.0]), "train1", "train2", "test0")


def no_spacing(root: Path) -> None:
    for file in root.glob("*/*.nii.gz"):
        voxels = np.asanyarray(nib.load(file).dataobj)
        write(Volume(voxels, np.eye(4)), file)


def other_axes(root: Path) -> None:
    for file in (image_file(root, "train1"), label_file(root, "train1")):
        image = nib.load(file)
        write(reorient(Volume(np.asanyarray(image.dataobj), image.affine), "LPS"), file)


def other_units(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array *= 1000

    edit_image(root, edit, "train1")


def other_level(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array += 1024

    edit_image(root, edit, "train1")


def two_units(root: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array *= 1000

    edit_image(root, edit, "train1", "train2", "test0", "extra0")


@dataclass(frozen=True)
class Broken:
    """A way to break a data set, and what the check must say of it."""

    breaks: Callable[[Path], None]
    code: str
    case_id: str = "train1"
    severity: str = "error"
    fixable: bool = False
    also: frozenset[str] = frozenset()  # codes that come with it

    @property
    def name(self) -> str:
        return self.breaks.__name__


BROKEN = (
    Broken(truncated_image, "unreadable-file"),
    Broken(truncated_label, "unreadable-file", "test1"),
    Broken(empty_file, "unreadable-file"),
    Broken(other_content, "unreadable-file", "extra0"),
    Broken(flat_image, "not-3d"),
    Broken(flat_nrrd, "not-3d"),
    Broken(label_with_channels, "not-3d"),
    Broken(series_over_time, "wrong-channels"),
    Broken(nan_voxels, "nan-or-inf", fixable=True),
    Broken(only_nan, "nan-or-inf"),
    Broken(constant_image, "image-constant", severity="warning"),
    Broken(rounded_header, "label-geometry-differs", fixable=True),
    Broken(shifted_label, "label-geometry-differs"),
    Broken(lost_header, "label-geometry-differs"),
    Broken(flipped_header, "label-geometry-differs"),
    Broken(flipped_label, "label-orientation-differs", fixable=True),
    Broken(flipped_and_rounded_label, "label-orientation-differs", fixable=True),
    Broken(permuted_label, "label-orientation-differs", "test1", fixable=True),
    Broken(finer_label, "label-shape-differs", fixable=True),
    Broken(larger_flipped_label, "label-shape-differs", fixable=True),
    Broken(cropped_label, "label-shape-differs"),
    Broken(lost_header_and_shape, "label-shape-differs"),
    Broken(rounded_channel, "channel-geometry-differs", fixable=True),
    Broken(flipped_channel, "channel-geometry-differs", fixable=True),
    Broken(shifted_channel, "channel-geometry-differs"),
    Broken(unknown_value, "label-value-unknown"),
    Broken(fractional_values, "label-not-integer"),
    Broken(empty_label, "label-empty", severity="warning"),
    Broken(absent_class, "class-absent", ""),
    Broken(no_labels, "no-labeled-case", ""),
    Broken(lonely_label, "label-without-image"),
    Broken(recompressed_test_copy, "duplicate-across-splits", "test1"),
    Broken(
        turned_unlabeled_copy,
        "duplicate-across-splits",
        "test1",
        also=frozenset({"orientation-differs"}),
    ),
    Broken(copy_in_train, "duplicate-in-train", "extra0", "warning"),
    Broken(copy_in_test, "duplicate-in-test", "test1", "warning"),
    Broken(shared_subject, "subject-in-train-and-test", "test1"),
    Broken(spacing_in_cm, "spacing-outlier", severity="warning"),
    Broken(many_spacings, "spacing-diverse", "", "warning"),
    Broken(no_spacing, "spacing-missing", "", "warning"),
    Broken(other_axes, "orientation-differs", severity="warning"),
    Broken(other_units, "intensity-outlier", severity="warning"),
    Broken(other_level, "intensity-outlier", severity="warning"),
    Broken(two_units, "intensity-diverse", "", "warning"),
)
