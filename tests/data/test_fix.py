"""`fix_copy` mends a copy, exactly, and leaves every original byte where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import broken
import numpy as np
import pytest
from broken import BROKEN, Broken, image_file, label_file, shift
from dicom_made import AXIAL, write_series

from vclipseg.data import fix
from vclipseg.data.check import check_dataset
from vclipseg.data.datasets import open_dataset
from vclipseg.data.findings import Findings
from vclipseg.data.fix import MENDS, RECORD, fix_copy
from vclipseg.data.ignored import IGNORED
from vclipseg.data.reviews import all_reviews, save_review
from vclipseg.data.volume import Volume, read_image, read_labels, reorient, write
from vclipseg.errors import DataError, UsageError

FIXABLE = [b for b in BROKEN if b.fixable]
OF_THE_LABEL = [b for b in FIXABLE if b.code.startswith("label")]


def _hashes(root: Path) -> dict[str, str]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


@pytest.mark.parametrize("case", FIXABLE, ids=lambda b: b.name)
def test_the_copy_is_healthy_and_the_original_untouched(case: Broken, breakable: Path) -> None:
    case.breaks(breakable)
    before = _hashes(breakable)
    target = breakable.parent / "mended"
    (mended,) = fix_copy(check_dataset(breakable), target)
    assert mended.code == case.code
    assert check_dataset(target).problems == ()
    assert _hashes(breakable) == before
    after = _hashes(target)
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {mended.file.relative_to(breakable).as_posix()}
    assert after.keys() - before.keys() == {RECORD}


@pytest.mark.parametrize("case", OF_THE_LABEL, ids=lambda b: b.name)
def test_labels_are_again_what_they_were(case: Broken, breakable: Path, healthy: Path) -> None:
    """Every way the labels were moved is undone voxel by voxel."""
    case.breaks(breakable)
    fix_copy(check_dataset(breakable), breakable.parent / "mended")
    mended = read_labels(label_file(breakable.parent / "mended", case.case_id))
    labels = read_labels(label_file(healthy, case.case_id))
    np.testing.assert_array_equal(mended.array, labels.array)
    np.testing.assert_allclose(mended.affine, labels.affine, atol=1e-5)


def test_holes_get_the_smallest_value_and_the_rest_stays(breakable: Path, healthy: Path) -> None:
    broken.nan_voxels(breakable)
    fix_copy(check_dataset(breakable), breakable.parent / "mended")
    mended = read_image(image_file(breakable.parent / "mended", "train1")).array
    hole = ~np.isfinite(read_image(image_file(breakable, "train1")).array)
    image = read_image(image_file(healthy, "train1")).array
    assert hole.sum() == 3
    assert (mended[hole] == image[~hole].min()).all()
    np.testing.assert_array_equal(mended[~hole], image[~hole])


def test_several_problems_of_one_case_are_mended_together(breakable: Path) -> None:
    for breaks in (broken.rounded_channel, broken.nan_voxels, broken.finer_label):
        breaks(breakable)
    codes = [p.code for p in fix_copy(check_dataset(breakable), breakable.parent / "mended")]
    assert sorted(codes) == ["channel-geometry-differs", "label-shape-differs", "nan-or-inf"]
    assert check_dataset(breakable.parent / "mended").problems == ()


def test_what_needs_a_person_is_left(breakable: Path) -> None:
    broken.rounded_header(breakable)
    broken.truncated_label(breakable)
    mended = fix_copy(check_dataset(breakable), breakable.parent / "mended")
    assert [p.code for p in mended] == ["label-geometry-differs"]
    left = check_dataset(breakable.parent / "mended").problems
    assert [p.code for p in left] == ["unreadable-file"]


def test_the_copy_says_what_was_done(breakable: Path) -> None:
    broken.flipped_label(breakable)
    fix_copy(check_dataset(breakable), breakable.parent / "mended")
    record = json.loads((breakable.parent / "mended" / RECORD).read_text(encoding="utf-8"))
    assert record["source"] == str(breakable)
    assert [f["file"] for f in record["fixes"]] == ["labelsTr/train1.nii.gz"]


def test_editing_the_copy_does_not_reach_the_original(breakable: Path) -> None:
    before = _hashes(breakable)
    fix_copy(check_dataset(breakable), breakable.parent / "mended")
    for file in (breakable.parent / "mended").rglob("*.*"):
        file.write_bytes(b"")
    assert _hashes(breakable) == before


def test_every_fixable_code_has_a_mend() -> None:
    assert {b.code for b in FIXABLE} == set(MENDS)


# ---- where it must not write -----------------------------------------------------------


def test_a_folder_with_content_is_refused(breakable: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="full: exists already"):
        fix_copy(check_dataset(breakable), tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_an_empty_folder_is_accepted(breakable: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fix_copy(check_dataset(breakable), tmp_path / "empty")
    assert check_dataset(tmp_path / "empty").trustworthy


@pytest.mark.parametrize("inside", [".", "mended", "imagesTr/mended"])
def test_the_data_set_itself_is_refused(inside: str, breakable: Path) -> None:
    before = _hashes(breakable)
    with pytest.raises(UsageError):
        fix_copy(check_dataset(breakable), breakable / inside)
    assert _hashes(breakable) == before


def test_nothing_is_left_of_a_copy_that_failed(
    breakable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DataError("gone")

    broken.flipped_label(breakable)
    findings = check_dataset(breakable)
    monkeypatch.setitem(fix.MENDS, "label-orientation-differs", fail)
    with pytest.raises(DataError, match="gone"):
        fix_copy(findings, tmp_path / "mended")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_data_set_that_cannot_be_listed_cannot_be_copied(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "data", dataset=None, problems=(), summary=None)
    with pytest.raises(DataError, match="errors are corrected"):
        fix_copy(findings, tmp_path / "mended")


# ---- other layouts ---------------------------------------------------------------------


def test_a_csv_is_copied_with_the_files_it_names(breakable: Path, tmp_path: Path) -> None:
    broken.flipped_label(breakable)
    broken.shared_subject(breakable)
    (breakable / "notes.txt").write_text("of no case")
    mended = fix_copy(check_dataset(breakable / "cases.csv"), tmp_path / "mended")
    assert [p.code for p in mended] == ["label-orientation-differs"]
    left = check_dataset(tmp_path / "mended" / "cases.csv").problems
    assert [p.code for p in left] == ["subject-in-train-and-test"]
    assert not (tmp_path / "mended" / "notes.txt").exists()


@pytest.mark.parametrize("prefix", ["../data/", "{root}/"])
def test_paths_that_lead_out_of_the_copy_are_refused(
    prefix: str, breakable: Path, tmp_path: Path
) -> None:
    broken.shared_subject(breakable)
    table = breakable / "cases.csv"
    prefix = prefix.format(root=breakable)
    table.write_text(
        table.read_text(encoding="utf-8").replace("imagesTr/train0", f"{prefix}imagesTr/train0")
    )
    with pytest.raises(UsageError, match="folder"):
        fix_copy(check_dataset(table), tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def test_linked_folders_become_real_ones(breakable: Path, tmp_path: Path) -> None:
    (breakable / "imagesTr").rename(tmp_path / "elsewhere")
    (breakable / "imagesTr").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    broken.flipped_label(breakable)
    fix_copy(check_dataset(breakable), tmp_path / "mended")
    assert not (tmp_path / "mended" / "imagesTr").is_symlink()
    assert check_dataset(tmp_path / "mended").problems == ()


# ---- what people decided ---------------------------------------------------------------


def _review(root: Path, case_id: str = "train1") -> Volume:
    """Accept a case's own labels, the first slice ignored; what was accepted."""
    labels = read_labels(label_file(root, case_id))
    labels.array[..., 0] = IGNORED
    save_review(root, case_id, "accepted", labels, {"background": 0, "a": 1, "b": 2})
    return labels


