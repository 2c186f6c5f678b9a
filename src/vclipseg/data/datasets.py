"""A data set: cases in a fixed order, channels, classes, and its volumes read on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vclipseg.data.cases import Case, Layout, Listing, read_json
from vclipseg.data.dicom_labels import is_object, read_on_grid
from vclipseg.data.formats import is_series
from vclipseg.data.grids import turned_like
from vclipseg.data.layouts import list_cases
from vclipseg.data.reviews import Review, read_reviews
from vclipseg.data.splits import Split, split_cases
from vclipseg.data.volume import Volume, read_header, read_image, read_labels
from vclipseg.errors import DataError, UsageError

__all__ = ["Case", "Dataset", "Split", "open_dataset", "split_cases"]


ANY_VALUE = tuple(range(256))
"""Label values of a data set that says nothing of its classes: to look at, not to train on."""


@dataclass(frozen=True)
class Dataset:
    """Cases of one folder.

    Attributes:
        class_names: Index 0 is the background.
        label_values: The value stored in label files for each class.
        cases: The train cases in the order that label budgets count, then the test cases.
        remarks: What every result on these data has to say of them.
    """

    root: Path
    layout: Layout
    name: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    label_values: tuple[int, ...]
    cases: tuple[Case, ...]
    remarks: tuple[str, ...] = ()

    @property
    def train(self) -> tuple[Case, ...]:
        """Cases to train on, labeled or not."""
        return tuple(c for c in self.cases if c.split == "train")

    @property
    def test(self) -> tuple[Case, ...]:
        """Cases kept apart for the evaluation."""
        return tuple(c for c in self.cases if c.split == "test")

    @property
    def labeled(self) -> tuple[Case, ...]:
        """Train cases that have a label file."""
        return tuple(c for c in self.train if c.label)

    @property
    def unlabeled(self) -> tuple[Case, ...]:
        """Train cases that have none."""
        return tuple(c for c in self.train if not c.label)

    @property
    def classes(self) -> dict[str, int]:
        """Class name -> the value stored for it."""
        return dict(zip(self.class_names, self.label_values, strict=True))

    @cached_property
    def by_name(self) -> bool:
        """Whether labels name their classes, as DICOM objects do, and the values are only their order."""
        return _by_name(self.cases)

    @cached_property
    def _by_id(self) -> dict[str, Case]:
        return {c.case_id: c for c in self.cases}

    def case(self, case_id: str) -> Case:
        """The case of an id.

        Raises:
            UsageError: There is none.
        """
        if case_id not in self._by_id:
            raise UsageError(f"{self.root}: has no case {case_id}.")
        return self._by_id[case_id]

    def image(self, case: Case) -> Volume:
        """Read a case's image, float32 `(C, X, Y, Z)`."""
        volume = read_image(case.images)
        if len(volume.array) != len(self.channel_names):
            raise DataError(
                f"{case.images[0]}: case {case.case_id} has {len(volume.array)} channels, the "
                f"data set {len(self.channel_names)} ({', '.join(self.channel_names)})."
            )
        return volume

    def labels(self, case: Case) -> Volume:
        """Read a case's labels as class indices, uint8 `(X, Y, Z)`.

        Raises:
            DataError: The case has no label file, or it holds a value of no class.
        """
        if case.label is None:
            raise DataError(f"{self.root}: case {case.case_id} has no label file.")
        if is_object(case.label):
            return read_on_grid(case.label, read_header(case.images[0]), self.class_names)
        stored = read_labels(case.label)
        if case.images and is_series(case.images[0]):
            stored = turned_like(stored, read_header(case.images[0]))
        classes = np.zeros(stored.array.shape, dtype=np.uint8)
        known = stored.array == self.label_values[0]
        for index, value in enumerate(self.label_values[1:], start=1):
            voxels = stored.array == value
            classes[voxels] = index
            known |= voxels
        if not known.all():
            others = ", ".join(str(v) for v in np.unique(stored.array[~known])[:10])
            raise DataError(
                f"{case.label}: holds the values {others}, which are no class; known are "
                f"{self.label_values}. Correct the file, or name its classes (label_values)."
            )
        return Volume(classes, stored.affine)

    def training_labels(self, case: Case) -> Volume:
        """Labels as training reads them: of the case's review, if it has a mask, else `labels`.

        `IGNORED` marks voxels of a reviewed mask that training leaves out.
        """
        if case.review and case.review.label:
            return self.reviewed_labels(case.review)
        return self.labels(case)

    def reviewed_labels(self, review: Review) -> Volume:
        """The mask of a decision, as class indices with `IGNORED`.

        Raises:
            DataError: There is no mask, or it holds a value of no class.
        """
        return review.labels(self.label_values, self.class_names if self.by_name else None)


def open_dataset(
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    label_values: Sequence[int] | None = None,
    classes: Mapping[str, int] | None = None,
    reviews: bool | Mapping[str, int] = True,
) -> Dataset:
    """Open a data set in any known layout. No image is read.

    Args:
        folder: The folder, or a CSV file.
        class_names: Names in the order of the classes; "background" may be left out.
        label_values: The stored value of each class, background first, when these are not
            0, 1, 2, ...
        classes: Name and stored value of every class as an earlier run knew them, instead of the two
            above and of what the folder says now.
        reviews: Read what people decided about train cases: the latest decisions, or those of these
            revisions by case id.

    Raises:
        UsageError: There is no data set, or the arguments do not fit it.
        DataError: The data set is broken; the message names the file.
    """
    listing = list_cases(Path(folder))
    if not listing.cases:
        raise DataError(f"{listing.root}: has no cases. Put images into its image folder.")
    cases = _ordered(listing)
    _check_cases(cases)
    cases = _with_reviews(listing.root, cases, reviews)
    if classes is None:
        names, values = _classes(listing, cases, class_names, label_values)
    else:
        names, values = tuple(classes), tuple(classes.values())
    return Dataset(
        root=listing.root,
        layout=listing.layout,
        name=listing.name,
        channel_names=listing.channel_names or _count_channels(cases[0]),
        class_names=names,
        label_values=values,
        cases=cases,
        remarks=listing.remarks,
    )


