"""Data sets of DICOM: any tree of series as it comes from an archive, and what headers say of cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vclipseg.data.cases import Case, Listing
from vclipseg.data.dicom_headers import DicomFile
from vclipseg.data.dicom_labels import classes_of, referenced_series
from vclipseg.data.dicom_tree import (
    Series,
    group_patients,
    name_series,
    put_aside,
    scan_tree,
    series_of,
    unrevealing,
)
from vclipseg.data.findings import Problem
from vclipseg.data.formats import image_suffix

_IMAGE_FOLDERS = ("images", "imagesTr", "imagesUn", "imagesTs")


def list_dicom(root: Path) -> Listing:
    """Every series in a tree of folders is a case; what references it is its label."""
    tree = scan_tree(root)
    names = name_series(tree.series)
    labels, problems = _labels_by_series(tree.labels, tree.series)
    cases = [
        Case(name, (s.path,), labels.get(s.file.series), "train", name)
        for name, s in zip(names, tree.series, strict=True)
    ]
    return Listing(
        root=root,
        layout="dicom",
        name=root.resolve().name,
        cases=tuple(cases),
        problems=(*tree.problems, *problems),
    )


def _labels_by_series(
    objects: Sequence[DicomFile], series: Sequence[Series]
) -> tuple[dict[str, Path], list[Problem]]:
    """Series UID -> the object that references it, and those that cannot be used."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in objects:
        found[referenced_series(file.path)].append(file.path)
    known = {s.file.series for s in series}
    problems = []
    for uid, paths in list(found.items()):
        if uid not in known:
            message = "the series it is of is not here. Add that, or take the label away."
            problems += [Problem("label-without-image", "", path, message) for path in paths]
        elif len(paths) > 1:
            names = ", ".join(path.name for path in paths[1:])
            message = f"its series has other labels too: {names}. Keep one of them."
            problems.append(Problem("dicom-several-labels", "", paths[0], message))
    return {uid: paths[0] for uid, paths in found.items() if len(paths) == 1}, problems


def with_dicom_facts(listing: Listing) -> Listing:
    """A listing with what headers say: patients as subjects, modality as channel, segments as classes.

    What would tell by its name who the patient is gets another: cases, subjects and the data set.
    """
    series = [series_of(case.images[0]) for case in listing.cases]
    if not any(series):
        return listing
    cases = _with_subjects(listing.cases, series)
    modalities = {s.file.modality if s else "" for s in series}
    one = len(modalities) == 1 and all(len(case.images) == 1 for case in cases)
    labels = [c.label for c in cases if c.label and c.split == "train"]
    revealing = any(s.file.reveals(listing.name) for s in series if s)
    aside = () if listing.layout == "dicom" else _IMAGE_FOLDERS
    return replace(
        listing,
        name="dicom" if revealing else listing.name,
        cases=cases,
        channel_names=listing.channel_names or (tuple(modalities - {""}) if one else ()),
        labels=listing.labels or classes_of(labels),
        problems=(*listing.problems, *(p for f in aside for p in put_aside(listing.root / f))),
    )


def _with_subjects(cases: Sequence[Case], series: Sequence[Series | None]) -> tuple[Case, ...]:
    """Cases under names that may be shown; where nobody gave a subject, cases of one patient have one."""
    names = [
        unrevealing(case.case_id, s) if s else case.case_id
        for case, s in zip(cases, series, strict=True)
    ]
    first: dict[str, str] = {}
    for case, name in zip(cases, names, strict=True):
        first.setdefault(case.subject, name)
    found = group_patients(series, names)
    renamed = []
    for case, s, name, patient in zip(cases, series, names, found, strict=True):
        given = first[case.subject] if s and s.file.reveals(case.subject) else case.subject
        subject = patient if case.subject == case.case_id else given
        renamed.append(replace(case, case_id=name, subject=subject))
    return tuple(renamed)


def shown_label(case: Case) -> Path | None:
    """A label's path as a run folder may name it: not as the patient of its image."""
    series = series_of(case.images[0]) if case.label else None
    if case.label and series and series.file.reveals(str(case.label)):
        return Path(f"{case.case_id}{image_suffix(case.label) or case.label.suffix}")
    return case.label
