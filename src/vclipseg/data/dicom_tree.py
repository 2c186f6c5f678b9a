"""DICOM as it comes from an archive: any files in any folders, told apart by the series they belong to.

A series is called by its folder or, where folder names are not enough, by its number too; never by a name
or number of the patient. What is no scan (overviews, screen shots, reports) is put aside with a note.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vclipseg.data.dicom_headers import (
    DicomFile,
    SeriesError,
    files_below,
    is_dicom,
    is_flat,
    read_file,
)
from vclipseg.data.findings import Problem
from vclipseg.data.formats import hidden


@dataclass(frozen=True)
class Series:
    """The slices of one scan.

    Attributes:
        path: stands for the series wherever an image is asked for: a folder that has no other, or one of
            its files.
        folder: the one that all its files are in or below.
        file: one of its files, for what is the same in all.
    """

    path: Path
    folder: Path
    file: DicomFile

    @property
    def stem(self) -> str:
        """What it is called where it lies: as its folder or, a file that is a scan of its own, as that."""
        alone = self.path.is_file() and len(self.file.frames) > 1
        return self.path.with_suffix("").name if alone else self.folder.resolve().name

    @property
    def digest(self) -> str:
        """Tells it apart from all others, and says nothing."""
        return hashlib.sha256(self.file.series.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Tree:
    """What is in a tree of folders.

    Attributes:
        series: the scans, in order of their paths.
        labels: the files of segmentations and structure sets.
        problems: what was put aside, and why.
    """

    series: tuple[Series, ...]
    labels: tuple[DicomFile, ...]
    problems: tuple[Problem, ...]


def scan_tree(root: Path) -> Tree:
    """Sort the DICOM files of a folder and of all in it.

    Raises:
        UsageError: There is no such folder.
    """
    return _sorted_out(root, files_below(root))


def has_dicom(folder: Path) -> bool:
    """Whether a tree has a DICOM file."""
    return folder.is_dir() and next(iter(files_below(folder)), None) is not None


def _sorted_out(root: Path, paths: Iterable[Path]) -> Tree:
    scans: dict[str, list[DicomFile]] = defaultdict(list)
    aside: dict[tuple[str, str], list[Path]] = defaultdict(list)
    labels, broken = [], []
    for path in paths:
        try:
            file = read_file(path)
        except SeriesError as error:
            broken.append((path, error))
            continue
        if file.kind == "image":
            scans[file.series].append(file)
        elif file.kind == "label":
            labels.append(file)
        else:
            aside[file.series, file.note].append(path)
    for uid in [uid for uid, files in scans.items() if is_flat(files)]:
        aside[uid, "single slice"] = [file.path for file in scans.pop(uid)]
    series = sorted(_located(root, scans), key=lambda s: s.path)
    problems = [_put_aside(note, files) for (_, note), files in aside.items()]
    problems += [_broken(path, error) for path, error in broken if not _beside(path, series)]
    return Tree(tuple(series), tuple(labels), tuple(problems))


def _located(root: Path, scans: dict[str, list[DicomFile]]) -> list[Series]:
    """Series with their paths: folders where a folder has one, else the first of its files."""
    below: dict[Path, set[str]] = defaultdict(set)  # folder -> the series in and below it
    for uid, files in scans.items():
        for place in {file.path.parent for file in files}:
            for folder in (place, *place.parents):
                below[folder].add(uid)
                if folder == root:
                    break
    located = []
    for files in scans.values():
        places = {file.path.parent for file in files}
        folder = Path(os.path.commonpath(places))
        alone = len(below[folder]) == 1 or len(places) > 1
        located.append(Series(folder if alone else files[0].path, folder, files[0]))
    return located


def _put_aside(note: str, files: Sequence[Path]) -> Problem:
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    message = f"{count} left aside, as no volume can be made of it: {note}."
    return Problem("dicom-skipped", "", files[0], message, "warning")


def _broken(path: Path, error: SeriesError) -> Problem:
    return Problem(error.code, "", path, str(error).removeprefix(f"{path}: "))


def _beside(path: Path, series: Sequence[Series]) -> bool:
    """Whether reading a series will say that a file beside its own cannot be read."""
    return any(
        path.is_relative_to(s.path) if s.path.is_dir() else path.parent == s.folder for s in series
    )


# ---- names and patients ------------------------------------------------------------------


def name_series(series: Sequence[Series], base: str | None = None) -> list[str]:
    """A name for each: its own (or `base`), then its number or a hash of its UID where that is not enough."""
    stems = [unrevealing(base or s.stem, s) for s in series]
    numbered = [_with_number(stem, s) for stem, s in zip(stems, series, strict=True)]
    stem_counts, counts = Counter(stems), Counter(numbered)
    names = []
    for stem, name, s in zip(stems, numbered, series, strict=True):
        if stem_counts[stem] == 1:
            name = stem
        elif counts[name] > 1 or s.file.number is None or stem_counts[name]:
            name = f"{stem}-{s.digest}"
        names.append(name)
    return names


def _with_number(stem: str, series: Series) -> str:
    return f"{stem}-{series.file.number}"


def unrevealing(name: str, series: Series) -> str:
    """A name that can be part of a file's, and does not say who the patient is."""
    if series.file.reveals(name):
        return f"series-{series.digest}"
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]+', "-", name).strip(" .") or f"series-{series.digest}"


