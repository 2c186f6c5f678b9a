from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from made import SHAPE, nnunet_folder, save_image, save_json, save_labels

from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.data.volume import read_labels
from vclipseg.errors import DataError, UsageError

MSD = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}}


def ids(cases) -> list[str]:
    return [case.case_id for case in cases]


def roles(dataset: Dataset) -> tuple[list[str], list[str], list[str]]:
    return ids(dataset.labeled), ids(dataset.unlabeled), ids(dataset.test)


def change_description(root: Path, **changes) -> None:
    file = root / "dataset.json"
    save_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


# ---- layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_nnunet(tmp_path, suffix):
    root = nnunet_folder(tmp_path / "Dataset001_Organ", suffix=suffix, channels=2)
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.name) == ("nnunet", "Dataset001_Organ")
    assert dataset.channel_names == ("MR0", "MR1")
    assert dataset.class_names == ("background", "organ")
    assert roles(dataset) == (["a", "b"], ["u"], ["t"])
    assert dataset.image(dataset.case("a")).array.shape == (2, *SHAPE)
    labels = dataset.labels(dataset.case("t")).array
    assert labels.dtype == np.uint8
    assert np.unique(labels).tolist() == [0, 1]
    assert open_dataset(root / "dataset.json") == dataset


def test_nnunet_image_without_label_is_unlabeled(tmp_path):
    root = nnunet_folder(tmp_path, labeled=["a", "b", "c"], unlabeled=[])
    (root / "labelsTr" / "b.nii.gz").unlink()
    assert roles(open_dataset(root)) == (["a", "c"], ["b"], ["t"])


def test_what_is_to_be_said_of_the_data(tmp_path):
    root = nnunet_folder(tmp_path)
    assert open_dataset(root).remarks == ()
    change_description(root, remarks=["Cut.", "Twice."])
    assert open_dataset(root).remarks == ("Cut.", "Twice.")
    change_description(root, remarks="Cut.")
    with pytest.raises(DataError, match='"remarks" must be a list of sentences'):
        open_dataset(root)


def test_nnunet_v1_keys(tmp_path):
    root = nnunet_folder(tmp_path)
    save_json(root / "dataset.json", MSD)
    dataset = open_dataset(root)
    assert dataset.layout == "nnunet"
    assert (dataset.channel_names, dataset.class_names) == (("MRI",), ("background", "organ"))


def test_nnunet_v1_lists_cases_without_channel_numbers(tmp_path):
    root = nnunet_folder(tmp_path, channels=2)
    training = [
        {"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in "ba"
    ]
    modality = {"0": "T1", "1": "T2"}
    content = MSD | {"modality": modality, "training": training, "test": ["./imagesTs/t.nii.gz"]}
    save_json(root / "dataset.json", content)
    dataset = open_dataset(root)
    assert roles(dataset) == (["b", "a"], ["u"], ["t"])
    assert [len(c.images) for c in dataset.cases] == [2, 2, 2, 2]
    assert all(c.label for c in dataset.test)


def test_nnunet_explicit_listing(tmp_path, monkeypatch):
    root = nnunet_folder(tmp_path / "set")
    outside = save_image(tmp_path / "elsewhere" / "x.nii.gz")
    monkeypatch.setenv("ELSEWHERE", str(outside.parent))
    listed = {
        "second": {"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"},
        "first": {"images": ["$ELSEWHERE/x.nii.gz"]},
    }
    change_description(root, dataset=listed)
    assert roles(open_dataset(root)) == (["second"], ["first", "u"], ["t"])


def test_nnunet_listed_unlabeled(tmp_path):
    root = nnunet_folder(tmp_path, unlabeled=["u", "v"])
    save_image(root / "more" / "w.nii.gz")
    entries = [{"image": "./imagesUn/v_0000.nii.gz"}, {"image": "more/w.nii.gz"}]
    change_description(root, unlabeled=entries)
    assert roles(open_dataset(root))[1] == ["u", "v", "w"]


def test_decathlon(tmp_path):
    for name in ("x_2", "x_1"):
        save_image(tmp_path / "imagesTr" / f"{name}.nii.gz", channels=2)
        save_labels(tmp_path / "labelsTr" / f"{name}.nii.gz")
    (tmp_path / "imagesTr" / "._x_1.nii.gz").write_bytes(b"macOS")
    for name in ("t_1", "t_2"):
        save_image(tmp_path / "imagesTs" / f"{name}.nii.gz", channels=2)
    save_labels(tmp_path / "labelsTs" / "t_1.nii.gz")
    save_image(tmp_path / "imagesUn" / "u_1.nii.gz", channels=2)
    training = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
        for n in ("x_2", "x_1", "._x_1")
    ]
    content = MSD | {
        "name": "Organs",
        "modality": {"0": "T1", "1": "T2"},
        "training": training,
        "test": ["./imagesTs/t_2.nii.gz", "./imagesTs/t_1.nii.gz"],
        "unlabeled": [{"image": "./imagesUn/u_1.nii.gz"}],
    }
    save_json(tmp_path / "dataset.json", content)
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.name) == ("decathlon", "Organs")
    assert roles(dataset) == (["x_2", "x_1"], ["u_1"], ["t_2", "t_1"])
    assert [bool(c.label) for c in dataset.test] == [False, True]
    assert dataset.image(dataset.train[0]).array.shape == (2, *SHAPE)


