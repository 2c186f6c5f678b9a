"""Data sets of DICOM: folders of cases, trees as an archive gives them, and what a check says of them."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
from dicom_made import (
    AXIAL,
    PATIENT_ID,
    edit,
    write_enhanced,
    write_object,
    write_series,
    write_slice,
)
from made import save_image

from vclipseg.data.check import check_dataset
from vclipseg.data.datasets import open_dataset
from vclipseg.data.dicom import read_series, series_files
from vclipseg.data.dicom_labels import read_dicom_label
from vclipseg.data.dicom_objects import dicom_writer
from vclipseg.data.fix import fix_copy
from vclipseg.data.volume import Volume, read_header, reorient, write
from vclipseg.errors import DataError, UsageError

SHAPE = (9, 7, 5)


def scan(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, SHAPE).astype(np.float32)


def labels() -> np.ndarray:
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[2:5, 2:5, 1:4] = 1
    return array


def save_series(folder, seed: int = 0, study: str = "1.2.3", patient: str = PATIENT_ID, **more):
    """A series of its own UID, `1.9.SEED`."""
    tags = {"t0020_000d": study, "t0010_0020": patient}
    return write_series(folder, scan(seed), AXIAL, series=f"1.9.{seed}", **tags, **more)


def save_label(path, affine=AXIAL):
    write(Volume(labels(), affine), path)


def cases(root) -> dict:
    return {case.case_id: case for case in open_dataset(root, class_names=["organ"]).cases}


def codes(root, **options) -> list[str]:
    findings = check_dataset(root, class_names=["organ"], **options)
    return [p.code for p in findings.problems if p.code != "no-labeled-case"]


@pytest.fixture
def folders(tmp_path):
    """Folders of cases: two labeled, one not, and one for the test."""
    root = tmp_path / "set"
    for n, name in enumerate(("images/a", "images/b/study/axial", "imagesUn/u", "imagesTs/t")):
        save_series(root / name, n, study=f"1.2.{n}", patient=f"number {n}")
    for name in ("labels/a", "labels/b", "labelsTs/t"):
        save_label(root / f"{name}.nii.gz")
    return root


# ---- folders of cases --------------------------------------------------------------------


def test_each_folder_is_a_case(folders):
    dataset = open_dataset(folders)
    assert [c.case_id for c in dataset.labeled] == ["a", "b"]
    assert [c.case_id for c in dataset.unlabeled] == ["u"]
    assert [c.case_id for c in dataset.test] == ["t"]
    assert dataset.channel_names == ("CT",)
    assert dataset.case("b").images == (folders / "images" / "b",)
    np.testing.assert_array_equal(dataset.image(dataset.case("b")).array[0], scan(1))
    np.testing.assert_array_equal(dataset.labels(dataset.case("a")).array, labels())
    assert check_dataset(folders).problems == ()


def test_series_and_volumes_side_by_side(folders):
    save_image(folders / "images" / "c.nii.gz", shape=SHAPE)
    dataset = open_dataset(folders)
    assert [c.case_id for c in dataset.train] == ["a", "b", "c", "u"]
    assert dataset.channel_names == ("image",)


def test_channels_are_folders_too(tmp_path):
    for n in range(4):
        save_series(tmp_path / "images" / f"{'ab'[n // 2]}_{n % 2:04d}", n)
    save_label(tmp_path / "labels" / "a.nii.gz")
    dataset = open_dataset(tmp_path)
    assert [len(c.images) for c in dataset.cases] == [2, 2]
    assert dataset.image(dataset.case("a")).array.shape == (2, *SHAPE)


def test_an_enhanced_file_is_a_case(tmp_path):
    write_enhanced(tmp_path / "images" / "a.dcm", scan(), AXIAL)
    write_enhanced(tmp_path / "images" / "b.dcm", scan(1), AXIAL, series="1.2.3.6")
    save_label(tmp_path / "labels" / "a.nii.gz")
    dataset = open_dataset(tmp_path)
    assert [c.case_id for c in dataset.labeled] == ["a"]
    assert [c.case_id for c in dataset.unlabeled] == ["b"]


def test_several_series_of_a_folder_are_cases_of_their_own(tmp_path):
    folder = tmp_path / "images" / "a"
    save_series(folder / "one", 1, t0020_0011="3")
    save_series(folder / "two", 2, t0020_0011="7")
    assert list(cases(tmp_path)) == ["a-3", "a-7"]


def test_a_csv_names_series(tmp_path):
    save_series(tmp_path / "scans" / "x")
    save_label(tmp_path / "x.nii.gz")
    (tmp_path / "cases.csv").write_text("case_id,image,label\nx,scans/x,x.nii.gz\n")
    dataset = open_dataset(tmp_path)
    assert dataset.image(dataset.case("x")).array.shape == (1, *SHAPE)


def test_a_mended_copy(folders, tmp_path):
    moved = AXIAL.copy()
    moved[0, 3] = 0.2
    save_label(folders / "labels" / "a.nii.gz", moved)
    (mended,) = fix_copy(check_dataset(folders), tmp_path / "copy")
    assert mended.code == "label-geometry-differs"
    assert check_dataset(tmp_path / "copy").problems == ()
    originals = sorted((folders / "images").rglob("*.dcm"))
    assert all(
        file.read_bytes() == (tmp_path / "copy" / file.relative_to(folders)).read_bytes()
        for file in originals
    )


# ---- trees -------------------------------------------------------------------------------


def test_any_tree_is_a_data_set(tmp_path):
    save_series(tmp_path / "x" / "1" / "SE1", 1)
    save_series(tmp_path / "x" / "2", 2, names=list("abcde"))
    save_series(tmp_path / "x" / "2", 3, names=list("vwxyz"), t0020_0011="4")
    found = cases(tmp_path)
    assert list(found) == ["SE1", f"2-{digest('1.9.2')}", "2-4"]
    assert found["SE1"].images == (tmp_path / "x" / "1" / "SE1",)
    assert found["2-4"].images == (tmp_path / "x" / "2" / "v",)
    assert open_dataset(tmp_path, class_names=["organ"]).layout == "dicom"


def digest(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def test_files_of_a_series_may_lie_in_several_folders(tmp_path):
    save_series(tmp_path / "p1" / "d1", 0, slices=range(2))
    save_series(tmp_path / "p1" / "d2", 0, slices=range(2, 5))
    save_series(tmp_path / "p2", 1)
    assert list(cases(tmp_path)) == ["p1", "p2"]
    assert read_header(tmp_path / "p1").shape == SHAPE
    assert codes(tmp_path) == []


def test_series_that_are_mixed_over_several_folders_are_not_trusted(tmp_path):
    for folder, slices in (("d1", range(2)), ("d2", range(2, 5))):
        for seed in (0, 1):
            names = [f"{seed}-{k}" for k in range(5)]
            save_series(tmp_path / folder, seed, slices=slices, names=names)
    assert codes(tmp_path) == ["dicom-several-series"] * 2


def test_what_is_no_scan_is_left_aside_with_a_note(tmp_path):
    save_series(tmp_path / "a")
    write_slice(
        tmp_path / "a" / "scout", scan()[:, :, 0], AXIAL, series="1.8",
        t0008_0008="ORIGINAL\\PRIMARY\\LOCALIZER",
    )  # fmt: skip
    write_slice(tmp_path / "a" / "one.dcm", scan()[:, :, 0], AXIAL, series="1.7")
    for n, sop in enumerate(("88.33", "88.59", "11.1", "481.5")):
        write_object(tmp_path / "b" / f"{n}.dcm", sop, f"1.6.{n}")
    write_object(tmp_path / "c" / "shot.dcm", "7", "1.5", Rows=4, Columns=4)
    findings = check_dataset(tmp_path, class_names=["organ"])
    skipped = [p for p in findings.problems if p.code == "dicom-skipped"]
    assert len(skipped) == 7
    assert {p.severity for p in skipped} == {"warning"}
    told = " ".join(p.message for p in skipped)
    for word in ("localizer", "single slice", "secondary capture", "SR", "Key Object", "Grayscale"):
        assert word in told
    assert list(cases(tmp_path)) == ["a"]
    assert open_dataset(tmp_path, class_names=["x"]).image(cases(tmp_path)["a"]).shape == SHAPE


def move(file, place):
    edit(file, ImagePositionPatient=place)


def broken_series(breaks):
    def save(folder):
        save_series(folder)
        breaks(folder)

    return save


@pytest.mark.parametrize(
    ("code", "save"),
    [
        ("dicom-missing-slices", lambda f: save_series(f, slices=[0, 1, 3, 4])),
        ("dicom-duplicate-slices", broken_series(lambda f: shutil.copy(f / "1-002.dcm", f / "c"))),
        ("dicom-uneven-slices", broken_series(lambda f: move(f / "1-005.dcm", [0, 0, 8.7]))),
        ("dicom-shifted-slices", broken_series(lambda f: move(f / "1-003.dcm", [3, 0, 4]))),
        ("dicom-mixed-grids", broken_series(lambda f: edit(f / "1-002.dcm", PixelSpacing=[1, 1]))),
        ("dicom-no-place", broken_series(lambda f: move(f / "1-002.dcm", None))),
        ("dicom-color", broken_series(lambda f: edit(f / "1-002.dcm", SamplesPerPixel=3))),
        ("unreadable-file", broken_series(lambda f: (f / "1-002.dcm").write_bytes(b"nothing"))),
    ],
)  # fmt: skip
def test_what_training_could_not_trust(tmp_path, code, save):
    save(tmp_path / "broken")
    save_series(tmp_path / "sound", 7)
    findings = check_dataset(tmp_path, class_names=["organ"])
    (problem,) = [p for p in findings.problems if p.code != "no-labeled-case"]
    assert (problem.code, problem.case_id, problem.severity) == (code, "broken", "error")
    assert problem.file.is_relative_to(tmp_path / "broken")
    assert "secret" not in problem.message.lower()


def test_a_tilted_gantry_is_told(tmp_path):
    save_series(tmp_path / "a", sideways_mm=0.3)
    assert codes(tmp_path) == ["dicom-tilted"]


def test_a_file_that_cannot_be_read_among_no_slices(tmp_path):
    save_series(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.dcm").write_bytes(b"nothing")
    assert codes(tmp_path) == ["unreadable-file"]


# ---- patients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Somebody_SECRET", f"{PATIENT_ID} axial", "mrn47110815"])
def test_no_case_is_called_as_its_patient(tmp_path, name):
    save_series(tmp_path / "tree" / name)
    save_series(tmp_path / "tree" / "other", 1)
    assert list(cases(tmp_path / "tree")) == [f"series-{digest('1.9.0')}", "other"]
    save_series(tmp_path / "set" / "images" / name)
    save_label(tmp_path / "set" / "labels" / f"{name}.nii.gz")
    (case,) = cases(tmp_path / "set").values()
    assert (case.case_id, case.subject) == (f"series-{digest('1.9.0')}",) * 2
    assert case.label


def test_series_of_a_patient_stay_together(tmp_path):
    for n, patient in enumerate(("p", "q", "p")):
        save_series(tmp_path / f"s{n}", n, study=f"1.2.{n}", patient=patient)
    assert [c.subject for c in cases(tmp_path).values()] == ["s0", "s1", "s0"]


def test_one_number_for_all_says_nothing(tmp_path):
    for n, study in enumerate(("1.1", "1.2", "1.2")):
        save_series(tmp_path / f"s{n}", n, study=study, patient="anonymous")
    assert [c.subject for c in cases(tmp_path).values()] == ["s0", "s1", "s1"]


# ---- segmentations -----------------------------------------------------------------------


def save_object(path, series, name="spleen", kind="seg"):
    """A segmentation or structure set of a series' folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [file.path for file in series_files(series)]
    dicom_writer(kind, files, ("background", name))(
        Volume(labels(), read_series(series).affine), path
    )


