"""Data sets described by a dataset.json: nnU-Net's and the Medical Segmentation Decathlon's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vclipseg.data.cases import CHANNEL, Case, Listing, Role, hidden, paired, unlabeled
from vclipseg.data.formats import image_suffix, strip_suffix
from vclipseg.errors import DataError


def list_nnunet(root: Path, description: dict[str, Any]) -> Listing:
    """nnU-Net v2 (and v1): imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json."""
    if listed := description.get("dataset"):
        cases = [_listed_case(root, case_id, entry) for case_id, entry in listed.items()]
    else:
        cases = paired(root, "imagesTr", "labelsTr", "train", suffixed=True)
    cases += _unlabeled(root, description, suffixed=True)
    cases += paired(root, "imagesTs", "labelsTs", "test", suffixed=True)
    return Listing(
        root=root,
        layout="nnunet",
        name=str(description.get("name") or root.resolve().name),
        cases=tuple(cases),
        channel_names=_channel_names(description, root / "dataset.json"),
        labels=_class_values(description, root / "dataset.json"),
        remarks=_remarks(description, root / "dataset.json"),
    )


def _listed_case(root: Path, case_id: str, entry: Mapping[str, Any]) -> Case:
    """A case of nnU-Net's explicit listing: paths relative to the folder, variables expanded."""
    if not entry.get("images"):
        raise DataError(f'{root / "dataset.json"}: case {case_id} lists no "images".')
    images = tuple(root / os.path.expandvars(path) for path in entry["images"])
    label = root / os.path.expandvars(entry["label"]) if entry.get("label") else None
    return Case(case_id, images, label, "train", case_id)


def _channel_names(description: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    names = description.get("channel_names") or description.get("modality") or {}
    if not isinstance(names, Mapping):
        return tuple(str(n) for n in ([names] if isinstance(names, str) else names))
    if not all(str(key).isdigit() for key in names):
        raise DataError(f'{file}: "channel_names" must be {{"0": "T1", "1": "T2", ...}}.')
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _class_values(description: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Class name -> stored value, from name -> value (v2) or value -> name (v1, Decathlon)."""
    labels = description.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(f'{file}: "labels" is missing. Add {{"background": 0, "liver": 1, ...}}.')
    if all(str(key).isdigit() and isinstance(name, str) for key, name in labels.items()):
        labels = {name: int(key) for key, name in labels.items()}
    if "ignore" in labels:
        raise DataError(
            f'{file}: the label "ignore" is not supported yet. Annotate these voxels, or leave '
            'the case unlabeled by taking its label file away; then remove "ignore".'
        )
    for name, value in labels.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(
                f'{file}: the class "{name}" has the value {value!r}; regions of several values '
                "are not supported. Give each class one integer."
            )
    return {str(name): value for name, value in labels.items()}


def _remarks(description: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    remarks = description.get("remarks") or []
    if not isinstance(remarks, list) or not all(isinstance(text, str) for text in remarks):
        raise DataError(f'{file}: "remarks" must be a list of sentences, ["...", "..."].')
    return tuple(remarks)


# ---- Medical Segmentation Decathlon ----------------------------------------------------


def list_decathlon(root: Path, description: dict[str, Any]) -> Listing:
    """Lists `training` and `test`; 4-D files with channels last; also MONAI's `testing`."""
    cases = _entries(root, description["training"], "train")
    suffixed = any(strip_suffix(c.images[0]) != c.case_id for c in cases)
    cases += _unlabeled(root, description, suffixed)
    cases += _entries(root, description.get("test") or description.get("testing") or [], "test")
    return Listing(
        root=root,
        layout="decathlon",
        name=str(description.get("name") or root.resolve().name),
        cases=tuple(cases),
        channel_names=_channel_names(description, root / "dataset.json"),
        labels=_class_values(description, root / "dataset.json"),
        remarks=_remarks(description, root / "dataset.json"),
    )


def _paths(root: Path, entry: str | Mapping[str, Any]) -> list[Path]:
    """The image files of an entry: a path, or `{"image": path or paths}`."""
    image = entry.get("image") if isinstance(entry, Mapping) else entry
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{root / 'dataset.json'}: {json.dumps(entry)[:80]} is no case. "
            'Write a path or {"image": path, "label": path}.'
        )
    return [root / name for name in names]


def _entries(root: Path, entries: Iterable[str | Mapping[str, Any]], split: Role) -> list[Case]:
    """The cases of a list, without the hidden files that macOS leaves in archives."""
    return [_entry(root, e, split) for e in entries if not hidden(_paths(root, e)[0])]


def _entry(root: Path, entry: str | Mapping[str, Any], split: Role) -> Case:
    paths = _paths(root, entry)
    case_id, suffix = strip_suffix(paths[0]), image_suffix(paths[0])
    match = CHANNEL.match(case_id)
    if match and len(paths) > 1:
        case_id = match[1]
    if not paths[0].exists():  # nnU-Net v1 lists CASE.nii.gz for CASE_0000.nii.gz
        paths = sorted(paths[0].parent.glob(f"{case_id}_[0-9][0-9][0-9][0-9]{suffix}")) or paths
    label = entry.get("label") if isinstance(entry, Mapping) else None
    if not label and split == "test" and (root / f"labelsTs/{case_id}{suffix}").is_file():
        label = f"labelsTs/{case_id}{suffix}"
    return Case(case_id, tuple(paths), root / label if label else None, split, case_id)


def _unlabeled(root: Path, description: Mapping[str, Any], suffixed: bool) -> list[Case]:
    """Cases of the folder imagesUn and of the list "unlabeled"; those in both once."""
    cases = unlabeled(root, suffixed)
    seen = {path.resolve() for case in cases for path in case.images}
    for case in _entries(root, description.get("unlabeled") or [], "train"):
        if not {p.resolve() for p in case.images} <= seen:
            match = CHANNEL.match(case.case_id) if suffixed else None
            case_id = match[1] if match else case.case_id
            cases.append(Case(case_id, case.images, None, "train", case_id))
    return cases