def _ordered(listing: Listing) -> tuple[Case, ...]:
    """Train cases, then test cases; splits.json in the folder has the last word on both.

    Train cases that it does not name follow in their own order. Its "test" may take cases
    out of the training folder; its "train" can never take in a test case.
    """
    file = listing.root / "splits.json"
    wish = read_json(file) if file.is_file() else {}
    order = {role: {i: n for n, i in enumerate(wish.get(role) or [])} for role in ("train", "test")}
    known = {c.case_id for c in listing.cases}
    if "train" not in wish:  # not a file of ours, or only about the test cases
        order["train"] = {}
    for role, ids in order.items():
        if missing := [i for i in ids if i not in known]:
            raise DataError(f'{file}: "{role}" names {missing[0]}, which is no case here.')
    cases = [replace(c, split="test") if c.case_id in order["test"] else c for c in listing.cases]
    for case in cases:
        if case.split == "test" and case.case_id in order["train"]:
            raise DataError(f'{file}: "train" names {case.case_id}, which is a test case.')

    def place(case: Case) -> tuple[bool, int]:
        return case.split == "test", order[case.split].get(case.case_id, len(cases))

    return tuple(sorted(cases, key=place))


def _with_reviews(
    root: Path, cases: tuple[Case, ...], reviews: bool | Mapping[str, int]
) -> tuple[Case, ...]:
    """Train cases with what people decided about them; test cases have no reviews."""
    if reviews is False:
        return cases
    found = read_reviews(root, None if reviews is True else reviews)
    return tuple(
        replace(c, review=found.get(c.case_id)) if c.split == "train" else c for c in cases
    )


def _check_cases(cases: Sequence[Case]) -> None:
    """Ids are unique and usable as file names; listed files exist."""
    seen: dict[str, Case] = {}
    for case in cases:
        if case.case_id in seen:
            raise DataError(
                f"{case.images[0]}: the case id {case.case_id} is taken by "
                f"{seen[case.case_id].images[0]}. Every case needs its own name."
            )
        seen[case.case_id] = case
        if not case.case_id or set(case.case_id) & set('/\\:*?"<>|'):
            raise DataError(f"{case.images[0]}: {case.case_id!r} cannot be part of a file name.")
        for path in (*case.images, *([case.label] if case.label else [])):
            if not path.exists():
                raise DataError(f"{path}: case {case.case_id} needs this file, which is not there.")


def _count_channels(case: Case) -> tuple[str, ...]:
    """Names for the channels of a layout that gives none."""
    count = sum(read_header(path).channels for path in case.images)
    return ("image",) if count == 1 else tuple(f"channel_{i}" for i in range(count))


def _classes(
    listing: Listing,
    cases: Sequence[Case],
    class_names: Sequence[str] | None,
    label_values: Sequence[int] | None,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and stored values, from the arguments, dataset.json or the label files."""
    names = _with_background(class_names)
    if label_values is not None:
        values = tuple(int(v) for v in label_values)
    elif names and _by_name(cases):
        values = tuple(range(len(names)))
    elif listing.labels:
        values = tuple(sorted(listing.labels.values()))
    else:
        values = tuple(range(len(names))) if names else _stored_values(listing, cases)
    _check_values(listing, values, asked=label_values is not None)
    if not names:
        known = {value: name for name, value in listing.labels.items()}
        default = ["background", *(f"class_{i}" for i in range(1, len(values)))]
        names = tuple(known.get(v, d) for v, d in zip(values, default, strict=True))
    if len(names) != len(values) or len(set(names)) != len(names):
        raise UsageError(
            f"{listing.root}: {len(names)} class names ({', '.join(names)}) for "
            f"{len(values)} label values {values}. Give one name for each."
        )
    return names, values


def _by_name(cases: Sequence[Case]) -> bool:
    """Whether all labels to train on are DICOM objects."""
    labels = [c.label for c in cases if c.label and c.split == "train"]
    return bool(labels) and all(map(is_object, labels))


def _with_background(class_names: Sequence[str] | None) -> tuple[str, ...]:
    if not class_names:
        return ()
    names = tuple(class_names)
    return names if names[0].casefold() == "background" else ("background", *names)


def _stored_values(listing: Listing, cases: Sequence[Case]) -> tuple[int, ...]:
    """The values in the label files of the train cases; those of test cases stay unread."""
    found: set[int] = {0}
    for case in cases:
        if case.label and case.split == "train":
            if is_object(case.label):
                raise DataError(
                    f"{case.label}: names its classes, other labels here have values. Say which "
                    "is which: give class_names in the order of the values."
                )
            found.update(np.unique(read_labels(case.label).array).tolist())
    if found == {0}:
        raise DataError(
            f"{listing.root}: no label file names a class. Give class_names, or add labels."
        )
    return tuple(sorted(found))


def _check_values(listing: Listing, values: tuple[int, ...], asked: bool) -> None:
    if values == ANY_VALUE:
        return
    if len(set(values)) != len(values) or not 2 <= len(values) <= 255:
        raise UsageError(f"{listing.root}: label values {values} must be 2 to 255 different ones.")
    if not asked and values != tuple(range(len(values))):
        raise DataError(
            f"{listing.root}: the label values {values} are not 0, 1, 2, ... without gaps. If "
            f"they are meant so, ask for it: label_values = {list(values)} (background first)."
        )
