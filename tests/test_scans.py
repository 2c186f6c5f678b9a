"""Files in, files out, with a predictor that thresholds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vclipseg.console import Console
from vclipseg.data import dicom_objects
from vclipseg.data.dicom import read_series
from vclipseg.data.dicom_objects import KINDS
from vclipseg.data.volume import Volume, read_image, read_labels, reorient, write
from vclipseg.errors import DataError, UsageError
from vclipseg.scans import find_scans, mask_path, not_found, object_kind, predict_scans

sys.path.append(str(Path(__file__).parent / "data"))
import dicom_made

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 3, -20], [0, 1, 0, 5], [0, 0, 0, 1]])


class Threshold:
    """What `predict_scans` knows of a predictor."""

    def __init__(self, channels=1, label_values=(0, 1)):
        self.description = {"channel_names": [f"MR{c}" for c in range(channels)]}
        self.description |= {"method": {"name": "vclipseg"}, "preset": "robust"}
        self.label_values = label_values
        self.class_names = ("background", "left atrium")
        self.seen = []

    def predict(self, volume):
        self.seen.append(volume.array.shape)
        return Volume((volume.array[0] > 0).astype(np.uint8), volume.affine)

    def probabilities(self, volume):
        mask = self.predict(volume).array.astype(np.float32)
        return Volume(np.stack([1 - mask, mask]), volume.affine)


def save(path, seed=0, channels=1):
    array = np.random.default_rng(seed).normal(size=(channels, 6, 5, 4)).astype(np.float32)
    write(Volume(array, AFFINE), path)
    return path


def predict(predictor, inputs, output=None, **options):
    return predict_scans(predictor, inputs, output, Console(quiet=True), **options)


def names(scans):
    return {scan.name: [file.name for file in scan.files] for scan in scans}


# Which files are one scan


def touch(folder, *files):
    for file in files:
        (folder / file).touch()
    return [folder / file for file in files]


def test_a_folder_gives_a_scan_a_file(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nrrd", "notes.txt", "._a.nrrd", "c.mha")
    assert names(find_scans([tmp_path], 1)) == {
        "a": ["a.nrrd"],
        "b": ["b.nii.gz"],
        "c": ["c.mha"],
    }


def test_channel_files_are_one_scan(tmp_path):
    files = touch(tmp_path, "a_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    expected = {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}
    assert names(find_scans([tmp_path], 2)) == expected
    assert names(find_scans(files, 2)) == expected


def test_numbers_of_patients_are_not_channels(tmp_path):
    touch(tmp_path, "patient_0001.nii.gz", "patient_0002.nii.gz", "other_0000.nii.gz")
    assert names(find_scans([tmp_path], 1)) == {
        "other": ["other_0000.nii.gz"],
        "patient_0001": ["patient_0001.nii.gz"],
        "patient_0002": ["patient_0002.nii.gz"],
    }


def test_a_file_with_all_channels_is_a_scan(tmp_path):
    files = touch(tmp_path, "a.nii.gz")
    assert names(find_scans(files, 3)) == {"a": ["a.nii.gz"]}


def test_files_given_twice_are_taken_once(tmp_path):
    file = touch(tmp_path, "a.nii.gz")[0]
    assert names(find_scans([file, tmp_path, file], 1)) == {"a": ["a.nii.gz"]}


def test_a_missing_channel(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0002.nii.gz")
    with pytest.raises(UsageError, match=r"2 channel files.*reads 3; name them a_0000 to a_0002"):
        find_scans([tmp_path], 3)


def test_no_scan(tmp_path):
    with pytest.raises(UsageError, match="no DICOM, NIfTI, NRRD or MHA image"):
        find_scans([tmp_path], 1)
    with pytest.raises(UsageError, match=r"x\.nii\.gz: no such file"):
        find_scans([tmp_path / "x.nii.gz"], 1)


# Where masks go


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, "in/a_seg.nii.gz"),
        ("out", "out/a.nii.gz"),
        ("mask.nrrd", "mask.nrrd"),
        ("mask.nii.gz", "mask.nii.gz"),
    ],
)
def test_mask_path(tmp_path, output, expected):
    scan = find_scans([save(tmp_path / "in" / "a_0000.nii.gz")], 1)[0]
    assert mask_path(scan, output and tmp_path / output, several=False) == tmp_path / expected


def test_one_file_for_several_scans(tmp_path):
    scans = [save(tmp_path / "a.nii.gz"), save(tmp_path / "b.nii.gz")]
    with pytest.raises(UsageError, match="one file for several scans"):
        predict(Threshold(), scans, tmp_path / "mask.nii.gz")


def test_two_scans_of_one_name(tmp_path):
    scans = [save(tmp_path / d / "a.nii.gz") for d in ("x", "y")]
    with pytest.raises(UsageError, match="two scans of the same name"):
        predict(Threshold(), scans, tmp_path / "out")
    assert predict(Threshold(), scans) == [tmp_path / d / "a_seg.nii.gz" for d in ("x", "y")]


# Predicting


def test_masks_lie_on_their_scans(tmp_path):
    scan = save(tmp_path / "a.nii.gz")
    (written,) = predict(Threshold(), [scan], tmp_path / "out")
    image, mask = read_image(scan), read_labels(written)
    assert np.array_equal(mask.array, image.array[0] > 0)
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize("values", [(0, 1), (0, 205), (0, 500), (0, -1)])
def test_masks_hold_the_data_sets_own_values(tmp_path, values):
    (written,) = predict(Threshold(label_values=values), [save(tmp_path / "a.nii.gz")])
    assert set(np.unique(read_labels(written).array)) == set(values)


def test_channels_are_read_together(tmp_path):
    for c in range(2):
        save(tmp_path / f"a_000{c}.nii.gz", seed=c)
    predictor = Threshold(channels=2)
    assert predict(predictor, [tmp_path]) == [tmp_path / "a_seg.nii.gz"]
    assert predictor.seen == [(2, 6, 5, 4)]


def test_probabilities_beside_the_mask(tmp_path):
    scan = save(tmp_path / "a.nii.gz")
    files = predict(Threshold(), [scan], tmp_path / "m.nii.gz", probabilities=True)
    assert [file.name for file in files] == ["m_probs.nii.gz", "m.nii.gz"]
    probs, mask = read_image(files[0]), read_labels(files[1])
    assert probs.array.shape == (2, 6, 5, 4)
    assert np.array_equal(probs.array.argmax(0), mask.array)


def test_nothing_is_overwritten(tmp_path):
    scan = save(tmp_path / "a.nii.gz")
    (written,) = predict(Threshold(), [scan])
    written.write_bytes(b"mine")
    other = save(tmp_path / "b.nii.gz")
    predictor = Threshold()
    with pytest.raises(UsageError, match=r"a_seg\.nii\.gz: exists already.*--overwrite"):
        predict(predictor, [other, scan])
    assert predictor.seen == []  # not even what would be free
    assert written.read_bytes() == b"mine"
    predict(Threshold(), [scan], overwrite=True)
    assert written.read_bytes() != b"mine"


def test_probabilities_are_not_overwritten_either(tmp_path):
    scan = save(tmp_path / "a.nii.gz")
    mine = Path(tmp_path / "m_probs.nii.gz")
    mine.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"m_probs\.nii\.gz: exists already"):
        predict(Threshold(), [scan], tmp_path / "m.nii.gz", probabilities=True)
    assert mine.read_bytes() == b"mine"


def test_masks_of_an_earlier_run_are_not_scans(tmp_path):
    save(tmp_path / "a_0000.nii.gz")
    save(tmp_path / "b.nii.gz")
    predict(Threshold(), [tmp_path], probabilities=True)
    found = names(find_scans([tmp_path], 1))
    assert found == {"a": ["a_0000.nii.gz"], "b": ["b.nii.gz"]}
    save(tmp_path / "lonely_seg.nii.gz")  # of no scan here, so somebody's scan
    assert set(names(find_scans([tmp_path], 1))) == {"a", "b", "lonely_seg"}


def test_a_damaged_scan_is_named(tmp_path):
    broken = tmp_path / "a.nii.gz"
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.nii\.gz"):
        predict(Threshold(), [broken])


# DICOM objects


@pytest.fixture
def extra():
    """Skips where it cannot be made."""
    pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")


def series(folder, seed=0, uid="1.2.3.4"):
    values = np.random.default_rng(seed).normal(0, 100, (9, 8, 4))
    return dicom_made.write_series(folder, values, dicom_made.oblique(), series=uid)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_mask_of_a_series_as_an_object_of_it(tmp_path, extra, kind):
    folder = series(tmp_path / "CT chest")
    predictor = Threshold(label_values=(0, 205))
    (written,) = predict(predictor, [folder], tmp_path / "out.dcm", dicom=kind)
    image = read_series(folder)
    found = dicom_objects.read_labels(written, image, predictor.class_names)
    assert np.array_equal(found.array, image.array[0] > 0)
    assert dicom_objects.referenced_series(written) == "1.2.3.4"
    expected = "RTSTRUCT" if kind == "rtstruct" else "SEG"
    header = pytest.importorskip("pydicom").dcmread(written)
    assert header.Modality == expected


def test_a_folder_of_series_gives_a_folder_of_objects(tmp_path, extra):
    for n, name in enumerate("ab"):
        series(tmp_path / "in" / name, uid=f"1.2.{n}")
    files = predict(Threshold(), [tmp_path / "in"], tmp_path / "out", dicom="seg-labelmap")
    assert files == [tmp_path / "out/a.dcm", tmp_path / "out/b.dcm"]
    (beside,) = predict(Threshold(), [tmp_path / "in/a"], dicom="rtstruct", probabilities=True)[1:]
    assert beside == tmp_path / "in/a_seg.dcm"
    assert (tmp_path / "in/a_seg_probs.nii.gz").is_file()


def test_a_series_as_nifti(tmp_path):
    folder = series(tmp_path / "a")
    (written,) = predict(Threshold(), [folder])
    assert written == tmp_path / "a_seg.nii.gz"
    np.testing.assert_allclose(read_labels(written).affine, read_series(folder).affine, atol=1e-4)


def test_what_no_object_can_be_made_of(tmp_path, extra):
    scan = save(tmp_path / "a.nii.gz")
    predictor = Threshold()
    with pytest.raises(UsageError, match=r"a\.nii\.gz: is no DICOM series"):
        predict(predictor, [scan], tmp_path / "out.dcm")
    with pytest.raises(UsageError, match=r"m\.nii\.gz: a DICOM object is named so: m\.dcm"):
        predict(predictor, [series(tmp_path / "b")], tmp_path / "m.nii.gz", dicom="seg")
    with pytest.raises(UsageError, match="pdf: no kind of DICOM object"):
        predict(predictor, [scan], dicom="pdf")
    with pytest.raises(UsageError, match="codes are for DICOM objects"):
        predict(predictor, [scan], codes=tmp_path / "codes.json")
    (tmp_path / "out.dcm").touch()
    with pytest.raises(UsageError, match=r"out\.dcm: exists already"):
        predict(predictor, [tmp_path / "b"], tmp_path / "out.dcm")
    assert predictor.seen == []


def test_a_folder_may_be_named_as_a_file(tmp_path, extra):
    (tmp_path / "x.dcm").mkdir()
    assert object_kind(None, tmp_path / "x.dcm") is None
    assert object_kind(None, tmp_path / "y.DCM") == "seg"
    assert object_kind("rtstruct", tmp_path / "y.dcm") == "rtstruct"


# What must not happen to scans


def test_channels_are_turned_alike(tmp_path):
    first = read_image(save(tmp_path / "a_0000.nii.gz"))
    second = read_image(save(tmp_path / "one" / "x.nii.gz", seed=1))
    write(reorient(second, "LPS"), tmp_path / "a_0001.nii.gz")
    image = read_image([tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"])
    np.testing.assert_array_equal(image.array, np.concatenate([first.array, second.array]))
    np.testing.assert_array_equal(image.affine, first.affine)


def moved(volume, voxels):
    step = np.eye(4)
    step[0, 3] = voxels
    return Volume(volume.array, volume.affine @ step)


def test_channels_that_lie_elsewhere_are_refused(tmp_path):
    first = save(tmp_path / "a_0000.nii.gz")
    second = tmp_path / "a_0001.nii.gz"
    write(moved(read_image(first), 0.9), second)  # what rounding in headers may do
    assert len(read_image([first, second]).array) == 2
    write(moved(read_image(first), 1.1), second)
    with pytest.raises(DataError, match=r"a_0001.nii.gz: lies up to 2.2 mm from a_0000.nii.gz"):
        predict(Threshold(channels=2), [tmp_path], tmp_path / "masks")
    write(Volume(read_image(first).array[:, 1:], AFFINE), second)
    with pytest.raises(DataError, match=r"shape \(5, 5, 4\) differs"):
        read_image([first, second])


def test_a_mask_never_takes_the_place_of_a_scan(tmp_path):
    scan = save(tmp_path / "own" / "a.nii.gz")
    before = scan.read_bytes()
    for output in (scan.parent, scan, tmp_path / "own" / ".." / "own"):
        with pytest.raises(UsageError, match="is a scan to predict"):
            predict(Threshold(), [scan], output, overwrite=True)
    assert scan.read_bytes() == before


def test_an_object_never_takes_the_place_of_a_slice(tmp_path, extra):
    folder = series(tmp_path / "ct")
    slices = sorted(folder.iterdir())
    before = slices[0].read_bytes()
    with pytest.raises(UsageError, match="is a scan to predict"):
        predict(Threshold(), [folder], slices[0].rename(folder / "1.dcm"), overwrite=True)
    assert (folder / "1.dcm").read_bytes() == before


def test_voxels_that_are_no_numbers_are_told(tmp_path, capsys):
    array = np.ones((1, 6, 5, 4), np.float32)
    array[0, 0] = np.nan
    write(Volume(array, AFFINE), tmp_path / "some.nii.gz")
    predict_scans(Threshold(), [tmp_path / "some.nii.gz"], tmp_path / "masks", Console())
    assert "some: 20 voxels are no numbers" in " ".join(capsys.readouterr().err.split())
    write(Volume(array * np.nan, AFFINE), tmp_path / "all.nii.gz")
    with pytest.raises(DataError, match="no voxel is a number"):
        predict(Threshold(), [tmp_path / "all.nii.gz"], tmp_path / "masks")


def test_a_class_that_masks_lack_is_told(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", -1.0)):
        write(Volume(np.full((1, 6, 5, 4), value, np.float32), AFFINE), tmp_path / f"{name}.nii.gz")

    def told(folder, *names):
        scans = [tmp_path / f"{name}.nii.gz" for name in names]
        predict_scans(Threshold(), scans, tmp_path / folder, Console())
        return " ".join(capsys.readouterr().err.split())

    assert "not found" not in told("one", "a")
    assert told("two", "a", "b").endswith("left atrium: not found in 1 of 2 scan(s): b")
    assert "in 1 of 1 scan(s): b; are they of the kind that the model was trained on?" in told(
        "3", "b"
    )


def test_many_scans_without_a_class_are_not_all_named():
    found = [*((str(number), [0, 1]) for number in range(7)), ("7", [0, 1, 2])]
    lines = list(not_found(("background", "liver", "tumor"), found))
    assert lines == ["tumor: not found in 7 of 8 scan(s): 0, 1, 2, 3, 4 and 2 more"]


def test_an_output_that_is_another_file(tmp_path):
    scan = save(tmp_path / "a.nii.gz")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(
        UsageError, match=r"is no image and no folder; name the mask .*notes.nii.gz"
    ):
        predict(Threshold(), [scan], tmp_path / "notes")


@pytest.mark.parametrize("kind", [None, "seg"])
def test_scans_that_cannot_be_read_do_not_stop_the_others(tmp_path, extra, kind, capsys):
    """A study holds a localizer whose slices are of two planes."""
    for number, name in enumerate("abc"):
        series(tmp_path / "study" / name, seed=number, uid=f"1.2.{number}")
    dicom_made.write_series(
        tmp_path / "study" / "b",
        np.zeros((9, 8, 2)),
        dicom_made.oblique((80.0, 0.0, 0.0)),
        names=["x1.dcm", "x2.dcm"],
        series="1.2.1",
    )
    with pytest.raises(DataError, match=r"1 of 3 scans were not predicted, first: .*b"):
        predict_scans(Threshold(), [tmp_path / "study"], tmp_path / "masks", Console(), dicom=kind)
    suffix = ".dcm" if kind else ".nii.gz"
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [f"a{suffix}", f"c{suffix}"]
    assert "b: not predicted" in capsys.readouterr().err