def la_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["image"] = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        file["label"] = np.resize([0, 1], SHAPE).astype(np.uint8)


@pytest.mark.parametrize("lists_at", [".", "Training Set", None])
def test_la_hdf5(tmp_path, lists_at):
    for case_id in ("A", "B", "C"):
        la_file(tmp_path / "Training Set" / case_id / "mri_norm2.h5")
    if lists_at:
        (tmp_path / lists_at / "train.list").write_text("B\nA\n")
        (tmp_path / lists_at / "test.list").write_text("C\n")
    for folder in (tmp_path, tmp_path / "Training Set"):
        dataset = open_dataset(folder)
        expected = (["B", "A"], [], ["C"]) if lists_at else (["A", "B", "C"], [], [])
        assert dataset.layout == "la_h5"
        assert roles(dataset) == expected
        assert dataset.class_names == ("background", "left atrium")
    assert dataset.image(dataset.cases[0]).spacing == (0.625,) * 3
    assert dataset.labels(dataset.cases[0]).array.max() == 1


def test_la_hdf5_list_names_a_missing_case(tmp_path):
    la_file(tmp_path / "A" / "mri_norm2.h5")
    (tmp_path / "train.list").write_text("A\nZ\n")
    with pytest.raises(DataError, match="Z"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("image", "case_id", "label"),
    [("x", "x", "x"), ("x_0000", "x", "x"), ("x_0001", "x_0001", "x_0001"), ("1", "1", "1")],
)
def test_loose_folders(tmp_path, image, case_id, label):
    other = image.replace("x", "u").replace("1", "2") if image == "1" else image.replace("x", "u")
    save_image(tmp_path / "images" / f"{image}.nii.gz")
    save_labels(tmp_path / "labels" / f"{label}.nii.gz", (0, 1, 2))
    save_image(tmp_path / "imagesUn" / f"{other}.nii.gz")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "folders"
    assert ids(dataset.labeled) == [case_id]
    assert len(dataset.unlabeled) == 1
    assert dataset.class_names == ("background", "class_1", "class_2")
    assert dataset.channel_names == ("image",)


def test_loose_folders_with_channels_and_test(tmp_path):
    for folder, case_id in (("images", "a"), ("imagesTs", "t"), ("images", "u")):
        for channel in range(2):
            save_image(tmp_path / folder / f"{case_id}_{channel:04d}.mha", channel)
    save_labels(tmp_path / "labels" / "a.mha")
    save_labels(tmp_path / "labelsTs" / "t.mha")
    dataset = open_dataset(tmp_path, class_names=["spleen"])
    assert roles(dataset) == (["a"], ["u"], ["t"])
    assert dataset.channel_names == ("channel_0", "channel_1")
    assert dataset.class_names == ("background", "spleen")


def test_mhd_with_its_raw_file(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        array = np.resize([0, 1], SHAPE).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / folder / "a.mhd"))
    assert roles(open_dataset(tmp_path)) == (["a"], [], [])


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def csv_rows(root: Path) -> list[dict]:
    for name in ("a", "b", "t"):
        save_image(root / f"{name}1.nii.gz")
        save_image(root / f"{name}2.nii.gz")
    save_labels(root / "a_seg.nii.gz", (0, 1, 2))
    save_labels(root / "t_seg.nii.gz", (0, 1, 2))
    row = {"annotated_classes": "", "site": "A"}
    return [
        row | {"case_id": i, "image": f"{i}1.nii.gz; {i}2.nii.gz", "label": label} | more
        for i, label, more in (
            ("b", "", {"split": "", "subject": "s1"}),
            ("t", "t_seg.nii.gz", {"split": "test", "subject": "s2"}),
            ("a", "a_seg.nii.gz", {"split": "train", "subject": "s1"}),
        )
    ]