def _change_mask(root: Path, change: Callable[[Volume], Volume]) -> None:
    (review,) = all_reviews(root, "train1")
    write(change(read_labels(review.label)), review.label)


def _finer(mask: Volume) -> Volume:
    half = np.eye(4)
    half[:3] *= 0.5
    half[:3, 3] = -0.25  # the first of two voxels begins where the whole one did
    array = mask.array.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return Volume(array, mask.affine @ half)


def _reviewed(dataset_path: Path) -> Volume:
    dataset = open_dataset(dataset_path)
    return dataset.training_labels(dataset.case("train1"))


@pytest.mark.parametrize("listing", ["", "cases.csv"])
def test_decisions_come_along_as_they_are(listing: str, breakable: Path, tmp_path: Path) -> None:
    broken.shared_subject(breakable)  # which writes the table
    accepted = _review(breakable)
    save_review(breakable, "train0", "ignored", None, {"background": 0, "a": 1, "b": 2})
    fix_copy(check_dataset(breakable / listing), tmp_path / "mended")
    kept = {f: h for f, h in _hashes(breakable).items() if f.startswith("reviews/")}
    assert len(kept) == 3
    assert kept.items() <= _hashes(tmp_path / "mended").items()
    np.testing.assert_array_equal(_reviewed(tmp_path / "mended" / listing).array, accepted.array)


