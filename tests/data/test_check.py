"""`check_dataset` names every kind of damage and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import broken
import numpy as np
import pytest
from broken import BROKEN, Broken, image_file, label_file

from vclipseg.data import check
from vclipseg.data.check import check_dataset
from vclipseg.data.compare_cases import _outliers
from vclipseg.data.findings import MAX_LISTED, Problem
from vclipseg.data.volume import Volume, read_image, read_labels, reorient, write
from vclipseg.errors import DataError, UsageError

GEOMETRY = ("label-geometry-differs", "label-shape-differs", "channel-geometry-differs")


def _codes(problems: tuple[Problem, ...]) -> set[str]:
    return {p.code for p in problems}


def test_a_healthy_data_set_has_no_problem(healthy: Path) -> None:
    findings = check_dataset(healthy)
    assert findings.problems == ()
    assert findings.trustworthy


@pytest.mark.parametrize("case", BROKEN, ids=lambda b: b.name)
def test_damage_is_named_and_nothing_else(case: Broken, breakable: Path) -> None:
    case.breaks(breakable)
    findings = check_dataset(breakable)
    assert _codes(findings.problems) == {case.code} | case.also
    (problem,) = [p for p in findings.problems if p.code == case.code]
    assert (problem.case_id, problem.severity) == (case.case_id, case.severity)
    assert problem.fixable == case.fixable
    assert findings.trustworthy == (case.severity == "warning")
    if case.case_id:
        assert problem.file
        assert case.case_id in problem.file.name
    if case.code in GEOMETRY:
        assert " mm" in problem.message


def test_all_problems_of_a_data_set_come_at_once_errors_first(breakable: Path) -> None:
    for breaks in (broken.constant_image, broken.absent_class, broken.truncated_label):
        breaks(breakable)
    findings = check_dataset(breakable)
    assert _codes(findings.problems) == {"image-constant", "class-absent", "unreadable-file"}
    assert [p.severity for p in findings.problems] == ["error", "error", "warning"]


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (broken.rounded_header, "0.3 mm"),  # 0.3 voxel of 1 mm along y, 0.05 of 0.8 mm along x
        (broken.shifted_label, "2.4 mm"),  # 3 voxels of 0.8 mm
        (broken.flipped_label, "axes LAS, the image RAS"),
        (broken.finer_label, "12 x 10 x 16 voxels, the image 12 x 10 x 8"),
        (broken.finer_label, "spacing 0.8 x 1 x 1 mm, the image 0.8 x 1 x 2"),
        (broken.cropped_label, "reaches 4.0 mm beyond the label"),  # 2 planes of 2 mm
        (broken.lost_header, "copy the image's geometry"),
        (broken.nan_voxels, "3 of 960 voxels"),
        (broken.unknown_value, "9 (3 voxels)"),
        (broken.flat_image, "(12, 10)"),
        (broken.recompressed_test_copy, "case train1"),
        (broken.shared_subject, "anna"),
        (broken.spacing_in_cm, "0.08 x 0.1 x 0.2 mm"),
    ],
)
def test_messages_say_what_and_how_much(breaks, expected: str, breakable: Path) -> None:
    breaks(breakable)
    assert expected in check_dataset(breakable).problems[0].message


def test_rounding_of_a_header_is_no_problem(breakable: Path) -> None:
    broken.move_label(breakable, broken.shift(0.0005))
    assert check_dataset(breakable).problems == ()


def test_lonely_labels_are_all_named(breakable: Path) -> None:
    image_file(breakable, "train1").unlink()
    image_file(breakable, "test1").unlink()
    findings = check_dataset(breakable)
    assert [p.case_id for p in findings.problems] == ["train1", "test1"]
    assert "label-without-image" in "\n".join(findings.lines())


def test_labels_that_a_list_names_are_not_lonely(breakable: Path) -> None:
    """nnU-Net's explicit list lets image and label have any names."""
    description = json.loads((breakable / "dataset.json").read_text(encoding="utf-8"))
    for case_id in broken.TRAIN:
        label_file(breakable, case_id).rename(breakable / "labelsTr" / f"seg_{case_id}.nii.gz")
    description["dataset"] = {
        case_id: {
            "images": [f"imagesTr/{case_id}_0000.nii.gz"],
            "label": f"labelsTr/seg_{case_id}.nii.gz",
        }
        for case_id in broken.TRAIN
    }
    (breakable / "dataset.json").write_text(json.dumps(description))
    assert check_dataset(breakable).problems == ()
    (breakable / "labelsTr" / "spare.nii.gz").write_bytes(b"")
    assert [p.case_id for p in check_dataset(breakable).problems] == ["spare"]