def series_of(path: Path) -> Series | None:
    """The series that a path stands for; None if it is no DICOM."""
    if path.is_dir():
        found = scan_tree(path).series
        return replace(found[0], path=path) if found else None
    if not is_dicom(path):
        return None
    try:
        file = read_file(path)
    except SeriesError:
        return None
    return Series(path, path.parent, file) if file.kind == "image" else None


def group_patients(series: Sequence[Series | None], names: Sequence[str]) -> list[str]:
    """For each series the name of the first one of its patient; its own where there is no series.

    Where all studies have the same patient, as after a careless anonymization, that says nothing, and
    series of one study are taken to be of one patient.
    """
    known = {s.file.patient for s in series if s}
    studies = {s.file.study for s in series if s}
    useless = len(known) == 1 and len(studies) > 1
    first: dict[str, str] = {}
    subjects = []
    for one, name in zip(series, names, strict=True):
        patient = "" if one is None or useless else one.file.patient
        key = patient or (one.file.study if one else "")
        subjects.append(first.setdefault(key, name) if key else name)
    return subjects


# ---- folders of cases --------------------------------------------------------------------


def named_series(folder: Path) -> list[tuple[str, Series]]:
    """Name and series of all DICOM in a folder of images; each folder in it is a case of that name.

    A case's own folder may have any folders in it. Files that are in no folder are told apart by series.
    """
    found: list[tuple[str, Series]] = []
    for entry in _entries(folder):
        tree = scan_tree(entry)
        if len(tree.series) == 1:
            found.append((entry.name, replace(tree.series[0], path=entry)))
        else:
            found += zip(name_series(tree.series, entry.name), tree.series, strict=True)
    files = sorted(p for p in folder.iterdir() if _loose(p))
    loose = [replace(s, path=s.file.path) for s in _sorted_out(folder, files).series]
    return found + list(zip(name_series(loose), loose, strict=True))


def label_objects(folder: Path) -> list[tuple[str, DicomFile]]:
    """Name and file of every segmentation in a folder of labels: its own name, or that of its folder."""
    if not folder.is_dir():
        return []
    found = [(f.path.stem, f) for f in map(read_file, filter(_loose, sorted(folder.iterdir())))]
    for entry in _entries(folder):
        found += [(entry.name, read_file(path)) for path in files_below(entry)]
    return [(name, file) for name, file in found if file.kind == "label"]


def put_aside(folder: Path) -> tuple[Problem, ...]:
    """What a folder of images has that is no scan."""
    if not folder.is_dir():
        return ()
    tree = scan_tree(folder)
    message = "left aside, as it is a segmentation: put it into the folder of labels."
    lost = (Problem("dicom-skipped", "", f.path, message, "warning") for f in tree.labels)
    return (*tree.problems, *lost)


def _entries(folder: Path) -> list[Path]:
    """The folders in a folder that have DICOM in them."""
    return sorted(p for p in folder.iterdir() if not hidden(p) and has_dicom(p))


def _loose(path: Path) -> bool:
    return path.is_file() and is_dicom(path)
