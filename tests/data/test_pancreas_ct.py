"""Pancreas-CT from DICOM and label files to a data set, as the literature prepares it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from abdomen import SHAPE, abdomen
from dicom_made import oblique, write_series
from made import world_grid
from scipy.ndimage import map_coordinates

from toy import TINY
from vclipseg.data.datasets import open_dataset
from vclipseg.data.orientation import turn, turn_affine
from vclipseg.data.pancreas_ct import (
    SAME_SCAN,
    TEST,
    TRAIN,
    crop_box,
    import_pancreas_ct,
    to_millimetres,
)
from vclipseg.data.volume import Volume, read_image, read_labels, write
from vclipseg.errors import DataError, UsageError

RECIPES = Path(__file__).parents[2] / "recipes"
SPACING = (1.6, 1.8, 3.0)
AFFINE = oblique()
AFFINE[:3, :3] *= np.divide(SPACING, np.linalg.norm(AFFINE[:3, :3], axis=0))
CASES = ("0057", "0018", "0062", "0001", "0004")
SERIES = "PANCREAS_{0}/11-24-2015-PANCREAS{0}-Pancreas-18957/Pancreas-99667"


def add_case(root, case_id, seed):
    """Series and label of a case, its label stored upside down."""
    hu, mask = abdomen(seed=seed)
    flips = (False, True, False)
    write_series(root / "dicom" / SERIES.format(case_id), hu, AFFINE)
    label = turn(mask, (0, 1, 2), flips).astype(np.uint8)
    header = turn_affine(AFFINE, mask.shape, (0, 1, 2), flips)
    write(Volume(label, header), root / "labels" / f"label{case_id}.nii.gz")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """What the archive serves, of a few cases. Not to be changed."""
    root = tmp_path_factory.mktemp("archive")
    for seed, case_id in enumerate(CASES):
        add_case(root, case_id, seed)
    (root / "dicom" / "PANCREAS_0025").mkdir()
    return root


@pytest.fixture
def changeable(archive, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(archive, tmp_path / "archive")


@pytest.fixture(scope="module")
def imported(archive, tmp_path_factory):
    """The data set made of it. Not to be changed."""
    return import_pancreas_ct(
        archive / "dicom", archive / "labels", tmp_path_factory.mktemp("data") / "pancreas"
    )


def run(archive, out, **options):
    return import_pancreas_ct(archive / "dicom", archive / "labels", out, **options)


# ---- lists -------------------------------------------------------------------------------


def test_the_published_split():
    assert len(TRAIN) == 62
    assert len(TEST) == 20
    assert {*TRAIN, *TEST} == {f"{n:04}" for n in range(1, 83)}
    assert TRAIN[:6] == ("0057", "0018", "0062", "0031", "0020", "0017")
    assert TRAIN[6:12] == ("0032", "0079", "0061", "0064", "0070", "0019")
    assert TRAIN[52] == "0002"
    assert [i in TEST for i in SAME_SCAN] == [False, True, False]


# ---- voxels ------------------------------------------------------------------------------


def test_the_cut_is_the_published_one():
    """25 voxels beside an organ of 96 at least; the notebook's sizes are 145 and 146."""
    labels = np.zeros((300, 200, 40), dtype=np.uint8)
    labels[60:191, 90:150, 10:20] = 1
    assert crop_box(labels) == [[35, 215], [47, 192], [0, 40]]  # 130 + 50, 59 + 2 * 18 + 50
    labels[60:191, 150, 10:20] = 1
    assert crop_box(labels)[1] == [47, 193]
    labels[0, 199, 0] = labels[299, 0, 39] = 1
    assert crop_box(labels) == [[0, 300], [0, 200], [0, 40]]


def test_millimetres_are_counted_from_the_first_voxel():
    affine = oblique()
    affine[:3, :3] *= np.divide((0.939453, 2.0, 1.0), np.linalg.norm(affine[:3, :3], axis=0))
    hu = np.zeros((512, 3, 4), dtype=np.float32)
    image, labels, box = to_millimetres(Volume(hu[None], affine), hu == 0, "none")
    assert image.shape == labels.shape == (481, 6, 4)  # 480.99994 mm of a rounded header
    assert box == [[0, 481], [0, 6], [0, 4]]
    np.testing.assert_allclose(image.spacing, 1)
    np.testing.assert_allclose(image.affine[:3, 3], affine[:3, 3])
    np.testing.assert_allclose(image.affine[:3, 0], affine[:3, 0] / 0.939453)