def test_a_csv_may_leave_labels_out(breakable: Path) -> None:
    broken.shared_subject(breakable)
    (breakable / "labelsTr" / "spare.nii.gz").write_bytes(b"")
    assert _codes(check_dataset(breakable).problems) == {"subject-in-train-and-test"}


def test_a_copied_case_with_another_label_is_told_so(breakable: Path) -> None:
    shutil.copy(image_file(breakable, "train1"), image_file(breakable, "train2"))
    shutil.copy(label_file(breakable, "train1"), label_file(breakable, "train2"))
    broken.edit_labels(breakable, lambda array: array[:, :3].fill(0), "train2")
    assert "their labels differ" in check_dataset(breakable).problems[0].message


@pytest.mark.parametrize("missing", ["nothing", "cases"])
def test_what_cannot_be_listed_is_refused(missing: str, tmp_path: Path) -> None:
    if missing == "cases":
        broken.describe(tmp_path, {"0": "CT"})
    with pytest.raises(DataError if missing == "cases" else UsageError, match=str(tmp_path)):
        check_dataset(tmp_path)


# ---- data sets that say nothing of their classes ---------------------------------------


def _undescribed(breakable: Path) -> Path:
    (breakable / "dataset.json").unlink()
    return breakable


def test_classes_are_found_in_the_labels(breakable: Path) -> None:
    findings = check_dataset(_undescribed(breakable))
    assert findings.problems == ()
    assert [c.name for c in findings.summary.classes] == ["class_1", "class_2"]
    assert check_dataset(breakable, class_names=["liver", "tumor"]).problems == ()


def test_a_damaged_label_does_not_stop_the_check(breakable: Path) -> None:
    broken.truncated_label(_undescribed(breakable))
    assert _codes(check_dataset(breakable).problems) == {"unreadable-file"}


