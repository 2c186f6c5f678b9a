"""What a data set consists of: its cases, found by the names of their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vclipseg.data.formats import IMAGE_SUFFIXES, strip_suffix
from vclipseg.data.reviews import Review
from vclipseg.errors import DataError

Layout = Literal["nnunet", "decathlon", "la_h5", "folders", "csv"]
Role = Literal["train", "test"]
CHANNEL = re.compile(r"^(.+)_(\d{4})$")
"""nnU-Net's file names: the case, then the number of the channel."""


@dataclass(frozen=True)
class Case:
    """One subject's image and, where there is one, its label file.

    Attributes:
        images: One file a channel, or one file that holds all channels.
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
    """

    root: Path
    layout: Layout
    name: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


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


def hidden(path: Path) -> bool:
    """Whether a file is one that people do not see, such as macOS's `._*`."""
    return path.name.startswith(".")


def group_channels(files: Iterable[Path], suffixed: bool) -> dict[str, tuple[Path, ...]]:
    """Case id -> its files in the order of channels; `suffixed` names end in _0000, _0001, ..."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        match = CHANNEL.match(strip_suffix(path)) if suffixed else None
        groups.setdefault(match[1] if match else strip_suffix(path), []).append(path)
    for case_id, paths in groups.items():
        found = [m[2] for p in paths if suffixed and (m := CHANNEL.match(strip_suffix(p)))]
        if len(paths) > 1 and found != [f"{i:04d}" for i in range(len(paths))]:
            names = ", ".join(p.name for p in paths)
            raise DataError(
                f"{paths[0].parent}: case {case_id} has the files {names}. "
                "Channels are numbered _0000, _0001, ... without gaps, one file each."
            )
    return {case_id: tuple(paths) for case_id, paths in groups.items()}


def paired(
    root: Path, image_folder: str, label_folder: str, split: Role, suffixed: bool
) -> list[Case]:
    """Cases of an image folder, with the label file of the same name where there is one."""
    images = group_channels(image_files(root / image_folder), suffixed)
    labels = {strip_suffix(p): p for p in image_files(root / label_folder)}
    if lonely := [path for stem, path in labels.items() if stem not in images]:
        raise DataError(
            f"{lonely[0]}: no image in {image_folder} belongs to this label"
            f"{f' (and {len(lonely) - 1} more)' if len(lonely) > 1 else ''}. "
            "Image and label must have the same name, but for the channel number _0000."
        )
    return [Case(i, files, labels.get(i), split, i) for i, files in images.items()]


def unlabeled(root: Path, suffixed: bool) -> list[Case]:
    """The cases of the folder imagesUn."""
    groups = group_channels(image_files(root / "imagesUn"), suffixed)
    return [Case(case_id, paths, None, "train", case_id) for case_id, paths in groups.items()]
