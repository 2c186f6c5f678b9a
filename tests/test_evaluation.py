from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vclipseg.data.datasets import Case, Dataset
from vclipseg.data.volume import Volume, read_labels, reorient, write
from vclipseg.errors import DataError, UsageError
from vclipseg.evaluation import (
    EvaluateSettings,
    evaluate,
    evaluate_folder,
    on_grid_of,
    score_case,
)

CLASSES = ("background", "liver", "tumor")
SETTINGS = EvaluateSettings()
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


def make_mask(affine=AFFINE, shift=0):
    array = np.zeros((12, 10, 8), dtype=np.uint8)
    array[2 + shift : 8 + shift, 2:8, 2:6] = 1
    array[3 + shift : 5 + shift, 3:5, 3:5] = 2
    return Volume(array, affine)


def with_speck(mask):
    """A second, smaller piece of class 1."""
    array = mask.array.copy()
    array[11, 9, 7] = 1
    return Volume(array, mask.affine)


def only(scores, **wanted):
    found = [s for s in scores if all(getattr(s, key) == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def dataset(tmp_path):
    """Three cases whose image is their mask, shifted by 0, 1, 2 voxels."""
    cases = []
    for shift in range(3):
        image, label = tmp_path / f"c{shift}_0000.nii.gz", tmp_path / f"c{shift}.nii.gz"
        mask = make_mask(shift=shift)
        write(Volume(mask.array.astype(np.float32), mask.affine), image)
        write(mask, label)
        cases.append(Case(f"c{shift}", (image,), label, "test", f"c{shift}"))
    return Dataset(tmp_path, "folders", "boxes", ("image",), CLASSES, (0, 1, 2), tuple(cases))


def copy_image(image):
    return Volume(image.array[0].astype(np.uint8), image.affine)


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluate_scores_every_case_and_class_in_order(dataset, tmp_path, workers):
    heard = []
    scores = evaluate(
        copy_image,
        dataset,
        ["c2", "c0", "c1"],
        SETTINGS,
        lambda *news: heard.append(news),
        save_to=tmp_path / "predictions",
        workers=workers,
    )
    keys = [(s.case_id, s.class_name, s.lcc) for s in scores]
    assert keys == [(c, n, p) for c in ("c2", "c0", "c1") for n in CLASSES[1:] for p in (0, 1)]
    assert all(s.dice == s.nsd == 1 and s.hd95_mm == 0 for s in scores)
    assert heard == [(1, 3, "c2"), (2, 3, "c0"), (3, 3, "c1")]
    saved = read_labels(tmp_path / "predictions" / "c1.nii.gz")
    np.testing.assert_array_equal(saved.array, make_mask(shift=1).array)


def test_an_error_while_scoring_is_raised(dataset):
    def too_small(image):
        return Volume(image.array[0, 1:].astype(np.uint8), image.affine)

    with pytest.raises(DataError, match="case c0: the prediction has 11 x 10 x 8 voxels"):
        evaluate(too_small, dataset, ["c0", "c1"], SETTINGS)


def test_scores_are_in_mm_of_the_grid():
    score = only(
        score_case("a", make_mask(), make_mask(shift=1), CLASSES, SETTINGS), class_id=2, lcc=0
    )
    assert score.hd95_voxel == 1
    assert score.hd95_mm == pytest.approx(2)  # 1 voxel along the axis of 2 mm
    assert score.reference_ml == pytest.approx(8 * 6 / 1000)
    assert score.dice == pytest.approx(0.5)


def test_largest_component_has_its_own_row():
    scores = score_case("a", make_mask(), with_speck(make_mask()), CLASSES, SETTINGS)
    plain, filtered = (only(scores, class_id=1, lcc=lcc) for lcc in (0, 1))
    assert plain.dice < filtered.dice == 1
    assert plain.counts[1] == 1  # the speck is the only false positive
    assert filtered.counts[1] == 0
    assert sum(plain.counts) == make_mask().array.size


def test_tolerance_is_a_setting():
    masks = make_mask(), make_mask(shift=1)
    strict, loose = (
        only(
            score_case("a", *masks, CLASSES, EvaluateSettings(nsd_tolerance_mm=mm)),
            class_id=2,
            lcc=0,
        )
        for mm in (0.1, 2.1)
    )
    assert strict.nsd < loose.nsd == 1


def test_an_empty_prediction_is_a_failure_and_an_absent_class_is_not():
    empty = Volume(np.zeros_like(make_mask().array), AFFINE)
    failed = score_case("a", make_mask(), empty, CLASSES, SETTINGS)
    assert [(s.dice, s.failure) for s in failed] == [(0, 1)] * 4
    absent = score_case("a", empty, empty, CLASSES, SETTINGS)
    assert all(np.isnan(s.dice) and s.failure == 0 for s in absent)
    alarm = score_case("a", empty, make_mask(), CLASSES, SETTINGS)
    assert [(s.dice, s.failure) for s in alarm] == [(0, 0)] * 4


@pytest.mark.parametrize("orientation", ["RAS", "ASL", "PIR"])
def test_turned_axes_are_turned_back(orientation):
    turned = reorient(make_mask(), orientation)
    scores = score_case("a", make_mask(), turned, CLASSES, SETTINGS)
    assert all(s.dice == 1 for s in scores)


def moved(x_mm):
    affine = AFFINE.copy()
    affine[0, 3] += x_mm
    return affine


@pytest.mark.parametrize("affine", [moved(4), moved(-0.2), AFFINE * [1.1, 1, 1, 1], moved(np.nan)])
def test_a_prediction_elsewhere_is_refused(affine):
    with pytest.raises(DataError, match=r"case a: the prediction lies up to .* mm away"):
        on_grid_of(make_mask(), Volume(make_mask().array, affine), "a")


def test_rounding_of_a_header_is_no_difference():
    prediction = Volume(make_mask().array, AFFINE + 1e-4)
    np.testing.assert_array_equal(on_grid_of(make_mask(), prediction, "a").array, make_mask().array)


def test_an_unknown_class_is_refused():
    with pytest.raises(DataError, match=r"case a: .* values 0 to 2, but the classes are 0 to 1"):
        score_case("a", make_mask(), make_mask(), CLASSES[:2], SETTINGS)


@pytest.fixture
def folders(tmp_path):
    for shift, name in enumerate(("a", "b")):
        write(make_mask(shift=shift), tmp_path / "references" / f"{name}.nii.gz")
        write(make_mask(), tmp_path / "predictions" / f"{name}.nrrd")
    write(make_mask(), tmp_path / "predictions" / "another.nii.gz")
    return tmp_path / "predictions", tmp_path / "references"


def test_folders_are_matched_by_name(folders):
    scores = evaluate_folder(*folders, CLASSES)
    assert [s.case_id for s in scores] == ["a"] * 4 + ["b"] * 4
    assert only(scores, case_id="a", class_id=1, lcc=0).dice == 1
    assert only(scores, case_id="b", class_id=1, lcc=0).dice < 1


def test_a_missing_prediction_is_named_with_the_nearest_file(folders):
    predictions, references = folders
    write(make_mask(), references / "other.nii.gz")
    with pytest.raises(DataError, match=r"no prediction for case other of 3 .* here is another\."):
        evaluate_folder(predictions, references, CLASSES)


def test_label_values_are_mapped(tmp_path):
    mask = make_mask()
    stored = Volume(np.array([0, 5, 7], dtype=np.uint8)[mask.array], mask.affine)
    write(stored, tmp_path / "a" / "x.nii.gz")
    scores = evaluate_folder(tmp_path / "a", tmp_path / "a", CLASSES, label_values=(0, 5, 7))
    assert all(s.dice == 1 for s in scores)
    with pytest.raises(DataError, match="5, 7"):
        evaluate_folder(tmp_path / "a", tmp_path / "a", CLASSES)


@pytest.mark.parametrize(("make", "state"), [(True, "holds no masks"), (False, "is no folder")])
def test_folders_must_hold_masks(tmp_path, make, state):
    folder = tmp_path / "masks"
    if make:
        folder.mkdir()
    with pytest.raises(UsageError, match=state):
        evaluate_folder(folder, folder, CLASSES)


def test_evaluate_does_not_read_labels_of_other_cases(dataset):
    """A case that is not asked for may lack its label."""
    cases = (replace(dataset.cases[0], label=None), *dataset.cases[1:])
    scores = evaluate(copy_image, replace(dataset, cases=cases), ["c1"], SETTINGS)
    assert {s.case_id for s in scores} == {"c1"}
