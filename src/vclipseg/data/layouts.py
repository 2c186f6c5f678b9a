"""The folder layouts a data set may come in, each turned into the same list of cases."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vclipseg.data.cases import (
    CHANNEL,
    Case,
    Listing,
    Role,
    hidden,
    named_images,
    named_labels,
    paired,
    read_json,
    unlabeled,
)
from vclipseg.data.described import list_decathlon, list_nnunet
from vclipseg.data.dicom_cases import list_dicom, with_dicom_facts
from vclipseg.data.dicom_tree import has_dicom
from vclipseg.errors import DataError, UsageError

LAYOUTS_HELP = (
    "Known layouts are: dataset.json with imagesTr and labelsTr (nnU-Net, Medical Segmentation "
    "Decathlon), folders images and labels, a CSV with the columns case_id,image,label, the "
    "HDF5 files <id>/mri_norm2.h5, and DICOM files in any folders."
)
LA_FILE = "mri_norm2.h5"


def list_cases(path: Path) -> Listing:
    """Recognize the layout of a folder (or CSV file) and list its cases.

    Of DICOM series the headers are read: which belong to one patient, and what modality they are of.

    Raises:
        UsageError: There is no such path, or no known layout in it.
        DataError: The layout is broken; the message names the file.
    """
    return with_dicom_facts(_list(path))


def _list(path: Path) -> Listing:
    if not path.exists():
        raise UsageError(f"{path}: there is no such folder. Name the folder of a data set.")
    if path.is_file() and path.name == "dataset.json":
        path = path.parent
    if path.is_file():
        return _csv(path)
    if (path / "dataset.json").is_file():
        description = read_json(path / "dataset.json")
        decathlon = "training" in description and "channel_names" not in description
        return (list_decathlon if decathlon else list_nnunet)(path, description)
    for found, read in _without_description(path):
        if found:
            return read(path)
    raise UsageError(f"{path}: no data set found here. {LAYOUTS_HELP}")


def _without_description(
    root: Path,
) -> Iterable[tuple[bool, Callable[[Path], Listing]]]:
    tables = sorted(p for p in root.glob("*.csv") if not hidden(p))
    listings = [p for p in tables if set(_first_line(p)) >= _COLUMNS]
    yield len(listings) == 1, lambda _: _csv(listings[0])
    yield any((root / name).is_dir() for name in ("images", "imagesTr")), _folders
    yield bool(_la_files(root)), _la_h5
    yield has_dicom(root), list_dicom
    yield len(tables) == 1, lambda _: _csv(tables[0])  # which says what is wrong with it


# ---- folders ---------------------------------------------------------------------------


def _folders(root: Path) -> Listing:
    """Folders images + labels, optional imagesTs + labelsTs and imagesUn; matched by name."""
    images, labels = (
        ("images", "labels") if (root / "images").is_dir() else ("imagesTr", "labelsTr")
    )
    stems = {name for name, _ in named_images(root / images)}
    annotated = {name for name, _ in named_labels(root / labels)}
    suffixed = not stems & annotated and all(CHANNEL.match(s) for s in stems)
    cases = paired(root, images, labels, "train", suffixed)
    cases += unlabeled(root, suffixed)
    cases += paired(root, "imagesTs", "labelsTs", "test", suffixed)
    return Listing(root=root, layout="folders", name=root.resolve().name, cases=tuple(cases))


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
    by_role: dict[Role, list[str]] = {"train": train, "test": test or []}
    for split, ids in by_role.items():
        for case_id in ids:
            if case_id not in files:
                raise DataError(f"{base}: {split}.list names {case_id}, which is not there.")
            cases.append(Case(case_id, (files[case_id],), files[case_id], split, case_id))
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

_COLUMNS = {"case_id", "image"}


def _first_line(file: Path) -> list[str]:
    """The columns of a CSV; archives come with tables of other things."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return next(csv.reader(stream), [])
    except (OSError, ValueError, csv.Error):
        return []


def _csv(file: Path) -> Listing:
    """Columns case_id, image, label; optional split, annotated_classes, subject, site."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: is not readable as CSV ({error}).") from error
    if not rows or not set(rows[0]) >= _COLUMNS:
        raise DataError(
            f"{file}: needs a first line with at least case_id,image,label and a line a case."
        )
    cases = tuple(_csv_case(file, number, row) for number, row in enumerate(rows, start=2))
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
    images = tuple(file.parent / p.strip() for p in value["image"].split(";") if p.strip())
    if not images or not value["case_id"]:
        raise DataError(f"{file}, line {line}: case_id and image must not be empty.")
    return Case(
        case_id=value["case_id"],
        images=images,
        label=file.parent / label if label else None,
        split="test" if split == "test" else "train",
        subject=value.get("subject") or value["case_id"],
    )