@pytest.mark.parametrize("listing", ["", "cases.csv"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: reorient(m, "LPS"), "label-orientation-differs"),
        (lambda m: Volume(m.array, m.affine @ shift(0.1)), "label-geometry-differs"),
        (_finer, "label-shape-differs"),
    ],
)
def test_a_reviewed_mask_is_put_onto_its_image(
    change: Callable[[Volume], Volume], code: str, listing: str, breakable: Path, tmp_path: Path
) -> None:
    """Ignored voxels stay where they were, and the original's decision is untouched."""
    broken.shared_subject(breakable)
    accepted = _review(breakable)
    _change_mask(breakable, change)
    before = _hashes(breakable)
    mended = fix_copy(check_dataset(breakable / listing), tmp_path / "mended")
    found = _reviewed(tmp_path / "mended" / listing)
    np.testing.assert_array_equal(found.array, accepted.array)
    np.testing.assert_allclose(found.affine, accepted.affine, atol=1e-5)
    assert [p.code for p in mended] == [code]
    record = json.loads((tmp_path / "mended" / RECORD).read_text(encoding="utf-8"))
    assert record["fixes"][0]["file"].startswith("reviews/train1/0001-")
    assert _hashes(breakable) == before


def test_masks_of_earlier_decisions_are_mended_too(breakable: Path, tmp_path: Path) -> None:
    """A run may follow one of them."""
    accepted = _review(breakable)
    _change_mask(breakable, lambda m: reorient(m, "LPS"))
    save_review(breakable, "train1", "open", None, {"background": 0, "a": 1, "b": 2})
    fix_copy(check_dataset(breakable), tmp_path / "mended")
    dataset = open_dataset(tmp_path / "mended", reviews={"train1": 1})
    found = dataset.training_labels(dataset.case("train1"))
    np.testing.assert_array_equal(found.array, accepted.array)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: Volume(m.array, m.affine @ shift(3)),
        lambda m: Volume(m.array[:-2], m.affine),
        lambda m: Volume(m.array[:-2], np.eye(4)),
    ],
    ids=["elsewhere", "cropped", "no place"],
)
def test_a_reviewed_mask_that_fits_nowhere_is_refused(
    change: Callable[[Volume], Volume], breakable: Path, tmp_path: Path
) -> None:
    _review(breakable)
    _change_mask(breakable, change)
    with pytest.raises(
        DataError, match=r"0001-.*reviewed mask that does not fit.* case train1 out of"
    ):
        fix_copy(check_dataset(breakable), tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def test_a_case_named_as_the_folder_keeps_its_decisions(tmp_path: Path) -> None:
    """A series right in the folder of the data set."""
    scan = write_series(tmp_path / "scan", np.zeros((6, 5, 4)), AXIAL)
    (case,) = open_dataset(scan, class_names=["liver"]).cases
    save_review(scan, case.case_id, "ignored", None, {"background": 0, "a": 1})
    findings = check_dataset(scan, class_names=["liver"])
    with pytest.raises(UsageError, match="Name the copy scan, in another place"):
        fix_copy(findings, tmp_path / "mended")
    assert not (tmp_path / "mended").exists()
    fix_copy(findings, tmp_path / "elsewhere" / "scan")
    (copied,) = open_dataset(tmp_path / "elsewhere" / "scan", class_names=["liver"]).cases
    assert copied.review.decision == "ignored"