def test_images_are_cubic_and_labels_nearest():
    """Against SimpleITK's own resampling of the whole volume, cut afterwards."""
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 300, (90, 70, 6)).astype(np.float32)
    mask = np.zeros(hu.shape, dtype=bool)
    mask[40:50, 30:42, 1:4] = True
    affine = np.diag([-2.2, -2.4, 1.7, 1.0])
    image, labels, box = to_millimetres(Volume(hu[None], affine), mask, "label")
    cut = tuple(slice(*ends) for ends in box)
    assert box[0][0] > 0
    assert box[1][1] < int(70 * 2.4)
    for array, found, how in (
        (hu, image.array[0], sitk.sitkBSpline),
        (mask.astype(np.uint8), labels.array, sitk.sitkNearestNeighbor),
    ):
        whole = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        whole.SetSpacing((2.2, 2.4, 1.7))
        resample = sitk.ResampleImageFilter()
        resample.SetInterpolator(how)
        resample.SetOutputSpacing((1, 1, 1))
        resample.SetSize([198, 168, 10])
        expected = sitk.GetArrayFromImage(resample.Execute(whole)).T[cut]
        np.testing.assert_allclose(found[:-2, :-2], expected[:-2, :-2], atol=0.51)
    np.testing.assert_allclose(
        image.affine[:3, 3], affine[:3, 3] - [box[0][0], box[1][0], 0], atol=1e-9
    )


def test_every_voxel_is_where_the_scanner_saw_it(imported):
    """By way of the world, image and label are samples of the made-up scan, oblique as it is."""
    hu, mask = abdomen(seed=0)
    image = read_image(imported.folder / "imagesTr" / "0057_0000.nii.gz")
    labels = read_labels(imported.folder / "labelsTr" / "0057.nii.gz")
    np.testing.assert_allclose(image.affine, labels.affine)
    world = world_grid(image.shape, image.affine).reshape(3, -1)
    back = np.linalg.inv(AFFINE)
    index = (back[:3, :3] @ world + back[:3, 3:]).reshape(3, *image.shape)
    inside = np.all([(i > 1) & (i < n - 2) for i, n in zip(index, SHAPE, strict=True)], axis=0)
    splined = map_coordinates(hu, index, order=3, mode="mirror")
    np.testing.assert_allclose(image.array[0][inside], splined[inside], atol=1)
    nearest = map_coordinates(mask.astype(np.uint8), index, order=0, mode="nearest")
    assert (labels.array != nearest).mean() < 1e-3  # where two voxels are equally near
    assert imported.cases["0057"]["organ_ml"] == pytest.approx(mask.sum() * 8.64e-3, rel=0.02)


# ---- the data set ------------------------------------------------------------------------


def test_the_data_set_has_the_literatures_order_and_hu(imported):
    dataset = open_dataset(imported.folder)
    assert dataset.layout == "nnunet"
    assert [c.case_id for c in dataset.train] == ["0057", "0018", "0062"]
    assert [c.case_id for c in dataset.test] == ["0001", "0004"]
    assert dataset.class_names == ("background", "pancreas")
    assert dataset.channel_names == ("CT",)
    image = dataset.image(dataset.case("0001"))
    assert image.array.min() < -950
    assert dataset.labels(dataset.case("0001")).array.max() == 1


def test_what_was_turned_is_in_the_record(imported):
    record = json.loads((imported.folder / "import" / "0018.json").read_text(encoding="utf-8"))
    assert record["label"]["flipped"] == "y"
    assert record["label"]["by"] == "header"
    assert record["label"]["share"] > 0.9
    assert record["shape"] == list(SHAPE)
    assert record["spacing_mm"] == pytest.approx(SPACING)
    assert "  labels turned along y: 5 (by the header)" in imported.lines()


