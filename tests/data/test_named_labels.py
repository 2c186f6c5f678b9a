"""Labels that name their classes: what follows the name, whatever number it has in which file."""

import numpy as np
import pytest
from dicom_made import AXIAL, write_series

from vclipseg.data.cache import prepare
from vclipseg.data.check import check_dataset
from vclipseg.data.datasets import open_dataset
from vclipseg.data.dicom import read_series
from vclipseg.data.dicom_objects import dicom_writer
from vclipseg.data.ignored import IGNORED
from vclipseg.data.plan import PlanSettings, make_plan
from vclipseg.data.reviews import latest_review, save_review
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError

pytest.importorskip("highdicom")

LIVER, TUMOR = 256, 8
"""Voxels of each."""
SHAPE = (16, 16, 6)


def boxes(classes):
    """A big liver and a small tumor, with the indices that they have among classes."""
    array = np.zeros(SHAPE, np.uint8)
    for name, low, high in (("liver", (2, 2, 1), (10, 10, 5)), ("tumor", (12, 12, 2), (14, 14, 4))):
        if name in classes:
            array[tuple(slice(*ends) for ends in zip(low, high, strict=True))] = classes.index(name)
    return array


def add_scan(root, name, segments=(), kind="seg", called=None):
    """A scan and, with segments, its label; `called` is what the segments are called."""
    folder, number = root / "images" / name, sum(name.encode())
    voxels = np.random.default_rng(number).integers(-100, 300, SHAPE)
    patient = {"t0010_0020": name, "t0010_0010": name.upper(), "t0020_000d": f"1.2.{number}"}
    write_series(folder, voxels, AXIAL, series=f"1.5.{number}", **patient)
    if segments:
        (root / "labels").mkdir(exist_ok=True)
        classes = ["background", *segments]
        mask = Volume(boxes(classes), read_series(folder).affine)
        write = dicom_writer(kind, sorted(folder.iterdir()), ["background", *(called or segments)])
        write(mask, root / "labels" / f"{name}.dcm")
    return folder


def prepared(root, cache, **asked):
    """Case id -> voxels of each class in the prepared labels."""
    dataset = open_dataset(root, **asked)
    ids = [case.case_id for case in dataset.labeled]
    plan = make_plan(dataset, ids, PlanSettings(spacing=(0.7, 0.9, 2.0)))
    cases = prepare(dataset, dict.fromkeys(ids, True), plan, cache)
    count = len(dataset.class_names)
    voxels = {i: np.bincount(cases.labels(i).ravel(), minlength=count)[1:].tolist() for i in ids}
    return {i: dict(zip(dataset.class_names[1:], n, strict=True)) for i, n in voxels.items()}


def test_nothing_stale_is_used_when_classes_come_in_another_order(tmp_path):
    both = {"liver": LIVER, "tumor": TUMOR}
    add_scan(tmp_path / "d", "b", ["liver", "tumor"])
    assert prepared(tmp_path / "d", tmp_path / "cache") == {"b": both}
    add_scan(tmp_path / "d", "a", ["tumor", "liver"])
    assert open_dataset(tmp_path / "d").class_names == ("background", "tumor", "liver")
    assert prepared(tmp_path / "d", tmp_path / "cache") == {"a": both, "b": both}


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_some_structures_are_chosen_by_name(tmp_path, kind):
    root = tmp_path / "d"
    add_scan(root, "a", ["liver", "tumor"], kind)
    add_scan(root, "b", ["tumor"], kind)
    for name, voxels in (("tumor", [TUMOR, TUMOR]), ("liver", [LIVER, 0])):
        found = prepared(root, tmp_path / "cache", class_names=["background", name])
        assert [case[name] for case in found.values()] == voxels
        assert check_dataset(root, class_names=[name]).trustworthy


def test_names_of_two_spellings_are_one_class(tmp_path):
    add_scan(tmp_path, "a", ["liver", "tumor"], called=["Left_Liver", "tumor"])
    add_scan(tmp_path, "b", ["liver", "tumor"], called=["left liver", "Tumor"])
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("background", "Left_Liver", "tumor")
    for case in dataset.labeled:
        assert np.bincount(dataset.labels(case).array.ravel())[1:].tolist() == [LIVER, TUMOR]


def test_a_reviewed_mask_follows_its_names(tmp_path):
    """Its values are those of the order when it was saved."""
    root = tmp_path
    add_scan(root, "b", ["liver", "tumor"])
    scan = add_scan(root, "c")
    then = open_dataset(root)
    mask = boxes(then.class_names)
    mask[0] = IGNORED
    save_review(root, "c", "fixed", Volume(mask, read_series(scan).affine), then.classes)
    add_scan(root, "a", ["tumor", "liver"])
    for asked in ({}, {"class_names": ["tumor"]}, {"classes": then.classes}):
        now = open_dataset(root, **asked)
        found = now.training_labels(now.case("c")).array
        expected = boxes(now.class_names)
        expected[0] = IGNORED
        np.testing.assert_array_equal(found, expected)


def test_values_are_what_counts_where_labels_are_volumes(tmp_path, tiny_data):
    """There a new name is a better word for the same value."""
    dataset = open_dataset(tiny_data)
    assert not dataset.by_name
    image = dataset.image(dataset.train[0])
    mask = Volume(np.ones(image.shape, np.uint8), image.affine)
    review = save_review(tmp_path, "x", "accepted", mask, {"background": 0, "class_1": 1})
    assert review.classes == {"background": 0, "class_1": 1}
    assert dataset.reviewed_labels(review).array.all()


def test_a_decision_that_does_not_say_its_classes_goes_by_values(tmp_path):
    mask = Volume(boxes(["background", "liver", "tumor"]), np.eye(4))
    review = save_review(tmp_path, "x", "fixed", mask, {"background": 0, "liver": 1, "tumor": 2})
    file = review.label.with_name("0001.json")
    text = file.read_text()
    said = '"classes": {\n    "background": 0,\n    "liver": 1,\n    "tumor": 2\n  },\n'
    assert said in text
    file.write_text(text.replace(said, ""))
    found = latest_review(tmp_path, "x").labels((0, 1, 2), ("background", "tumor", "liver"))
    np.testing.assert_array_equal(found.array, mask.array)
    file.write_text(text.replace(said, '"classes": ["liver"],'))
    with pytest.raises(DataError, match="is not a decision that can be read"):
        latest_review(tmp_path, "x")
