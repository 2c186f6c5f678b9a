from __future__ import annotations

import os

import numpy as np
import pytest
from made import nnunet_folder, save_image, save_labels

from vclipseg.data import cache
from vclipseg.data.cache import prepare, training_cases
from vclipseg.data.datasets import open_dataset, split_cases
from vclipseg.data.preprocess import Plan, prepare_image, prepare_labels
from vclipseg.errors import DataError, VclipsegError

PLAN = Plan(spacing=(1.5, 1.0, 2.0), intensity=("zscore", "none"))


@pytest.fixture
def root(tmp_path):
    return nnunet_folder(tmp_path / "set", channels=2)


class Progress(list):
    """What was reported."""

    def __call__(self, done: int, total: int, case_id: str) -> None:
        self.append((done, total, case_id))


def test_prepared_cases_are_what_preprocessing_gives(root, tmp_path):
    dataset = open_dataset(root)
    prepared = prepare(dataset, {"a": True, "u": False}, PLAN, tmp_path / "cache")
    assert prepared.case_ids == ("a", "u")
    for case_id in prepared.case_ids:
        case = dataset.case(case_id)
        volume, trace = prepare_image(dataset.image(case), PLAN)
        np.testing.assert_array_equal(prepared.image(case_id), volume.array)
        assert prepared.image(case_id).dtype == np.float32
        assert prepared.trace(case_id) == trace
    case = dataset.case("a")
    labels = prepare_labels(dataset.labels(case), prepared.trace("a")).array
    np.testing.assert_array_equal(prepared.labels("a"), labels)
    assert prepared.labels("a").dtype == np.uint8


def test_labels_nobody_asked_for_are_not_there(root, tmp_path):
    dataset = open_dataset(root)
    folder = tmp_path / "cache"
    prepared = prepare(dataset, {"a": True, "b": False}, PLAN, folder)
    assert len(list(folder.glob("*.labels.b2nd"))) == 1
    with pytest.raises(DataError, match="b was prepared without labels"):
        prepared.labels("b")
    prepare(dataset, {"b": True}, PLAN, folder)
    with pytest.raises(DataError, match="without labels"):  # though the folder now holds them
        prepare(dataset, {"b": False}, PLAN, folder).labels("b")
    with pytest.raises(DataError, match="zzz"):
        prepared.image("zzz")
    with pytest.raises(DataError, match="u has no label file"):
        prepare(dataset, {"u": True}, PLAN, folder)


def test_training_reads_labels_of_labeled_cases_only(root):
    split = split_cases(open_dataset(root), labeled=1, transductive=True)
    assert training_cases(split) == {"a": True, "b": False, "u": False, "t": False}


def test_a_build_that_was_stopped_goes_on(root, tmp_path):
    dataset = open_dataset(root)
    wanted = {"a": True, "b": True, "u": False}
    first = Progress()

    def stop(done, total, case_id):
        first(done, total, case_id)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, wanted, PLAN, tmp_path, on_progress=stop)
    second, third = Progress(), Progress()
    prepare(dataset, wanted, PLAN, tmp_path, on_progress=second)
    prepare(dataset, wanted, PLAN, tmp_path, on_progress=third)
    assert first == [(1, 3, "a"), (2, 3, "b")]
    assert second == [(1, 1, "u")]
    assert third == []


def test_a_half_written_case_does_not_count(root, tmp_path, monkeypatch):
    dataset = open_dataset(root)

    def fail(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(DataError, match=r"case a.*disk full"):
            prepare(dataset, {"a": True}, PLAN, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert prepare(dataset, {"a": True}, PLAN, tmp_path / "cache").image("a").size


@pytest.mark.parametrize("what", ["plan", "notes", "image", "labels", "of another case"])
def test_the_key_is_content_and_plan(root, tmp_path, what):
    dataset, plan = open_dataset(root), PLAN
    prepare(dataset, {"a": True}, plan, tmp_path / "cache")
    if what == "plan":
        plan = plan.model_copy(update={"spacing": (2.0, 2.0, 2.0)})
    elif what == "notes":
        plan = plan.model_copy(update={"notes": {"spacing": "because"}})
    elif what == "image":
        save_image(root / "imagesTr" / "a_0001.nii.gz", seed=99)
    elif what == "labels":
        save_labels(root / "labelsTr" / "a.nii.gz", (1, 1, 0))
    else:
        save_image(root / "imagesTr" / "b_0001.nii.gz", seed=99)
    progress = Progress()
    prepared = prepare(dataset, {"a": True}, plan, tmp_path / "cache", on_progress=progress)
    assert bool(progress) == (what in ("plan", "image", "labels"))
    labels = prepare_labels(dataset.labels(dataset.case("a")), prepared.trace("a")).array
    np.testing.assert_array_equal(prepared.labels("a"), labels)


def test_the_failing_case_is_named(root, tmp_path):
    (root / "imagesTr" / "b_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"case b: .*b_0000\.nii\.gz"):
        prepare(open_dataset(root), {"a": True, "b": True}, PLAN, tmp_path / "cache")
    save_labels(root / "labelsTr" / "a.nii.gz", shape=(3, 3, 3))
    with pytest.raises(DataError, match=r"case a: .*labelsTr/a\.nii\.gz: labels of shape"):
        prepare(open_dataset(root), {"a": True}, PLAN, tmp_path / "other")


def test_a_damaged_prepared_case_is_named(root, tmp_path):
    prepared = prepare(open_dataset(root), {"a": True}, PLAN, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.image.b2nd")
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"image\.b2nd"):
        prepared.image("a")


@pytest.mark.slow
def test_processes_give_the_same(root, tmp_path):
    dataset, progress = open_dataset(root), Progress()
    wanted = {"a": True, "b": True, "u": False, "t": True}
    alone = prepare(dataset, wanted, PLAN, tmp_path / "one")
    pooled = prepare(dataset, wanted, PLAN, tmp_path / "two", workers=2, on_progress=progress)
    assert sorted(p[2] for p in progress) == sorted(wanted)
    assert [p[:2] for p in progress] == [(i, 4) for i in range(1, 5)]
    for case_id in wanted:
        np.testing.assert_array_equal(alone.image(case_id), pooled.image(case_id))
    (root / "imagesTr" / "b_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"case b: .*b_0000\.nii\.gz"):
        prepare(dataset, wanted, PLAN, tmp_path / "three", workers=2)


def _die(job):
    os._exit(1)


@pytest.mark.slow
def test_a_killed_process_is_explained(root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_build", _die)
    with pytest.raises(VclipsegError, match="fewer workers"):
        prepare(open_dataset(root), {"a": True, "b": True}, PLAN, tmp_path / "c", workers=2)