def test_a_cut_is_told_of_and_whole_scans_are_not(imported, archive, tmp_path):
    description = json.loads((imported.folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["import"]["crop"] == "label"
    (remark,) = open_dataset(imported.folder).remarks
    assert "cut around the reference labels, as the literature does" in remark
    assert remark in imported.lines()
    whole = run(archive, tmp_path / "whole", crop="none")
    assert open_dataset(whole.folder).remarks == ()
    assert (
        json.loads((whole.folder / "dataset.json").read_text(encoding="utf-8"))["import"]["crop"]
        == "none"
    )
    assert whole.cases["0057"]["box"] == [[0, 64], [0, 64], [0, 36]]


def test_missing_cases_are_named(imported):
    assert len(imported.missing) == 82 - len(CASES)
    assert imported.missing["0025"] == "no DICOM series"
    assert "  missing: 0070, no DICOM series" in imported.lines()
    assert json.loads((imported.folder / "dataset.json").read_text(encoding="utf-8"))["import"][
        "missing"
    ]["0079"]


def test_copies_of_one_scan_are_told_of_or_left_out(changeable, tmp_path):
    for seed, case_id in enumerate(SAME_SCAN, start=10):
        add_case(changeable, case_id, seed)
    with_them = run(changeable, tmp_path / "with")
    (remark,) = [text for text in with_them.remarks if "one scan" in text]
    assert "0002 (training), 0025 (test), 0070 (training)" in remark
    without = run(changeable, tmp_path / "without", without_duplicates=True)
    assert "0002" in without.cases
    assert not {"0025", "0070"} & ({*without.cases} | {*without.missing})
    assert not any("one scan" in text for text in without.remarks)


def test_a_label_without_series_and_a_series_without_label(changeable, tmp_path):
    shutil.rmtree(changeable / "dicom" / "PANCREAS_0018")
    (changeable / "labels" / "label0004.nii.gz").unlink()
    found = run(changeable, tmp_path / "data")
    assert list(found.cases) == ["0057", "0062", "0001"]
    assert found.missing["0018"] == "no DICOM series"
    assert found.missing["0004"] == "no label file"


# ---- going on ----------------------------------------------------------------------------


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.nii.gz")}


def test_what_is_imported_is_kept(changeable, tmp_path):
    taken = changeable / "dicom" / "PANCREAS_0062"
    aside = taken.rename(tmp_path / "aside")
    first = run(changeable, tmp_path / "data")
    before = stamps(first.folder)
    aside.rename(taken)
    seen = []
    again = run(changeable, tmp_path / "data", on_progress=lambda *told: seen.append(told))
    assert again.kept == 4
    assert [told[:2] for told in seen] == [(n, 5) for n in range(1, 6)]
    after = stamps(first.folder)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2
    assert [c.case_id for c in open_dataset(first.folder).train] == ["0057", "0018", "0062"]
    assert "4 of them there already" in again.lines()[0]


def test_file_names_do_not_make_other_sources(changeable, tmp_path):
    run(changeable, tmp_path / "data")
    for file in sorted((changeable / "dicom").rglob("*.dcm")):
        file.rename(file.with_name(f"IM-{file.name}"))
    assert run(changeable, tmp_path / "data").kept == 5


def test_nothing_is_overwritten(changeable, tmp_path):
    out = tmp_path / "data"
    run(changeable, out)
    with pytest.raises(UsageError, match=r"holds case 0057, .* another way.* new folder"):
        run(changeable, out, crop="none")
    shutil.rmtree(changeable / "dicom" / "PANCREAS_0004")
    with pytest.raises(UsageError, match="holds 0004, not among the cases"):
        run(changeable, out)
    with pytest.raises(UsageError, match="exists already"):
        run(changeable, changeable)


def test_one_bad_case_does_not_stop_the_others(changeable, tmp_path):
    series = changeable / "dicom" / SERIES.format("0018")
    (series / "1-005.dcm").unlink()
    label = changeable / "labels" / "label0001.nii.gz"
    write(Volume(np.ones((3, 3, 3), np.uint8), np.eye(4)), label)
    with pytest.raises(DataError) as failure:
        run(changeable, tmp_path / "data")
    message = str(failure.value)
    assert f"case 0018: {series}: about 1 slice(s) are missing" in message
    assert f"case 0001: {label}: the label has 3 x 3 x 3 voxels" in message
    assert "2 of 5 cases could not be imported" in message
    assert not (tmp_path / "data" / "dataset.json").exists()
    shutil.rmtree(series)
    label.unlink()
    assert run(changeable, tmp_path / "data").kept == 3


@pytest.mark.slow
def test_several_processes_make_the_same_files(imported, archive, tmp_path):
    pooled = run(archive, tmp_path / "data", workers=2)
    for path in stamps(imported.folder):
        other = pooled.folder / path.relative_to(imported.folder)
        np.testing.assert_array_equal(read_image(path).array, read_image(other).array)
    assert list(pooled.cases) == list(imported.cases)


# ---- the command line --------------------------------------------------------------------


def test_import_and_check(run_cli, archive, tmp_path):
    data = tmp_path / "pancreas"
    ask = ("import", "pancreas-ct", archive / "dicom", archive / "labels", "--out", data)
    code, out, err = run_cli(*ask, "--workers", 1)
    assert code == 0
    assert out.splitlines()[0] == f"Pancreas-CT: 3 training and 2 test cases in {data}"
    assert out.splitlines()[-1] == f"next: vclipseg check {data}"
    assert "import: 5/5" in err
    code, out, err = run_cli(*ask, "--workers", 1, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["kept"] == 5
    code, out, _ = run_cli("check", data)
    assert code == 0
    assert "0 errors, 0 warnings" in out


@pytest.mark.slow
def test_train_by_the_papers_recipe(run_cli, imported, tmp_path):
    """What was done to the data is said in everything that a run leaves."""
    data, folder = imported.folder, tmp_path / "run"
    settings = [*TINY, "method.name=supervised", "data.labeled=2", "train.steps=2"]
    settings += ["predict.window=[16, 16, 16]", "method.preset=robust"]
    options = [part for text in settings for part in ("--set", text)]
    recipe = RECIPES / "paper" / "pancreas-common.toml"
    code, out, _ = run_cli("train", recipe, "--data", data, "--out", folder, *options, "--no-check")
    assert code == 0
    assert "of the data: Volumes were cut around the reference labels" in out
    for name, keys in {
        "experiment.json": ("data", "remarks", 0),
        "plan.json": ("notes", "data"),
        "metrics.json": ("remarks", 0),
    }.items():
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        assert found.startswith("Volumes were cut around the reference labels"), name
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8"))["intensity"] == [
        "window_zscore"
    ]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Volumes were cut around the reference labels" in report


def test_exit_codes(run_cli, archive, tmp_path):
    ask = ("import", "pancreas-ct", archive / "dicom")
    code, out, err = run_cli(*ask, archive / "dicom", "--out", tmp_path / "data")
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert run_cli(*ask, tmp_path / "nowhere", "--out", tmp_path / "data")[0] == 2
    assert run_cli(*ask, archive / "labels")[0] == 2  # where to?


# ---- what is asked wrongly ---------------------------------------------------------------


def test_folders_that_are_not_there_or_not_it(archive, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        import_pancreas_ct(tmp_path / "no", archive / "labels", tmp_path / "data")
    with pytest.raises(UsageError, match=r"no such folder.*label0001\.nii\.gz"):
        import_pancreas_ct(archive / "dicom", tmp_path / "no", tmp_path / "data")
    with pytest.raises(DataError, match=r"no case in common.*PANCREAS_0001"):
        import_pancreas_ct(archive / "labels", archive / "dicom", tmp_path / "data")
    with pytest.raises(UsageError, match="--crop box: there are label and none"):
        run(archive, tmp_path / "data", crop="box")
    assert not (tmp_path / "data").exists()


def test_two_series_of_a_case(changeable, tmp_path):
    hu, _ = abdomen()
    write_series(changeable / "dicom" / "PANCREAS_0057" / "other", hu, AFFINE)
    with pytest.raises(DataError, match=r"case 0057 is in .* too\. Leave one of the two"):
        run(changeable, tmp_path / "data")


def test_the_folder_of_one_case_will_do(archive, tmp_path):
    one = archive / "dicom" / "PANCREAS_0057"
    assert list(import_pancreas_ct(one, archive / "labels", tmp_path / "data").cases) == ["0057"]