def test_gaps_between_values_must_be_asked_for(breakable: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array[array == 2] = 255

    broken.edit_labels(_undescribed(breakable), edit, *broken.TRAIN, *broken.TEST)
    findings = check_dataset(breakable)
    assert _codes(findings.problems) == {"label-value-gaps"}
    assert "[0, 1, 255]" in findings.problems[0].message
    assert check_dataset(breakable, label_values=(0, 1, 255)).problems == ()


# ---- no false alarms -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_harmless_spread_is_not_unusual(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not _outliers(rng.normal(size=(40, 3)), floor=0.0).any()
    assert not _outliers(np.log(rng.uniform(0.5, 1.5, size=30)), floor=0.0).any()


def test_outliers_need_a_floor_and_enough_cases() -> None:
    alike = np.array([1.0, 1, 1, 1, 1, 1.2])
    assert not _outliers(alike, floor=0.3).any()
    assert _outliers(alike, floor=0.1).tolist() == [False] * 5 + [True]
    assert not _outliers(alike[2:], floor=0.1).any()


def _scale_images(root: Path, scale: Callable[[int], float], offset: float = 0.0) -> None:
    for n, case_id in enumerate(broken.TRAIN + broken.TEST + broken.UNLABELED):
        image = read_image(image_file(root, case_id))
        write(Volume(image.array * scale(n) + offset, image.affine), image_file(root, case_id))


@pytest.mark.parametrize("level", [100, 0])
def test_scales_of_many_kinds_give_one_warning(level: float, breakable: Path) -> None:
    """As in MR without units, where one image reaches 100 and the next 300,000."""
    _scale_images(breakable, lambda n: 1.0, offset=level - 100)  # the images are around 100
    _scale_images(breakable, lambda n: 3.0**n)
    findings = check_dataset(breakable)
    assert [p.code for p in findings.problems] == ["intensity-diverse"]
    assert findings.trustworthy


def test_another_scanner_is_not_unusual(breakable: Path) -> None:
    """One image spreads three times as far, one lies half a spread higher: no alarm."""
    broken.edit_image(breakable, lambda a: np.multiply(a - 100, 3, out=a), "train1")
    broken.edit_image(breakable, lambda a: np.add(a, 100, out=a), "train1")
    broken.edit_image(breakable, lambda a: np.add(a, 40, out=a), "train2")
    assert check_dataset(breakable).problems == ()


# ---- summary, text, JSON ---------------------------------------------------------------


def test_summary_counts_and_measures(healthy: Path) -> None:
    summary = check_dataset(healthy).summary
    assert (summary.labeled, summary.unlabeled, summary.test) == (6, 1, 2)
    assert summary.shape["min"] == summary.shape["max"] == broken.SHAPE
    np.testing.assert_allclose(summary.spacing_mm["median"], broken.SPACING, rtol=1e-5)
    assert summary.orientations == {"RAS": 9}
    liver, tumor = summary.classes
    voxel_ml = 0.8 * 1.0 * 2.0 / 1000
    assert (liver.name, liver.cases) == ("liver", 6)
    np.testing.assert_allclose(tumor.median_ml, 3 * 3 * 2 * voxel_ml, rtol=1e-5)


def test_sizes_are_along_the_world_axes(breakable: Path) -> None:
    broken.other_axes(breakable)
    for file in (image_file(breakable, "train2"), label_file(breakable, "train2")):
        volume = read_image(file) if "images" in str(file) else read_labels(file)
        write(reorient(volume, "SPR"), file)
    findings = check_dataset(breakable)
    assert _codes(findings.problems) == {"orientation-differs"}
    assert findings.summary.shape["min"] == findings.summary.shape["max"] == broken.SHAPE


def test_text_is_short_and_json_is_complete(breakable: Path) -> None:
    for case_id in broken.TRAIN:
        broken.move_label(breakable, broken.shift(0.3), case_id)
    findings = check_dataset(breakable)
    text = "\n".join(findings.lines())
    assert text.count("[label-geometry-differs, fixable]") == MAX_LISTED
    assert "and 1 more label-geometry-differs" in text
    assert "6 can be mended" in findings.verdict()
    content = json.loads(json.dumps(findings.to_json()))
    assert len(content["problems"]) == content["errors"] == content["fixable"] == 6
    assert content["problems"][0]["file"] == "labelsTr/train0.nii.gz"
    assert content["trustworthy"] is False


# ---- processes -------------------------------------------------------------------------


def test_progress_counts_cases(healthy: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    check_dataset(healthy, on_progress=lambda *call: calls.append(call))
    assert [c[0] for c in calls] == list(range(1, 10))
    assert calls[-1][1:] == (9, "test1")


@pytest.mark.slow
def test_processes_find_the_same(breakable: Path) -> None:
    broken.nan_voxels(breakable)
    assert (
        check_dataset(breakable, workers=2).to_json()
        == check_dataset(breakable, workers=1).to_json()
    )


def _die_of_c_in_a_worker(case: str, parent: int) -> str:
    if case == "c" and os.getpid() != parent:
        os._exit(1)
    return case


@pytest.mark.slow
def test_a_killed_process_is_made_up_for() -> None:
    inspect = partial(_die_of_c_in_a_worker, parent=os.getpid())
    assert list(check._inspect_pooled(inspect, ["a", "b", "c"], workers=2)) == ["a", "b", "c"]
