"""The folder layouts a data set may come in, each turned into the same list of cases."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vclipseg.data.cases import (
    CHANNEL,
    Case,
    Listing,
    Role,
    group_channels,
    hidden,
    image_files,
    paired,
    read_json,
)
from vclipseg.data.formats import image_suffix, strip_suffix
from vclipseg.errors import DataError, UsageError

LAYOUTS_HELP = (
    "Known layouts are: dataset.json with imagesTr and labelsTr (nnU-Net, Medical Segmentation "
    "Decathlon), folders images and labels, a CSV with the columns case_id,image,label, and the "
    "HDF5 files <id>/mri_norm2.h5."
)
LA_FILE = "mri_norm2.h5"


def list_cases(path: Path) -> Listing:
    """Recognize the layout of a folder (or CSV file) and list its cases.

    Raises:
        UsageError: There is no such path, or no known layout in it.
        DataError: The layout is broken; the message names the file.
    """
    if not path.exists():
        raise UsageError(
            f"{path}: there is no such folder. Name the folder of a data set."
        )
    if path.is_file() and path.name == "dataset.json":
        path = path.parent
    if path.is_file():
        return _csv(path)
    if (path / "dataset.json").is_file():
        description = read_json(path / "dataset.json")
        decathlon = "training" in description and "channel_names" not in description
        return (_decathlon if decathlon else _nnunet)(path, description)
    for found, read in _without_description(path):
        if found:
            return read(path)
    raise UsageError(f"{path}: no data set found here. {LAYOUTS_HELP}")


def _without_description(
    root: Path,
) -> Iterable[tuple[bool, Callable[[Path], Listing]]]:
    tables = sorted(p for p in root.glob("*.csv") if not hidden(p))
    yield len(tables) == 1, lambda _: _csv(tables[0])
    yield any((root / name).is_dir() for name in ("images", "imagesTr")), _folders
    yield bool(_la_files(root)), _la_h5


# ---- nnU-Net ---------------------------------------------------------------------------


def _nnunet(root: Path, description: dict[str, Any]) -> Listing:
    """nnU-Net v2 (and v1): imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json."""
    if listed := description.get("dataset"):
        cases = [
            _listed_case(root, case_id, entry) for case_id, entry in listed.items()
        ]
        known = {c.case_id for c in cases}
    else:
        cases = paired(root, "imagesTr", "labelsTr", "train", suffixed=True)
        known = set()
    cases += _unlabeled(root, description, known, suffixed=True)
    cases += paired(root, "imagesTs", "labelsTs", "test", suffixed=True)
    return Listing(
        root=root,
        layout="nnunet",
        name=str(description.get("name") or root.resolve().name),
        cases=tuple(cases),
        channel_names=_channel_names(description),
        labels=_class_values(description, root / "dataset.json"),
    )


def _listed_case(root: Path, case_id: str, entry: Mapping[str, Any]) -> Case:
    """A case of nnU-Net's explicit listing: paths relative to the folder, variables expanded."""
    images = tuple(root / os.path.expandvars(p) for p in entry["images"])
    label = entry.get("label")
    return Case(
        case_id,
        images,
        root / os.path.expandvars(label) if label else None,
        "train",
        case_id,
    )


def _channel_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    names = description.get("channel_names") or description.get("modality") or {}
    if not isinstance(names, Mapping):
        return tuple(str(n) for n in ([names] if isinstance(names, str) else names))
    return tuple(str(names[k]) for k in sorted(names, key=int))


def _class_values(description: Mapping[str, Any], file: Path) -> dict[str, int]:
    """Class name -> stored value, from name -> value (v2) or value -> name (v1, Decathlon)."""
    labels = description.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(
            f'{file}: "labels" is missing. Add {{"background": 0, "liver": 1, ...}}.'
        )
    if all(
        str(key).isdigit() and isinstance(name, str) for key, name in labels.items()
    ):
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


# ---- Medical Segmentation Decathlon ----------------------------------------------------


def _decathlon(root: Path, description: dict[str, Any]) -> Listing:
    """Lists `training` and `test`; 4-D files with channels last; also MONAI's `testing`."""
    cases = [
        _entry(root, e, "train")
        for e in description["training"]
        if not hidden(_image(e))
    ]
    cases += _unlabeled(root, description, {c.case_id for c in cases})
    tests = description.get("test") or description.get("testing") or []
    cases += [_entry(root, e, "test") for e in tests if not hidden(_image(e))]
    return Listing(
        root=root,
        layout="decathlon",
        name=str(description.get("name") or root.resolve().name),
        cases=tuple(cases),
        channel_names=_channel_names(description),
        labels=_class_values(description, root / "dataset.json"),
    )


def _image(entry: str | Mapping[str, Any]) -> Path:
    image = entry if isinstance(entry, str) else entry["image"]
    return Path(image if isinstance(image, str) else image[0])


def _entry(root: Path, entry: str | Mapping[str, Any], split: Role) -> Case:
    """A case of a list: a path, or `{"image": path or paths, "label": path}`."""
    image = entry if isinstance(entry, str) else entry["image"]
    paths = [root / p for p in ([image] if isinstance(image, str) else image)]
    case_id = strip_suffix(paths[0])
    if not paths[0].exists():  # nnU-Net v1 lists CASE.nii.gz for CASE_0000.nii.gz
        pattern = f"{case_id}_[0-9][0-9][0-9][0-9]{image_suffix(paths[0])}"
        paths = sorted(paths[0].parent.glob(pattern)) or paths
    elif match := CHANNEL.match(case_id):
        case_id = match[1] if len(paths) > 1 else case_id
    label = None if isinstance(entry, str) else entry.get("label")
    if label:
        label_path = root / label
    else:
        label_path = root / "labelsTs" / paths[0].name
        label_path = label_path if split == "test" and label_path.is_file() else None
    return Case(case_id, tuple(paths), label_path, split, case_id)