def test_csv(tmp_path):
    file = write_csv(tmp_path / "mine.csv", csv_rows(tmp_path))
    for path in (file, tmp_path):
        dataset = open_dataset(path)
        assert (dataset.layout, dataset.name) == ("csv", "mine")
        assert roles(dataset) == (["a"], ["b"], ["t"])
        assert ids(dataset.train) == ["b", "a"]
        assert [c.subject for c in dataset.train] == ["s1", "s1"]
        assert dataset.image(dataset.train[0]).array.shape == (2, *SHAPE)
        assert len(dataset.class_names) == 3


def test_csv_split_unlabeled_hides_a_label(tmp_path):
    rows = csv_rows(tmp_path)
    rows.append(rows[-1] | {"case_id": "c", "split": "unlabeled"})
    dataset = open_dataset(write_csv(tmp_path / "mine.csv", rows))
    assert dataset.case("c").label is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"split": "val"}, "line 2.*split"),
        ({"annotated_classes": "liver", "label": "a_seg.nii.gz"}, "line 2.*some classes"),
        ({"image": ""}, "line 2.*image"),
        ({"case_id": "a"}, "id a is taken"),
        ({"case_id": "x/y"}, "x/y.*file name"),
        ({"label": "gone.nii.gz"}, "gone.*not there"),
    ],
)
def test_csv_mistakes_are_named(tmp_path, change, match):
    rows = csv_rows(tmp_path)
    rows[0] |= change
    with pytest.raises(DataError, match=match):
        open_dataset(write_csv(tmp_path / "mine.csv", rows))


def test_tables_of_other_things_are_no_data_set(tmp_path):
    """Archives come with a table of their series, studies with one of their patients."""
    for name in ("a", "b"):
        save_image(tmp_path / "images" / f"{name}.nii.gz")
        save_labels(tmp_path / "labels" / f"{name}.nii.gz")
    (tmp_path / "patients.csv").write_text("patient,age\na,61\n")
    assert open_dataset(tmp_path).layout == "folders"
    (tmp_path / "latin.csv").write_bytes("Größe\n1\n".encode("latin-1"))
    assert open_dataset(tmp_path).layout == "folders"
    write_csv(tmp_path / "mine.csv", csv_rows(tmp_path))
    assert open_dataset(tmp_path).name == "mine"


def test_a_table_alone_is_told_what_it_lacks(tmp_path):
    (tmp_path / "mine.csv").write_text("patient,file\n1,a.nii.gz\n")
    with pytest.raises(
        DataError, match=r"mine.csv: needs a first line with at least case_id,image"
    ):
        open_dataset(tmp_path)


def test_csv_needs_its_columns(tmp_path):
    (tmp_path / "mine.csv").write_text("patient,file\n1,a.nii.gz\n")
    with pytest.raises(DataError, match="case_id,image,label"):
        open_dataset(tmp_path / "mine.csv")


def test_no_data_set(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"Known layouts.*dataset\.json"):
        open_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no cases"):
        open_dataset(tmp_path)


# ---- broken folders --------------------------------------------------------------------


def test_a_label_without_image_is_named(tmp_path):
    root = nnunet_folder(tmp_path)
    save_labels(root / "labelsTr" / "z.nii.gz")
    with pytest.raises(DataError, match=r"z\.nii\.gz.*no image"):
        open_dataset(root)


