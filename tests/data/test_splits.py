from __future__ import annotations

import json
from dataclasses import replace

import pytest
from made import nnunet_folder, save_image, save_labels

from vclipseg.data.datasets import Split, open_dataset, split_cases
from vclipseg.errors import DataError, UsageError

LABELED = ("a", "b", "c", "d", "e", "f")


@pytest.fixture
def root(tmp_path):
    return nnunet_folder(tmp_path, labeled=LABELED, unlabeled=["u"], test=["t", "v"])


def test_the_first_cases_of_the_order(root):
    split = split_cases(open_dataset(root), labeled=2)
    assert split.labeled == ("a", "b")
    assert split.unlabeled == ("c", "d", "e", "f", "u")
    assert split.test == ("t", "v")
    assert (split.seed, split.transductive) == (None, False)


def test_all_or_named_cases(root):
    dataset = open_dataset(root)
    assert split_cases(dataset).labeled == LABELED
    assert split_cases(dataset, labeled=["d", "b", "d"]).labeled == ("d", "b")


def test_a_draw_depends_on_its_seed_alone(root):
    dataset = open_dataset(root)
    draws = {seed: split_cases(dataset, labeled=3, draw=seed) for seed in range(6)}
    assert draws[1] == split_cases(dataset, labeled=3, draw=1)
    assert len({d.labeled for d in draws.values()}) > 3
    for seed, split in draws.items():
        assert split.seed == seed
        assert sorted(split.labeled + split.unlabeled) == sorted((*LABELED, "u"))
    # pinned, so that no later version draws others
    assert draws[0].labeled == ("d", "c", "f")


def test_a_draw_keeps_a_subject_together(root):
    dataset = open_dataset(root)
    cases = tuple(
        replace(c, subject=f"s{LABELED.index(c.case_id) // 2}") if c.case_id in LABELED else c
        for c in dataset.cases
    )
    dataset = replace(dataset, cases=cases)
    for seed in range(5):
        drawn = split_cases(dataset, labeled=4, draw=seed).labeled
        subjects = [dataset.case(i).subject for i in drawn]
        assert subjects[0] == subjects[1] != subjects[2] == subjects[3]


def test_test_images_train_only_if_transductive(root):
    dataset = open_dataset(root)
    assert not set(split_cases(dataset).unlabeled) & {"t", "v"}
    split = split_cases(dataset, labeled=2, transductive=True)
    assert split.unlabeled == ("c", "d", "e", "f", "u", "t", "v")
    assert split.test == ("t", "v")
    assert split.transductive


def test_folds_test_each_labeled_case_once(root):
    dataset = open_dataset(root)
    splits = [split_cases(dataset, labeled=2, fold=fold, folds=3) for fold in range(3)]
    assert [split.test for split in splits] == [("a", "d"), ("b", "e"), ("c", "f")]
    assert splits[1].labeled == ("a", "c")  # the first two that are left
    assert splits[1].unlabeled == ("d", "f", "u")
    assert (splits[1].fold, splits[1].folds) == (1, 3)
    assert len({split.hash for split in [*splits, split_cases(dataset, labeled=2)]}) == 4
    drawn = split_cases(dataset, labeled=2, fold=1, folds=3, draw=0)
    assert drawn.test == ("b", "e")
    assert not {"b", "e"} & {*drawn.labeled, *drawn.unlabeled}


def test_folds_keep_a_subject_on_one_side(root):
    dataset = open_dataset(root)
    shared = {"a": "s", "e": "s", "u": "s"}
    cases = tuple(replace(c, subject=shared.get(c.case_id, c.subject)) for c in dataset.cases)
    split = split_cases(replace(dataset, cases=cases), fold=0, folds=5)
    assert split.test == ("a", "e")
    assert "u" not in split.unlabeled  # another scan of a test subject


@pytest.mark.parametrize(
    "arguments",
    [
        {"labeled": 0},
        {"labeled": 7},
        {"labeled": ["u"]},
        {"labeled": ["t"]},
        {"labeled": "a"},
        {"labeled": []},
        {"draw": 1},
        {"labeled": ["a"], "draw": 1},
        {"fold": 5},
        {"fold": 0, "folds": 7},
        {"labeled": 6, "fold": 0, "folds": 6},
    ],
)
def test_requests_that_cannot_be_met(root, arguments):
    with pytest.raises(UsageError):
        split_cases(open_dataset(root), **arguments)


def test_a_subject_in_train_and_test_is_refused(root):
    dataset = open_dataset(root)
    cases = tuple(replace(c, subject="a") if c.case_id == "t" else c for c in dataset.cases)
    with pytest.raises(DataError, match="subject a"):
        split_cases(replace(dataset, cases=cases))


def test_no_labels_at_all(tmp_path):
    dataset = open_dataset(nnunet_folder(tmp_path, labeled=[]))
    with pytest.raises(DataError, match="no train case has labels"):
        split_cases(dataset)


def test_the_hash_knows_ids_roles_and_content(root):
    def hash_of(**arguments) -> str:
        return split_cases(open_dataset(root), **arguments).hash

    first = hash_of(labeled=2)
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 64
    assert first == hash_of(labeled=["a", "b"])
    assert first != hash_of(labeled=["b", "a"])
    assert first != hash_of(labeled=3)
    assert first != hash_of(labeled=2, transductive=True)
    save_labels(root / "labelsTr" / "f.nii.gz", (0, 1, 1, 1))  # unlabeled: nobody reads it
    assert hash_of(labeled=2) == first
    save_labels(root / "labelsTr" / "a.nii.gz", (0, 1, 1, 1))
    second = hash_of(labeled=2)
    assert second != first
    save_image(root / "imagesUn" / "u_0000.nii.gz", seed=77)
    assert hash_of(labeled=2) != second


def test_split_survives_json(root):
    split = split_cases(open_dataset(root), labeled=2, draw=5, transductive=True, fold=1, folds=2)
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split
    earlier = {k: v for k, v in split.to_json().items() if k not in ("fold", "folds")}
    assert Split.from_json(earlier).fold is None
    with pytest.raises(DataError, match=r"splits\.json"):
        Split.from_json({"train": ["a"]})