def test_segmentations_are_labels_of_the_series_they_reference(tmp_path):
    for n in range(3):
        save_series(tmp_path / f"s{n}", n, study=f"1.2.{n}", patient=f"number {n}")
    save_object(tmp_path / "s0" / "seg.dcm", tmp_path / "s0")
    save_object(tmp_path / "labels of all" / "s2.dcm", tmp_path / "s2", "liver", "rtstruct")
    dataset = open_dataset(tmp_path)
    assert [c.case_id for c in dataset.labeled] == ["s0", "s2"]
    assert dataset.class_names == ("background", "spleen", "liver")
    assert np.unique(dataset.labels(dataset.case("s2")).array).tolist() == [0, 2]
    findings = check_dataset(tmp_path)
    assert findings.problems == ()
    assert [c.cases for c in findings.summary.classes] == [1, 1]


def test_segmentations_in_folders_of_labels(tmp_path):
    for n, name in enumerate("abc"):
        save_series(tmp_path / "images" / name, n)
    images, given = tmp_path / "images", tmp_path / "labels"
    save_object(given / "a.dcm", images / "a")
    save_object(given / "b" / "whatever", images / "b", "liver", "rtstruct")
    save_object(given / "of the third.dcm", images / "c")
    dataset = open_dataset(tmp_path)
    assert [c.label.name for c in dataset.labeled] == ["a.dcm", "whatever", "of the third.dcm"]
    assert dataset.class_names == ("background", "spleen", "liver")
    assert check_dataset(tmp_path).problems == ()