def test_a_gap_in_the_channels_is_named(tmp_path):
    root = nnunet_folder(tmp_path, channels=3)
    (root / "imagesTr" / "a_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="case a has the files"):
        open_dataset(root)


def test_a_case_with_other_channels_is_named(tmp_path):
    root = nnunet_folder(tmp_path, channels=2)
    (root / "imagesTr" / "a_0001.nii.gz").unlink()
    dataset = open_dataset(root)
    with pytest.raises(DataError, match="case a has 1 channels"):
        dataset.image(dataset.case("a"))


def test_one_id_in_two_folders_is_refused(tmp_path):
    with pytest.raises(DataError, match="id a is taken"):
        open_dataset(nnunet_folder(tmp_path, unlabeled=["a"]))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"background": 0, "organ": 1, "ignore": 2}, "ignore"),
        ({"background": 0, "organ": [1, 2]}, "regions"),
        ({"background": 0, "organ": True}, "organ"),
        ({}, "labels"),
    ],
)
def test_labels_that_are_not_supported(tmp_path, labels, match):
    root = nnunet_folder(tmp_path)
    change_description(root, labels=labels)
    with pytest.raises(DataError, match=match):
        open_dataset(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_names": {"T1": 0}},
        {"dataset": {"a": {"label": "labelsTr/a.nii.gz"}}},
        {"unlabeled": [{"picture": "imagesUn/u_0000.nii.gz"}]},
    ],
)
def test_descriptions_that_make_no_sense(tmp_path, changes):
    root = nnunet_folder(tmp_path)
    change_description(root, **changes)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(root)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_json_is_named(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(tmp_path)


# ---- classes ---------------------------------------------------------------------------


def test_values_with_gaps_are_mapped_on_request_only(tmp_path):
    labels = {"background": 0, "tumor": 7, "liver": 3}
    root = nnunet_folder(tmp_path, labels=labels)
    with pytest.raises(DataError, match=r"label_values = \[0, 3, 7\]"):
        open_dataset(root)
    dataset = open_dataset(root, label_values=(0, 3, 7))
    assert dataset.class_names == ("background", "liver", "tumor")
    case = dataset.case("a")
    stored = read_labels(case.label).array
    mapped = dataset.labels(case).array
    for index, value in enumerate((0, 3, 7)):
        np.testing.assert_array_equal(mapped == index, stored == value)
    other_order = open_dataset(root, label_values=(0, 7, 3))
    assert other_order.class_names == ("background", "tumor", "liver")


def test_loose_values_with_gaps(tmp_path):
    save_image(tmp_path / "images" / "a.nii.gz")
    save_labels(tmp_path / "labels" / "a.nii.gz", (0, 255))
    with pytest.raises(DataError, match=r"label_values = \[0, 255\]"):
        open_dataset(tmp_path)
    dataset = open_dataset(tmp_path, label_values=[0, 255], class_names=["background", "organ"])
    assert dataset.labels(dataset.cases[0]).array.max() == 1


def test_a_value_of_no_class_is_named(tmp_path):
    root = nnunet_folder(tmp_path)
    save_labels(root / "labelsTr" / "a.nii.gz", (0, 1, 9))
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"a\.nii\.gz: holds the values 9"):
        dataset.labels(dataset.case("a"))
    with pytest.raises(DataError, match="u has no label"):
        dataset.labels(dataset.case("u"))
    with pytest.raises(UsageError, match="no case zzz"):
        dataset.case("zzz")


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_names": ["a", "b", "c"]},
        {"label_values": [0, 0]},
        {"label_values": [0]},
        {"class_names": ["background", "background"]},
    ],
)
def test_class_arguments_that_do_not_fit(tmp_path, arguments):
    root = nnunet_folder(tmp_path)
    with pytest.raises(UsageError, match=str(tmp_path)):
        open_dataset(root, **arguments)


def test_loose_folders_without_any_class(tmp_path):
    save_image(tmp_path / "images" / "a.nii.gz")
    with pytest.raises(DataError, match="class_names"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, class_names=["organ"]).class_names == ("background", "organ")


# ---- order -----------------------------------------------------------------------------


def test_splits_json_gives_the_order_and_moves_cases_to_test(tmp_path):
    root = nnunet_folder(tmp_path, labeled=list("abcde"), test=["t"])
    save_json(root / "splits.json", {"train": ["d", "u", "b"], "test": ["t", "c"]})
    dataset = open_dataset(root)
    assert ids(dataset.train) == ["d", "u", "b", "a", "e"]
    assert ids(dataset.test) == ["t", "c"]


@pytest.mark.parametrize(
    ("content", "match"),
    [({"train": ["zzz"]}, "zzz"), ({"train": ["t"]}, "t, which is a test case")],
)
def test_splits_json_that_does_not_fit(tmp_path, content, match):
    root = nnunet_folder(tmp_path)
    save_json(root / "splits.json", content)
    with pytest.raises(DataError, match=match):
        open_dataset(root)