# ---- folders ---------------------------------------------------------------------------


def _folders(root: Path) -> Listing:
    """Folders images + labels, optional imagesTs + labelsTs and imagesUn; matched by name."""
    images, labels = (
        ("images", "labels") if (root / "images").is_dir() else ("imagesTr", "labelsTr")
    )
    stems = {strip_suffix(p) for p in image_files(root / images)}
    annotated = {strip_suffix(p) for p in image_files(root / labels)}
    suffixed = not stems & annotated and all(CHANNEL.match(s) for s in stems)
    cases = paired(root, images, labels, "train", suffixed)
    cases += _unlabeled(root, {}, set(), suffixed)
    cases += paired(root, "imagesTs", "labelsTs", "test", suffixed)
    return Listing(
        root=root, layout="folders", name=root.resolve().name, cases=tuple(cases)
    )


def _unlabeled(
    root: Path, description: Mapping[str, Any], known: set[str], suffixed: bool = False
) -> list[Case]:
    """Cases of the folder imagesUn and of the list "unlabeled"; those listed twice once."""
    files = image_files(root / "imagesUn")
    if (
        not suffixed
    ):  # one naming for the folder: channel numbers, if all files carry one
        suffixed = bool(files) and all(strip_suffix(p).endswith("_0000") for p in files)
    cases = [
        Case(i, paths, None, "train", i)
        for i, paths in group_channels(files, suffixed).items()
    ]
    seen = {path.resolve() for case in cases for path in case.images}
    for entry in description.get("unlabeled") or []:
        case = _entry(root, entry, "train")
        if not {p.resolve() for p in case.images} <= seen and case.case_id not in known:
            match = CHANNEL.match(case.case_id) if suffixed else None
            case_id = match[1] if match else case.case_id
            cases.append(Case(case_id, case.images, None, "train", case_id))
    return cases


# ---- the HDF5 files of the left atrium literature --------------------------------------


def _la_files(root: Path) -> list[Path]:
    return sorted(root.glob(f"*/{LA_FILE}")) or sorted(root.glob(f"*/*/{LA_FILE}"))


def _la_h5(root: Path) -> Listing:
    """<id>/mri_norm2.h5 with train.list and test.list beside the ids or a folder up."""
    files = {p.parent.name: p for p in _la_files(root)}
    base = next(iter(files.values())).parent.parent
    places = [root, base, base.parent]
    train, test = (_id_list(places, f"{role}.list") for role in ("train", "test"))
    if train is None:
        train = [i for i in files if i not in (test or [])]
    cases = []
    for split, ids in (("train", train), ("test", test or [])):
        for case_id in ids:
            if case_id not in files:
                raise DataError(
                    f"{base}: {split}.list names {case_id}, which is not there."
                )
            cases.append(
                Case(case_id, (files[case_id],), files[case_id], split, case_id)
            )
    return Listing(
        root=root,
        layout="la_h5",
        name=root.resolve().name,
        cases=tuple(cases),
        channel_names=("MRI",),
        labels={"background": 0, "left atrium": 1},
    )


def _id_list(places: Sequence[Path], name: str) -> list[str] | None:
    file = next((p / name for p in places if (p / name).is_file()), None)
    return file.read_text(encoding="utf-8").split() if file else None


# ---- CSV -------------------------------------------------------------------------------


def _csv(file: Path) -> Listing:
    """Columns case_id, image, label; optional split, annotated_classes, subject, site."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: is not readable as CSV ({error}).") from error
    if not rows or not {"case_id", "image"} <= set(rows[0]):
        raise DataError(
            f"{file}: needs a first line with at least case_id,image,label and a line a case."
        )
    cases = tuple(
        _csv_case(file, number, row) for number, row in enumerate(rows, start=2)
    )
    return Listing(root=file.parent, layout="csv", name=file.stem, cases=cases)


def _csv_case(file: Path, line: int, row: Mapping[str | None, str | None]) -> Case:
    value = {str(key): (text or "").strip() for key, text in row.items() if key}
    split = value.get("split") or "train"
    if split not in ("train", "test", "unlabeled"):
        raise DataError(
            f'{file}, line {line}: the split is "{split}"; write train, test or unlabeled.'
        )
    label = value.get("label") if split != "unlabeled" else None
    if value.get("annotated_classes") and label:
        raise DataError(
            f"{file}, line {line}: cases in which only some classes are annotated are not "
            "supported yet. Annotate all classes, or leave the label empty."
        )
    images = tuple(
        file.parent / p.strip() for p in value["image"].split(";") if p.strip()
    )
    if not images or not value["case_id"]:
        raise DataError(f"{file}, line {line}: case_id and image must not be empty.")
    return Case(
        case_id=value["case_id"],
        images=images,
        label=file.parent / label if label else None,
        split="test" if split == "test" else "train",
        subject=value.get("subject") or value["case_id"],
    )
