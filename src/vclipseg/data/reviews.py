"""What people decided about cases: labels beside a data set, never in its own files.

    reviews/<case_id>/0001.json            a decision; the highest number is the one that holds
    reviews/<case_id>/0001-3f9a.nii.gz     the mask that it names

Every decision is a new file and none is ever written again, so that two people (or two servers) cannot
overwrite each other, a run can go on with the decisions that it began with, and what is killed while it
writes leaves the decision before. Masks hold the data set's own label values; voxels that nobody knows
hold the value after the highest, nnU-Net's "ignore".
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vclipseg.data.dicom_objects import plain_name
from vclipseg.data.ignored import IGNORED
from vclipseg.data.volume import Volume, read_labels, write
from vclipseg.errors import DataError, UsageError

FOLDER = "reviews"

Decision = Literal["accepted", "fixed", "ignored", "open"]
"""A mask taken as it was; one that was corrected; a case that training leaves out; undecided again."""


class Conflict(UsageError):
    """Somebody else has decided meanwhile."""


@dataclass(frozen=True)
class Review:
    """A decision about a case.

    Attributes:
        revision: Counts the decisions about the case from 1.
        label: The mask, for `accepted` and `fixed`.
        ignore_value: The value in it of voxels that training leaves out.
        when: ISO 8601, UTC.
        model: `settings_hash` of the run whose mask was reviewed; empty if it was none.
        classes: Class name -> its value in the mask; empty in decisions that do not say.
    """

    case_id: str
    revision: int
    decision: Decision
    label: Path | None
    ignore_value: int
    when: str
    model: str
    classes: dict[str, int] = field(default_factory=dict)

    def labels(
        self, label_values: Sequence[int], class_names: Sequence[str] | None = None
    ) -> Volume:
        """The mask as class indices uint8 `(X, Y, Z)`, `IGNORED` where nobody knows.

        Args:
            label_values: The data set's stored value of each class.
            class_names: Find the classes by name instead, whatever values they have by now; classes
                of other names are left out.

        Raises:
            DataError: There is no mask, or it holds a value of no class.
        """
        if self.label is None:
            raise DataError(f"case {self.case_id}: revision {self.revision} has no mask.")
        stored = read_labels(self.label)
        index_of = {value: index for index, value in enumerate(label_values)}
        if class_names and self.classes:
            names = {plain_name(name): index for index, name in enumerate(class_names)}
            index_of = {v: names.get(plain_name(name), 0) for name, v in self.classes.items()}
        return Volume(_indices(stored.array, index_of, self), stored.affine)


def _indices(stored: np.ndarray, index_of: Mapping[int, int], review: Review) -> np.ndarray:
    classes = np.full(stored.shape, IGNORED, dtype=np.uint8)
    known = stored == review.ignore_value
    for value, index in index_of.items():
        if value == review.ignore_value:  # of a class that the data set did not have then
            continue
        voxels = stored == value
        classes[voxels] = index
        known |= voxels
    if not known.all():
        others = ", ".join(str(v) for v in np.unique(stored[~known])[:10])
        raise DataError(
            f"{review.label}: holds the values {others}, which are no class; known are "
            f"{tuple(index_of)} and {review.ignore_value} for ignored voxels."
        )
    return classes


def read_reviews(root: Path, revisions: Mapping[str, int] | None = None) -> dict[str, Review]:
    """Case id -> the decision that holds; cases that are open again are left out.

    Args:
        root: The folder of the data set.
        revisions: Take these decisions, by case id, instead of the latest of all cases.

    Raises:
        DataError: A decision is missing or damaged; the message names its file.
    """
    folder = root / FOLDER
    if revisions is not None:
        found = [_read(folder / case_id / f"{n:04d}.json") for case_id, n in revisions.items()]
    elif folder.is_dir():
        found = [r for f in sorted(folder.iterdir()) if (r := _latest(f))]
    else:
        found = []
    return {r.case_id: r for r in found if r.decision != "open"}


def latest_review(root: Path, case_id: str) -> Review | None:
    """The last decision about a case, "open" too; None if there never was one."""
    return _latest(root / FOLDER / case_id)


def all_reviews(root: Path, case_id: str) -> list[Review]:
    """Every decision about a case, those that hold no more too: runs may follow them.

    Raises:
        DataError: A decision is missing its mask or damaged; the message names its file.
    """
    return [_read(file) for file in _decisions(root / FOLDER / case_id)]


def _latest(folder: Path) -> Review | None:
    decisions = _decisions(folder)
    return _read(decisions[-1]) if decisions else None


def _decisions(folder: Path) -> list[Path]:
    """The files of the decisions about a case, in order of revision."""
    if not folder.is_dir():
        return []
    numbered = [p for p in folder.iterdir() if re.fullmatch(r"\d{4,}\.json", p.name)]
    return sorted(numbered, key=lambda p: int(p.stem))


def _read(file: Path) -> Review:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name = content["label"]
        label = file.parent / Path(name).name if name else None
        if content["decision"] not in get_args(Decision) or (label and not label.is_file()):
            raise ValueError(f"decision {content['decision']!r}, mask {name!r}")
        return Review(
            case_id=file.parent.name,
            revision=int(file.stem),
            decision=content["decision"],
            label=label,
            ignore_value=int(content["ignore_value"]),
            when=str(content["when"]),
            model=str(content["model"]),
            classes={str(k): int(v) for k, v in content.get("classes", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: is not a decision that can be read ({error}). Delete it to go back to the one "
            "before, or restore it with its mask."
        ) from error


def save_review(
    root: Path,
    case_id: str,
    decision: Decision,
    mask: Volume | None,
    classes: Mapping[str, int],
    *,
    model: str = "",
    after: int | None = None,
) -> Review:
    """Add a decision about a case; when this returns, it is on the disk.

    Args:
        root: The folder of the data set.
        case_id: Whose decision; a case of that data set.
        decision: What was decided.
        mask: Class indices uint8 `(X, Y, Z)` with `IGNORED` voxels; for `accepted` and `fixed`.
        classes: Class name -> its stored value, in the order of the indices.
        model: `settings_hash` of the run whose mask was reviewed.
        after: The revision that the person saw, 0 if there was none; not looked at when left out.

    Raises:
        Conflict: There is a later decision than `after`.
        UsageError: A mask is missing, or given where there can be none.
    """
    if (mask is None) != (decision in ("ignored", "open")):
        raise UsageError(
            f"case {case_id}: {decision!r} {'needs a' if mask is None else 'has no'} mask"
        )
    folder = root / FOLDER / case_id
    before = _latest(folder)
    number = before.revision if before else 0
    if after is not None and after != number:
        raise _conflict(case_id, number)
    ignore_value = max(classes.values()) + 1
    content: dict[str, Any] = {
        "version": 1,
        "decision": decision,
        "label": None,
        "classes": dict(classes),
        "ignore_value": ignore_value,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
    }
    if mask is not None:
        label = folder / f"{number + 1:04d}-{secrets.token_hex(4)}.nii.gz"
        _write_mask(mask, label, tuple(classes.values()), ignore_value)
        content["label"] = label.name
    file = folder / f"{number + 1:04d}.json"
    try:
        _write_once(file, json.dumps(content, indent=2) + "\n")
    except FileExistsError as error:
        raise _conflict(case_id, number + 1) from error
    return _read(file)


def _conflict(case_id: str, number: int) -> Conflict:
    return Conflict(
        f"case {case_id}: somebody has decided meanwhile (revision {number}); look at it, then "
        "decide again"
    )


def _write_mask(mask: Volume, path: Path, label_values: Sequence[int], ignore_value: int) -> None:
    values = np.full(256, ignore_value)
    values[: len(label_values)] = label_values
    small = values.max() < 256 and values.min() >= 0
    stored = values[mask.array].astype(np.uint8 if small else np.int32)
    write(Volume(stored, mask.affine), path)
    _to_disk(path)


def _write_once(path: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        _to_disk(unfinished)
        os.link(unfinished, path)  # fails where the name is taken
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