def test_names_beside_values_need_an_order(tmp_path):
    for n, name in enumerate("ab"):
        save_series(tmp_path / "images" / name, n)
    save_object(tmp_path / "labels" / "a.dcm", tmp_path / "images" / "a")
    save_label(tmp_path / "labels" / "b.nii.gz")
    with pytest.raises(DataError, match="class_names"):
        open_dataset(tmp_path)
    dataset = open_dataset(tmp_path, class_names=["spleen"])
    assert [dataset.labels(c).array.max() for c in dataset.cases] == [1, 1]


def test_labels_that_do_not_say_which(tmp_path):
    save_series(tmp_path / "s0")
    for name in ("one", "two"):
        save_object(tmp_path / f"{name}.dcm", tmp_path / "s0")
    write_object(tmp_path / "far.dcm", "66.4", "1.4.6", "1.9.7")
    assert sorted(codes(tmp_path)) == ["dicom-several-labels", "label-without-image"]
    assert cases(tmp_path)["s0"].label is None


def test_what_reads_segmentations_may_not_be_installed(monkeypatch, tmp_path):
    folder = save_series(tmp_path / "a")
    save_object(tmp_path / "seg.dcm", folder)
    monkeypatch.setattr("vclipseg.data.dicom_planes.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vclipseg\[dicom\]'"):
        read_dicom_label(tmp_path / "seg.dcm", read_series(folder), ("background", "spleen"))


def test_labels_may_have_their_axes_turned(folders):
    """As of a volume that a converter made of the series."""
    write(reorient(Volume(labels(), AXIAL), "RAS"), folders / "labels" / "a.nii.gz")
    dataset = open_dataset(folders)
    np.testing.assert_array_equal(dataset.labels(dataset.case("a")).array, labels())
    assert check_dataset(folders).problems == ()
