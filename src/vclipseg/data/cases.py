"""What a data set consists of: its cases, found by the names of their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vclipseg.data.dicom_labels import referenced_series
from vclipseg.data.dicom_tree import label_objects, named_series, series_of
from vclipseg.data.findings import Problem
from vclipseg.data.formats import IMAGE_SUFFIXES, hidden, is_series, strip_suffix
from vclipseg.data.reviews import Review
from vclipseg.errors import DataError

Layout = Literal["nnunet", "decathlon", "la_h5", "folders", "csv", "dicom"]
Role = Literal["train", "test"]
CHANNEL = re.compile(r"^(.+)_(\d{4})$")
"""nnU-Net's file names: the case, then the number of the channel."""


@dataclass(frozen=True)
class Case:
    """One subject's image and, where there is one, its label file.

    Attributes:
        images: One file a channel, or one file that holds all channels. A DICOM series is named by its
            folder, or by a file of it.
        label: None if nobody annotated the case.
        subject: Cases of one subject never end up on both sides of a split.
        review: What a person decided about a train case; its mask counts before `label` in training.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    split: Role
    subject: str
    review: Review | None = None

    @property
    def training_label(self) -> Path | None:
        """The file that training reads labels from: the reviewed mask, else the data set's own."""
        return (self.review.label if self.review else None) or self.label


@dataclass(frozen=True)
class Listing:
    """What a layout says: its cases, and of channels and classes what it knows.

    Attributes:
        labels: class name -> stored value.
        remarks: what every result on these data has to say of them.
        problems: what was seen in passing, for a check to tell.
    """

    root: Path
    layout: Layout
    name: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not readable JSON ({error}). Correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, as in {{...}}.")
    return content


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder in order of name; hidden ones (macOS's `._*`) left out."""
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.name.lower().endswith(IMAGE_SUFFIXES) and not hidden(p)
    )


def named_images(folder: Path) -> list[tuple[str, Path]]:
    """Name and path of each image in a folder: files, and the DICOM series of the folders in it."""
    found = [(strip_suffix(path), path) for path in image_files(folder)]
    if folder.is_dir():
        found += [(name, series.path) for name, series in named_series(folder)]
    return sorted(found, key=lambda named: named[1])


def named_labels(folder: Path) -> list[tuple[str, Path]]:
    """Name and path of each label in a folder: files, and DICOM's segmentations and structure sets."""
    found = [(strip_suffix(path), path) for path in image_files(folder)]
    return found + [(name, file.path) for name, file in label_objects(folder)]


def group_channels(
    named: Iterable[tuple[str, Path]], suffixed: bool
) -> dict[str, tuple[Path, ...]]:
    """Case id -> its files in the order of channels; `suffixed` names end in _0000, _0001, ..."""
    groups: dict[str, list[tuple[str, Path]]] = {}
    for name, path in named:
        match = CHANNEL.match(name) if suffixed else None
        groups.setdefault(match[1] if match else name, []).append((name, path))
    for case_id, members in groups.items():
        found = [m[2] for name, _ in members if suffixed and (m := CHANNEL.match(name))]
        if len(members) > 1 and found != [f"{i:04d}" for i in range(len(members))]:
            names = ", ".join(path.name for _, path in members)
            raise DataError(
                f"{members[0][1].parent}: case {case_id} has the files {names}. "
                "Channels are numbered _0000, _0001, ... without gaps, one file each."
            )
    return {case_id: tuple(path for _, path in members) for case_id, members in groups.items()}


def paired(
    root: Path, image_folder: str, label_folder: str, split: Role, suffixed: bool
) -> list[Case]:
    """Cases of an image folder, with the label of the same name where there is one."""
    images = group_channels(named_images(root / image_folder), suffixed)
    labels: dict[str, Path] = {}
    lonely = []
    for name, path in named_labels(root / label_folder):
        owner = name if name in images else _referred_to(path, images)
        if owner is None:
            lonely.append(path)
        elif is_series(path) and owner in labels:
            raise DataError(
                f"{path}: case {owner} has another label, {labels[owner].name}. Keep one of them."
            )
        else:
            labels[owner] = path
    if lonely:
        raise DataError(
            f"{lonely[0]}: no image in {image_folder} belongs to this label"
            f"{f' (and {len(lonely) - 1} more)' if len(lonely) > 1 else ''}. "
            "Image and label must have the same name, but for the channel number _0000."
        )
    return [Case(i, files, labels.get(i), split, i) for i, files in images.items()]


def unlabeled(root: Path, suffixed: bool) -> list[Case]:
    """The cases of the folder imagesUn."""
    groups = group_channels(named_images(root / "imagesUn"), suffixed)
    return [Case(case_id, paths, None, "train", case_id) for case_id, paths in groups.items()]


def _referred_to(label: Path, images: Mapping[str, tuple[Path, ...]]) -> str | None:
    """The case whose series a segmentation says it is of; None if there is none."""
    if not is_series(label):
        return None
    uid = referenced_series(label)
    series = {name: series_of(paths[0]) for name, paths in images.items()}
    return next((name for name, one in series.items() if one and one.file.series == uid), None)
