"""The phantom: what is drawn, where it lies, and the folder it is written to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from vclipseg.data import phantom
from vclipseg.data.phantom import make_phantom, phantom_case
from vclipseg.data.volume import read_image, read_labels, reorient
from vclipseg.errors import UsageError

SMALL = {"shape": (24, 24, 18), "spacing": 4.0}  # the same field of view, coarser
FEW = {"labeled": 2, "unlabeled": 1, "test": 1, **SMALL}


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


# A case


@pytest.mark.parametrize("index", [0, 1, 2, 1000, 2000])
def test_case_is_an_atrium_among_neighbours(index: int) -> None:
    image, labels = phantom_case(0, index)
    atrium = labels.array == 1
    assert image.array.shape == (1, 64, 64, 48)
    assert (image.array.dtype, labels.array.dtype) == (np.float32, np.uint8)
    assert np.isfinite(image.array).all()
    assert image.array.min() >= 0
    assert set(np.unique(labels.array)) == {0, 1}
    assert 20 < atrium.sum() * np.prod(labels.spacing) / 1000 < 80  # ml
    assert label(atrium, np.ones((3, 3, 3)))[1] == 1
    blood = np.median(image.array[0][atrium])
    around = np.median(image.array[0][binary_dilation(atrium, iterations=4) & ~atrium])
    assert blood > 1.2 * around
    outside = image.array[0][~atrium]  # other chambers are as bright: a threshold is not enough
    assert (outside > blood).sum() > 0.2 * atrium.sum()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_with_three_classes_chamber_and_vessel_have_labels_too(index: int) -> None:
    image, labels = phantom_case(0, index, classes=3)
    plain, atrium = phantom_case(0, index)
    np.testing.assert_array_equal(image.array, plain.array)
    np.testing.assert_array_equal(labels.array == 1, atrium.array == 1)
    around = np.median(image.array[0][labels.array == 0])
    for k in (1, 2, 3):
        assert 15 < (labels.array == k).sum() * np.prod(labels.spacing) / 1000 < 80  # ml
        assert np.median(image.array[0][labels.array == k]) > 1.2 * around
    two = phantom_case(0, index, classes=2)[1]
    np.testing.assert_array_equal(two.array, np.where(labels.array == 3, 0, labels.array))


def test_anatomy_lies_the_same_way_in_the_world() -> None:
    """Reoriented to RAS, lungs are dark behind on both sides and the ventricle is left in front."""
    volumes = [reorient(phantom_case(0, index)[0], "RAS").array[0] for index in range(12)]
    mean = np.mean([volume / np.median(volume) for volume in volumes], axis=0)
    right_lung, left_lung = mean[-8:, 10:26, 12:36].mean(), mean[:8, 10:26, 12:36].mean()
    middle = mean[24:40, 24:40, 12:36].mean()
    left_front = mean[8:20, 44:60, :16].mean()
    assert max(right_lung, left_lung) < 0.5 * min(middle, left_front)


def test_affine_is_not_trivial() -> None:
    first, second = phantom_case(0, 0)[0], phantom_case(0, 1)[0]
    assert first.orientation == "LPS"
    assert first.spacing == pytest.approx((1.5, 1.5, 1.5))
    assert np.count_nonzero(first.affine[:3, :3]) == 9  # oblique
    assert not np.allclose(first.affine, second.affine)
    np.testing.assert_array_equal(first.affine, phantom_case(0, 0)[1].affine)


def test_case_depends_on_seed_and_index_only() -> None:
    first = phantom_case(3, 7, **SMALL)
    for seed, index, same in [(3, 7, True), (3, 8, False), (4, 7, False)]:
        other = phantom_case(seed, index, **SMALL)
        assert np.array_equal(first[0].array, other[0].array) == same
        assert np.array_equal(first[1].array, other[1].array) == same


def test_cases_differ_in_size_noise_and_scale() -> None:
    cases = [phantom_case(0, index, **SMALL) for index in range(20)]
    volumes = np.array([labels.array.sum() for _, labels in cases])
    medians = np.array([np.median(image.array) for image, _ in cases])
    assert volumes.std() / volumes.mean() > 0.1
    assert medians.max() / medians.min() > 3


def test_anisotropic_spacing() -> None:
    image, labels = phantom_case(0, 0, shape=(32, 32, 12), spacing=(3.0, 3.0, 6.0))
    assert image.spacing == pytest.approx((3, 3, 6))
    fine = phantom_case(0, 0)[1]
    volume, expected = (v.array.sum() * np.prod(v.spacing) for v in (labels, fine))
    assert volume == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_case_is_drawn_fast() -> None:
    start = time.process_time()
    for index in range(10):
        phantom_case(0, index)
    assert time.process_time() - start < 10 * 0.3


# The folder


def test_layout(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "phantom", **FEW)
    assert sorted(_files(root)) == [
        "dataset.json",
        "imagesTr/phantom_0000_0000.nii.gz",
        "imagesTr/phantom_0001_0000.nii.gz",
        "imagesTs/phantom_2000_0000.nii.gz",
        "imagesUn/phantom_1000_0000.nii.gz",
        "labelsTr/phantom_0000.nii.gz",
        "labelsTr/phantom_0001.nii.gz",
        "labelsTs/phantom_2000.nii.gz",
    ]
    description = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"] == {"background": 0, "left atrium": 1}
    assert description["channel_names"] == {"0": "MRI"}
    assert description["numTraining"] == 2
    assert description["file_ending"] == ".nii.gz"
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_files_hold_the_cases(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "phantom", **FEW)
    image, labels = phantom_case(0, 2000, **SMALL)
    stored = read_image(root / "imagesTs/phantom_2000_0000.nii.gz")
    reference = read_labels(root / "labelsTs/phantom_2000.nii.gz")
    np.testing.assert_array_equal(stored.array, image.array)
    np.testing.assert_array_equal(reference.array, labels.array)
    np.testing.assert_allclose(stored.affine, image.affine, atol=1e-4)
    np.testing.assert_array_equal(stored.affine, reference.affine)


def test_cases_do_not_depend_on_the_counts(tmp_path: Path) -> None:
    few = _files(make_phantom(tmp_path / "few", **FEW))
    more = _files(make_phantom(tmp_path / "more", **{**FEW, "labeled": 3, "unlabeled": 2}))
    del few["dataset.json"]
    assert few.items() <= more.items()


def test_three_classes_are_named(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "phantom", **FEW, classes=3)
    names = json.loads((root / "dataset.json").read_text())["labels"]
    assert names == {"background": 0, "left atrium": 1, "left ventricle": 2, "aorta": 3}
    values = np.unique(read_labels(root / "labelsTs/phantom_2000.nii.gz").array)
    assert values.tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="another phantom"):
        make_phantom(root, **FEW)


@pytest.mark.parametrize("classes", [0, 4])
def test_only_what_is_drawn_can_be_a_class(tmp_path: Path, classes: int) -> None:
    with pytest.raises(UsageError, match="1 to 3 classes"):
        make_phantom(tmp_path / "phantom", classes=classes)


def test_same_phantom_is_kept(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "phantom", **FEW)
    before = (root / "dataset.json").stat().st_mtime_ns
    assert make_phantom(root, **FEW) == root
    assert (root / "dataset.json").stat().st_mtime_ns == before


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    make_phantom(tmp_path, **FEW)
    assert (tmp_path / "dataset.json").is_file()


@pytest.mark.parametrize("change", [{"seed": 1}, {"labeled": 3}, {"spacing": 3.9}])
def test_another_phantom_is_not_overwritten(tmp_path: Path, change: dict) -> None:
    root = make_phantom(tmp_path / "phantom", **FEW)
    before = _files(root)
    with pytest.raises(UsageError, match="another phantom"):
        make_phantom(root, **{**FEW, **change})
    assert _files(root) == before


@pytest.mark.parametrize("name", ["notes.txt", "dataset.json"])
def test_other_files_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="holds other files"):
        make_phantom(tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"):
        make_phantom(tmp_path / "file", **FEW)


def test_stopped_halfway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seed: int, index: int, *grid: object) -> None:
        if index:
            raise KeyboardInterrupt
        return phantom_case(seed, index, *grid)

    monkeypatch.setattr(phantom, "phantom_case", stop)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "phantom", **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [-1, 1001])
def test_counts_out_of_range(tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match="0 to 1000"):
        make_phantom(tmp_path / "phantom", labeled=count)
