"""Decisions about cases: kept beside the data, never overwritten, followed by the next training."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest

from vclipseg.data import reviews
from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import IGNORE, PatchSampler
from vclipseg.data.cache import prepare, training_cases
from vclipseg.data.datasets import open_dataset, split_cases
from vclipseg.data.plan import PlanSettings, make_plan
from vclipseg.data.reviews import IGNORED, Conflict, latest_review, read_reviews, save_review
from vclipseg.data.volume import Volume, read_labels
from vclipseg.errors import DataError, UsageError

CLASSES = {"background": 0, "organ": 1}


@pytest.fixture
def data(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def mask_of(dataset, case_id):
    image = dataset.image(dataset.case(case_id))
    array = np.zeros(image.shape, np.uint8)
    array[8:16, 8:16, 6:12] = 1
    array[:4] = IGNORED
    return Volume(array, image.affine)


def unlabeled(root):
    return [case.case_id for case in open_dataset(root).unlabeled]


def test_a_mask_comes_back_as_it_was(data):
    dataset = open_dataset(data)
    case_id = unlabeled(data)[0]
    mask = mask_of(dataset, case_id)
    saved = save_review(data, case_id, "fixed", mask, CLASSES, model="abc", after=0)
    assert (saved.revision, saved.decision, saved.model) == (1, "fixed", "abc")
    assert saved == latest_review(data, case_id) == read_reviews(data)[case_id]
    again = open_dataset(data)
    found = again.training_labels(again.case(case_id))
    assert np.array_equal(found.array, mask.array)
    assert np.allclose(found.affine, mask.affine)
    assert set(np.unique(read_labels(saved.label).array)) == {0, 1, 2}  # 2 is nnU-Net's "ignore"


def test_nothing_is_overwritten(data):
    case_id = unlabeled(data)[0]
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    for number in range(3):
        mask = mask_of(open_dataset(data), case_id)
        save_review(data, case_id, "fixed", mask, CLASSES, after=number)
        before = {p: p.read_bytes() for p in before} | {
            p: p.read_bytes() for p in data.rglob("*") if p.is_file()
        }
    save_review(data, case_id, "open", None, CLASSES, after=3)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert read_reviews(data) == {}
    assert latest_review(data, case_id).decision == "open"
    assert read_reviews(data, {case_id: 2})[case_id].revision == 2


def test_whoever_comes_second_is_told(data):
    case_id = unlabeled(data)[0]
    save_review(data, case_id, "ignored", None, CLASSES, after=0)
    with pytest.raises(Conflict, match="decided meanwhile"):
        save_review(data, case_id, "open", None, CLASSES, after=0)
    assert latest_review(data, case_id).decision == "ignored"


def test_many_at_once_and_one_wins_each_round(data):
    case_id = unlabeled(data)[0]
    mask = mask_of(open_dataset(data), case_id)
    outcomes = []

    def decide():
        try:
            outcomes.append(save_review(data, case_id, "fixed", mask, CLASSES, after=0).revision)
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=decide) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["1", *["conflict"] * 7]
    assert latest_review(data, case_id).revision == 1


def test_killed_while_writing_leaves_the_decision_before(data, monkeypatch):
    case_id = unlabeled(data)[0]
    first = save_review(data, case_id, "fixed", mask_of(open_dataset(data), case_id), CLASSES)

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(reviews.os, "link", die)
    with pytest.raises(KeyboardInterrupt):
        save_review(data, case_id, "fixed", mask_of(open_dataset(data), case_id), CLASSES)
    assert latest_review(data, case_id) == first
    assert not list(data.rglob("*.tmp"))


@pytest.mark.parametrize("content", ["", "{", '{"decision": "fixed"}', "[]"])
def test_a_damaged_decision_is_named(data, content):
    case_id = unlabeled(data)[0]
    save_review(data, case_id, "ignored", None, CLASSES)
    file = data / "reviews" / case_id / "0001.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"0001\.json: is not a decision"):
        open_dataset(data)


def test_a_mask_outside_of_the_folder_is_not_read(data):
    case_id = unlabeled(data)[0]
    save_review(data, case_id, "ignored", None, CLASSES)
    file = data / "reviews" / case_id / "0001.json"
    label = f"../../labelsTr/{open_dataset(data).labeled[0].label.name}"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "label": label}))
    with pytest.raises(DataError, match="is not a decision"):
        read_reviews(data)


def test_masks_only_where_a_decision_has_one(data):
    case_id = unlabeled(data)[0]
    with pytest.raises(UsageError, match="needs a mask"):
        save_review(data, case_id, "accepted", None, CLASSES)
    with pytest.raises(UsageError, match="has no mask"):
        save_review(data, case_id, "ignored", mask_of(open_dataset(data), case_id), CLASSES)


def test_a_class_that_came_later_does_not_take_the_ignored_voxels(data):
    """They hold the value after the highest of then."""
    dataset = open_dataset(data)
    mask = mask_of(dataset, unlabeled(data)[0])
    saved = save_review(data, unlabeled(data)[0], "fixed", mask, CLASSES)
    assert np.array_equal(saved.labels((0, 1, 2)).array, mask.array)


def test_a_value_of_no_class_is_refused(data):
    dataset = open_dataset(data)
    case_id = unlabeled(data)[0]
    saved = save_review(
        data, case_id, "fixed", mask_of(dataset, case_id), {"background": 0, "organ": 7}
    )
    assert set(np.unique(read_labels(saved.label).array)) == {0, 7, 8}
    with pytest.raises(DataError, match="holds the values 7, which"):
        saved.labels((0, 1, 2))


# What training makes of it


def test_reviewed_cases_are_labeled_and_ignored_ones_left_out(data):
    before = split_cases(open_dataset(data), labeled=1)
    reviewed, left_out = unlabeled(data)
    save_review(data, reviewed, "accepted", mask_of(open_dataset(data), reviewed), CLASSES)
    save_review(data, left_out, "ignored", None, CLASSES)
    split = split_cases(open_dataset(data), labeled=1)
    assert split.labeled == (*before.labeled, reviewed)
    assert left_out not in split.labeled + split.unlabeled
    assert split.reviews == {reviewed: 1, left_out: 1}
    assert split.hash != before.hash
    assert type(split).from_json(split.to_json()) == split
    assert split_cases(open_dataset(data, reviews=False), labeled=1) == before


def test_an_earlier_start_keeps_its_decisions(data):
    case_id = unlabeled(data)[0]
    save_review(data, case_id, "accepted", mask_of(open_dataset(data), case_id), CLASSES)
    split = split_cases(open_dataset(data))
    save_review(data, case_id, "ignored", None, CLASSES)
    assert split_cases(open_dataset(data)).hash != split.hash
    assert split_cases(open_dataset(data, reviews=split.reviews)) == split


def test_the_review_of_a_labeled_case_counts_before_its_label(data):
    dataset = open_dataset(data)
    case = dataset.labeled[0]
    mask = mask_of(dataset, case.case_id)
    save_review(data, case.case_id, "fixed", mask, CLASSES)
    dataset = open_dataset(data)
    case = dataset.case(case.case_id)
    assert np.array_equal(dataset.training_labels(case).array, mask.array)
    assert not np.array_equal(dataset.labels(case).array, mask.array)


def test_test_cases_have_no_reviews(data):
    dataset = open_dataset(data)
    case = dataset.test[0]
    save_review(data, case.case_id, "fixed", mask_of(dataset, case.case_id), CLASSES)
    dataset = open_dataset(data)
    assert dataset.case(case.case_id).review is None
    assert case.case_id in split_cases(dataset).test


def test_only_reviewed_cases_are_enough(data):
    case_id = unlabeled(data)[0]
    mask = mask_of(open_dataset(data), case_id)
    shutil.rmtree(data / "labelsTr")
    with pytest.raises(DataError, match="no train case has labels"):
        split_cases(open_dataset(data))
    save_review(data, case_id, "fixed", mask, CLASSES)
    assert split_cases(open_dataset(data)).labeled == (case_id,)


def test_batches_ignore_what_the_person_left_open(data, tmp_path):
    dataset = open_dataset(data)
    case_id = unlabeled(data)[0]
    save_review(data, case_id, "fixed", mask_of(dataset, case_id), CLASSES)
    dataset = open_dataset(data)
    split = split_cases(dataset)
    plan = make_plan(dataset, dataset.train, PlanSettings())
    cases = prepare(dataset, training_cases(split), plan, tmp_path / "cache")
    assert IGNORED in cases.labels(case_id)
    sampler = PatchSampler(
        cases.image,
        cases.labels,
        (case_id,),
        split.unlabeled,
        (24, 24, 16),
        lambda step: (2, 0),
        AugmentSettings(foreground_share=1.0, zoom=0.3),
        seed=0,
    )
    labels = sampler.batch(0).labels
    assert set(labels.unique().tolist()) == {IGNORE, 0, 1}
