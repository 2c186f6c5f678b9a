"""Which cases are labeled, unlabeled and test, drawn by seed and pinned by a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vclipseg.data.cases import Case
from vclipseg.data.formats import stored_files
from vclipseg.errors import DataError, UsageError

if TYPE_CHECKING:
    from vclipseg.data.datasets import Dataset


@dataclass(frozen=True)
class Split:
    """Case ids by role.

    Attributes:
        labeled: Train cases whose labels training may read.
        unlabeled: All other train cases; with `transductive` the test cases too.
        seed: Of the draw of the labeled cases; None if they were not drawn.
        hash: Over ids, roles and the content of the files that the roles allow to be read.
        fold: Which part of the labeled train cases is the test, of `folds`; None if the data set's
            own test cases are.
        reviews: Case id -> revision of the decision of a person that this split follows.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    test: tuple[str, ...]
    seed: int | None
    transductive: bool
    hash: str
    fold: int | None = None
    folds: int | None = None
    reviews: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What splits.json of a run folder holds."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Split:
        """The split that `to_json` wrote.

        Raises:
            DataError: A key is missing or unknown.
        """
        try:
            lists = {key: tuple(content[key]) for key in ("labeled", "unlabeled", "test")}
            return cls(**{**content, **lists})
        except (KeyError, TypeError) as error:
            raise DataError(f"splits.json: is not the split of a run ({error}).") from error


def split_cases(
    dataset: Dataset,
    *,
    labeled: int | Sequence[str] | None = None,
    draw: int | None = None,
    transductive: bool = False,
    fold: int | None = None,
    folds: int = 5,
) -> Split:
    """Decide which cases training sees with labels, which without, and which it never sees.

    Train cases with a reviewed mask are labeled besides the number asked for; those that a person
    marked to be ignored have no role.

    Args:
        dataset: Its train order is the one that numbers count.
        labeled: A number of cases, taken from the start of the train order; or their ids;
            None takes all that have labels. All other train cases become unlabeled.
        draw: Seed to draw that number at random instead, subject by subject.
        transductive: Train on the images (never the labels) of the test cases as well.
        fold: Cross-validation: of the subjects with labels in the train order, every `folds`-th
            beginning with this one is the test; the data set's own test cases have no role.
        folds: In how many parts.

    Raises:
        UsageError: There are not so many labeled cases or folds, or an id is not one of them.
        DataError: A subject has cases in train and in test.
    """
    _refuse_shared_subjects(dataset)
    train, held_out = dataset.train, dataset.test
    if fold is not None:
        train, held_out = _fold(dataset, fold, folds)
    train = tuple(c for c in train if not (c.review and c.review.decision == "ignored"))
    reviewed = tuple(c.case_id for c in train if c.review)
    chosen = _choose(dataset, [c for c in train if c.label], reviewed, labeled, draw)
    test = tuple(c.case_id for c in held_out)
    others = tuple(c.case_id for c in train if c.case_id not in set(chosen))
    unlabeled = others + test if transductive else others
    return Split(
        labeled=chosen,
        unlabeled=unlabeled,
        test=test,
        seed=draw,
        transductive=transductive,
        hash=_hash_roles(dataset, {"labeled": chosen, "unlabeled": unlabeled, "test": test}),
        fold=fold,
        folds=None if fold is None else folds,
        reviews={
            c.case_id: c.review.revision
            for c in dataset.train
            if c.review and c.case_id not in test
        },
    )


def _fold(dataset: Dataset, fold: int, folds: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Train and test cases of one fold; no subject is in both."""
    subjects = list(dict.fromkeys(c.subject for c in dataset.labeled))
    if not 2 <= folds <= len(subjects) or not 0 <= fold < folds:
        raise UsageError(
            f"{dataset.root}: fold {fold} of {folds} asked for; the {len(subjects)} subjects with "
            f"labels make 2 to {len(subjects)} folds, counted from 0."
        )
    held_out = set(subjects[fold::folds])
    test = tuple(c for c in dataset.labeled if c.subject in held_out)
    return tuple(c for c in dataset.train if c.subject not in held_out), test


def _refuse_shared_subjects(dataset: Dataset) -> None:
    shared = {c.subject for c in dataset.train} & {c.subject for c in dataset.test}
    if shared:
        raise DataError(
            f"{dataset.root}: subject {min(shared)} has cases in train and in test. Test results "
            "would be too good: put all cases of a subject on one side."
        )


def _choose(
    dataset: Dataset,
    candidates: Sequence[Case],
    reviewed: tuple[str, ...],
    labeled: int | Sequence[str] | None,
    draw: int | None,
) -> tuple[str, ...]:
    """The ids asked for, then the reviewed ones."""
    if reviewed and not candidates and labeled is None:
        return reviewed
    chosen = _asked_for(dataset, candidates, labeled, draw)
    return tuple(dict.fromkeys((*chosen, *reviewed)))


def _asked_for(
    dataset: Dataset,
    candidates: Sequence[Case],
    labeled: int | Sequence[str] | None,
    draw: int | None,
) -> tuple[str, ...]:
    if not candidates:
        raise DataError(f"{dataset.root}: no train case has labels. Annotate at least one.")
    if labeled is None and draw is None:
        return tuple(c.case_id for c in candidates)
    if isinstance(labeled, int):
        if not 1 <= labeled <= len(candidates):
            raise UsageError(
                f"{dataset.root}: {labeled} labeled cases asked for; 1 to {len(candidates)} can be."
            )
        if draw is not None:
            candidates = _shuffled(candidates, draw)
        return tuple(c.case_id for c in candidates[:labeled])
    if draw is not None or isinstance(labeled, str) or not labeled:
        raise UsageError("A draw needs the number of labeled cases, as in labeled=4; ids a list.")
    known = {c.case_id for c in candidates}
    if unknown := [i for i in labeled if i not in known]:
        raise UsageError(f"{dataset.root}: {unknown[0]} is not a train case with a label file.")
    return tuple(dict.fromkeys(labeled))


def _shuffled(cases: Sequence[Case], seed: int) -> tuple[Case, ...]:
    """Subjects in random order, the cases of each together; equal on every machine."""
    subjects = list(dict.fromkeys(c.subject for c in cases))
    order = np.random.default_rng(seed).permutation(len(subjects))
    return tuple(c for n in order for c in cases if c.subject == subjects[n])


def _hash_roles(dataset: Dataset, roles: dict[str, tuple[str, ...]]) -> str:
    """Hash ids, roles and files; of an unlabeled case the image only."""
    lines = []
    for role, ids in roles.items():
        for case_id in ids:
            case = dataset.case(case_id)
            paths = [*case.images]
            label = case.training_label if role == "labeled" else case.label
            if role != "unlabeled" and label:
                paths.append(label)
            lines.append([role, case_id, *(hash_file(path) for path in paths)])
    return "sha256:" + hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of what is in an image file and, for `.mhd`, in the file of its voxels.

    Raises:
        DataError: It cannot be read.
    """
    try:
        files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in stored_files(path)]
        return "+".join(_hash_content(*file) for file in files)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


@lru_cache(maxsize=65536)
def _hash_content(path: str, size: int, changed: int) -> str:
    """Size and time of the last change make the memory forget files that were rewritten."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
