"""Masks that are DICOM objects are scored as the volumes that they were made of."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_made import oblique, write_series

from vclipseg.data.dicom_objects import dicom_writer
from vclipseg.data.volume import Volume, reorient, write
from vclipseg.errors import DataError
from vclipseg.evaluation import evaluate_folder

pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")

CLASSES = ("background", "left atrium", "tumor")
SHAPE = (13, 10, 9)
AFFINE = oblique()


def reference() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:9, 1:8, 2:7], labels[4:6, 3:5, 3:5] = 1, 2
    return labels


def prediction() -> np.ndarray:
    """The same, shifted, and higher by a slice."""
    return np.roll(reference(), (1, 0, 1), axis=(0, 1, 2))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("ct") / "ct", np.zeros(SHAPE), AFFINE)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("masks", "labelsTs"):
        (tmp_path / name).mkdir()
    return tmp_path / "masks", tmp_path / "labelsTs"


def put(
    kind: str, folder: Path, labels: np.ndarray, series: Path, classes=CLASSES, name: str = "a"
) -> None:
    mask = Volume(labels, AFFINE)
    if kind == "nifti":
        write(reorient(mask, "PSR"), folder / f"{name}.nii.gz")
    else:
        dicom_writer(kind, sorted(series.iterdir()), classes)(mask, folder / f"{name}.dcm")


def rows(folders: tuple[Path, Path], counts: bool = True) -> list[dict]:
    """Scores, rounded as headers are; without counts, as those depend on the slices that nobody segmented."""
    found = [vars(score) for score in evaluate_folder(*folders, CLASSES)]
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items() if counts or k != "counts"}
        for r in found
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("volumes")
    write(Volume(prediction(), AFFINE), root / "masks" / "a.nii.gz")
    write(Volume(reference(), AFFINE), root / "labelsTs" / "a.nii.gz")
    return rows((root / "masks", root / "labelsTs"))


@pytest.mark.parametrize("kind", ["seg", "seg-labelmap", "rtstruct"])
@pytest.mark.parametrize("side", [0, 1])
def test_an_object_against_a_volume(folders, series, expected, kind, side):
    """On the volume's grid, whose axes run otherwise."""
    kinds = [kind, "nifti"] if side == 0 else ["nifti", kind]
    for one, folder, labels in zip(kinds, folders, (prediction(), reference()), strict=True):
        put(one, folder, labels, series)
    assert rows(folders) == expected


def test_two_segmentations_need_no_series(folders, series, expected):
    put("seg", folders[0], prediction(), series)
    put("seg-labelmap", folders[1], reference(), series)
    assert rows(folders, counts=False) == [
        {k: v for k, v in row.items() if k != "counts"} for row in expected
    ]


@pytest.mark.parametrize("place", ["masks/ct", "labelsTs/ct", "imagesTs/somebody/ct"])
@pytest.mark.parametrize("kinds", [("rtstruct", "rtstruct"), ("rtstruct", "seg"), ("seg", "seg")])
def test_two_objects_on_the_grid_of_their_series(folders, series, expected, kinds, place):
    put(kinds[0], folders[0], prediction(), series)
    put(kinds[1], folders[1], reference(), series)
    shutil.copytree(series, folders[0].parent / place)
    assert rows(folders) == expected


@pytest.mark.parametrize(
    "kinds", [("rtstruct", "rtstruct"), ("rtstruct", "seg"), ("seg", "rtstruct")]
)
def test_contours_without_their_series(folders, series, kinds):
    put(kinds[0], folders[0], prediction(), series)
    put(kinds[1], folders[1], reference(), series)
    with pytest.raises(DataError, match=r"need their series, and it is not in .*Put the folder"):
        evaluate_folder(*folders, CLASSES)


def test_a_segmentation_of_one_slice(folders, series):
    labels = reference()
    labels[..., [0, 1, 2, 4, 5, 6, 7, 8]] = 0
    for folder in folders:
        put("seg", folder, labels, series)
    assert all(row["dice"] == 1 and row["hd95_mm"] == 0 for row in rows(folders))
    assert rows(folders)[0]["reference_ml"] == pytest.approx(
        0.7 * 0.9 * 2 * (labels == 1).sum() / 1000
    )


def test_an_empty_prediction_is_a_failure(folders, series):
    put("seg", folders[0], np.zeros(SHAPE, np.uint8), series)
    put("nifti", folders[1], reference(), series)
    assert all(row["dice"] == 0 and row["failure"] == 1 for row in rows(folders))


def test_a_class_without_a_segment_is_absent(folders, series):
    labels = np.minimum(reference(), 1)
    put("nifti", folders[0], labels, series)
    put("seg", folders[1], labels, series, classes=CLASSES[:2])
    found = rows(folders)
    assert [row["dice"] for row in found[:2]] == [1, 1]
    assert all(math.isnan(row["dice"]) for row in found[2:])


def test_segments_of_other_names_are_refused(folders, series):
    """Else a misspelled class would score 0 in silence."""
    put("nifti", folders[0], prediction(), series)
    put("seg", folders[1], reference(), series, classes=("background", "Left-Atrium", "lesion"))
    with pytest.raises(DataError, match="no segment is called tumor; others are called lesion"):
        evaluate_folder(*folders, CLASSES)


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
@pytest.mark.parametrize("axis", [0, 2])
def test_another_grid_is_refused(folders, series, kind, axis):
    put(kind, folders[0], prediction(), series)
    affine = AFFINE.copy()
    affine[:3, axis] *= 1.3
    if (kind, axis) == ("rtstruct", 0):
        affine[:3, 2] *= 1.3
    write(Volume(reference(), affine), folders[1] / "a.nii.gz")
    with pytest.raises(DataError, match=r"lies (on|in) no slice of the image"):
        evaluate_folder(*folders, CLASSES)


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_a_volume_of_finer_slices_is_refused(folders, series, kind):
    put(kind, folders[0], prediction(), series)
    affine = AFFINE @ np.diag([1, 1, 0.5, 1])
    write(Volume(reference().repeat(2, axis=2), affine), folders[1] / "a.nii.gz")
    with pytest.raises(DataError, match="one slice in 2 of its grid"):
        evaluate_folder(*folders, CLASSES)


def test_two_masks_of_one_name_are_refused(folders, series):
    put("seg", folders[0], prediction(), series)
    put("nifti", folders[0], prediction(), series)
    put("nifti", folders[1], reference(), series)
    with pytest.raises(DataError, match=r"a\.dcm, a\.nii\.gz are all masks of case a"):
        evaluate_folder(*folders, CLASSES)


def test_the_command_names_the_objects(folders, series, run_cli):
    put("seg", folders[0], prediction(), series)
    put("nifti", folders[1], reference(), series)
    names = 'data.class_names=["background", "left atrium", "tumor"]'
    code, _, err = run_cli("evaluate", folders[0], "--references", folders[1], "--set", names)
    assert code == 0, err
    summary = json.loads((folders[0] / "nnunet_summary.json").read_text(encoding="utf-8"))
    (case,) = summary["metric_per_case"]
    assert case["prediction_file"] == str(folders[0] / "a.dcm")
    assert case["reference_file"] == str(folders[1] / "a.nii.gz")
    again = evaluate_folder(*folders, CLASSES)  # what it wrote is no mask
    assert {score.case_id for score in again} == {"a"}
