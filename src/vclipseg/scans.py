"""Scans in, masks out: what `vclipseg predict` does with files and folders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.console import Console
from vclipseg.data.cases import image_files
from vclipseg.data.dicom import series_files
from vclipseg.data.dicom_codes import Codes, load_codes
from vclipseg.data.dicom_objects import SUFFIX, Writer, check_kind, dicom_writer
from vclipseg.data.dicom_tree import Series, name_series, scan_tree
from vclipseg.data.formats import is_series, stored_files, strip_suffix
from vclipseg.data.volume import Volume, note_on_values, read_image, with_values, write
from vclipseg.errors import DataError, UsageError
from vclipseg.inference import Predictor

CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True)
class Scan:
    """One case to predict: a file a channel, or one file with all of them; a DICOM series by its path."""

    name: str
    files: tuple[Path, ...]


def find_scans(inputs: Sequence[Path], channels: int) -> list[Scan]:
    """Files as they are, folders file by file; CASE_0000, CASE_0001 ... are one case's channels.

    Of DICOM files, in folders or not, each series is a scan, called as its folder.

    Masks that an earlier prediction left beside the scans of a folder are not scans.

    Raises:
        UsageError: an input is missing, a folder holds no image, or a channel is missing.
    """
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in inputs:
        found = _named_files(path)
        if not found:
            raise UsageError(f"{path}: no DICOM, NIfTI, NRRD or MHA image in this folder")
        for name, file in found:
            if not file.exists():
                raise UsageError(f"{file}: no such file")
            group = groups.setdefault((file.parent, _case_name(name, channels)), [])
            if file not in group:
                group.append(file)
    scans = [Scan(name, tuple(sorted(files))) for (_, name), files in groups.items()]
    for scan in scans:
        if len(scan.files) not in (1, channels):
            raise UsageError(
                f"{scan.files[0].parent / scan.name}: found {len(scan.files)} channel files, but the "
                f"model reads {channels}; name them {scan.name}_0000 to {scan.name}_{channels - 1:04d}"
            )
    return scans


def _named_files(path: Path) -> list[tuple[str, Path]]:
    """Names and paths of the images of a folder, without masks; or of a file or the series that it is of."""
    if not path.is_dir():
        return [_file_of_series(path)] if is_series(path) else [(strip_suffix(path), path)]
    series = scan_tree(path).series
    found = list(zip(name_series(series), (s.path for s in series), strict=True))
    found += [(strip_suffix(file), file) for file in image_files(path)]
    scans = {name for name, _ in found} | {_case_name(name, 10_000) for name, _ in found}
    outputs = {f"{scan}{ending}" for scan in scans for ending in ("_seg", "_seg_probs")}
    return [(name, file) for name, file in found if name not in outputs]


def _file_of_series(path: Path) -> tuple[str, Path]:
    """A name for the series of a file and, whichever of its files that is, the same path."""
    files = sorted(series_files(path), key=lambda file: file.path)
    first = files[0].path
    return name_series([Series(first, first.parent, files[0])])[0], first


def _notes(inputs: Sequence[Path], scans: Sequence[Scan]) -> Iterator[str]:
    """What of folders of DICOM is left aside, and which scans have other names than their folders."""
    for path in filter(Path.is_dir, inputs):
        for problem in scan_tree(path).problems:
            yield f"{problem.file}: {problem.message}"
    for scan in scans:
        if scan.files[0].is_dir() and scan.name not in scan.files[0].resolve().name:
            yield f"{scan.files[0]}: called {scan.name}, as its name tells who the patient is"


def _case_name(stem: str, channels: int) -> str:
    """A file's name without a channel number; numbers that no channel has belong to the name."""
    number = CHANNEL.search(stem)
    return stem[: number.start()] if number and int(number[1]) < channels else stem


def mask_path(scan: Scan, output: Path | None, several: bool, suffix: str = ".nii.gz") -> Path:
    """Where a scan's mask goes: a given file, a folder, or beside the scan as NAME_seg.nii.gz."""
    if output is None:
        return scan.files[0].parent / f"{scan.name}_seg{suffix}"
    if output.is_file() and not _is_file(output):
        raise UsageError(f"{output}: is no image and no folder; name the mask {output}{suffix}")
    if _is_file(output):
        if several:
            raise UsageError(f"{output}: one file for several scans; give a folder with -o")
        return output
    return output / f"{scan.name}{suffix}"


def _is_file(output: Path) -> bool:
    """Whether a place to write to is meant to be a file."""
    named = output.name != strip_suffix(output) or output.suffix.lower() == SUFFIX
    return named and not output.is_dir()


def _probs_path(mask: Path) -> Path:
    return mask.with_name(f"{strip_suffix(mask).removesuffix(SUFFIX)}_probs.nii.gz")


def object_kind(dicom: str | None, output: Path | None) -> str | None:
    """The kind of DICOM object to write, as asked for or as the output is named; None: no DICOM.

    Raises:
        UsageError: there is no such kind, it cannot be written here, or the output is named otherwise.
    """
    file = output if output is not None and _is_file(output) else None
    named = file is not None and file.suffix.lower() == SUFFIX
    kind = dicom or ("seg" if named else None)
    if kind is not None:
        check_kind(kind)
        if file is not None and not named:
            raise UsageError(f"{file}: a DICOM object is named so: {strip_suffix(file)}{SUFFIX}")
    return kind


def _writers(
    scans: Sequence[Scan], kind: str | None, codes: Path | None, predictor: Predictor
) -> list[Writer | DataError]:
    """What writes each scan's mask, of class indices, or why none can."""
    if kind is None:
        if codes is not None:
            raise UsageError(f"{codes}: codes are for DICOM objects; ask for one with --dicom")
        return [_image_writer(predictor, scan.files[0]) for scan in scans]
    known: Codes = load_codes(codes, predictor.class_names) if codes else {}
    for scan in scans:
        if not is_series(scan.files[0]):
            raise UsageError(
                f"{scan.files[0]}: is no DICOM series, so that no DICOM object can be of it; "
                "write another format, such as -o mask.nii.gz"
            )
    return [_object_writer(predictor, scan, kind, known) for scan in scans]


def _object_writer(predictor: Predictor, scan: Scan, kind: str, codes: Codes) -> Writer | DataError:
    method = made_by(predictor.description)
    try:
        files = [file.path for file in series_files(scan.files[0])]
        return dicom_writer(kind, files, predictor.class_names, method=method, codes=codes)
    except DataError as error:
        return error


def _image_writer(predictor: Predictor, scan: Path) -> Writer:
    def write_values(mask: Volume, path: Path) -> None:
        values = with_values(mask.array, predictor.label_values)
        write(Volume(values, mask.affine), path, like=scan)

    return write_values


def made_by(description: dict[str, Any]) -> str:
    """A model in a few words, for what it makes."""
    return f"{description['method']['name']} ({description['preset']})"


def predict_scans(
    predictor: Predictor,
    inputs: Sequence[Path],
    output: Path | None,
    console: Console,
    *,
    overwrite: bool = False,
    probabilities: bool = False,
    dicom: str | None = None,
    codes: Path | None = None,
) -> list[Path]:
    """Predict every scan; masks hold the data set's own label values, on the scan's own grid.

    Masks of DICOM series may be DICOM objects: of the kind `dicom`, or a SEG where the output is named
    NAME.dcm; `codes` is a file of `dicom_codes`.

    Returns:
        The files written.

    Raises:
        UsageError: a file is there already and `overwrite` is off, or it is one of the scans; nothing is
            predicted then.
        DataError: scans could not be read or predicted; the others were all the same.
    """
    kind = object_kind(dicom, output)
    scans = find_scans(inputs, len(predictor.description["channel_names"]))
    writers = _writers(scans, kind, codes, predictor)
    suffix = SUFFIX if kind else ".nii.gz"
    for note in _notes(inputs, scans):
        console.note(note)
    targets = [mask_path(scan, output, len(scans) > 1, suffix) for scan in scans]
    written_too = [_probs_path(target) for target in targets] if probabilities else []
    taken = [path for path in (*targets, *written_too) if path.exists()]
    refuse_scans(taken, scans)
    if taken and not overwrite:
        raise UsageError(
            f"{taken[0]}: exists already"
            + (f" (and {len(taken) - 1} more)" if len(taken) > 1 else "")
            + "; give --overwrite, or another place with -o"
        )
    twice = {target for target in targets if targets.count(target) > 1}
    if twice:
        raise UsageError(f"{min(twice)}: two scans of the same name would be written there")
    written: list[Path] = []
    failed: list[DataError] = []
    found: list[tuple[str, Collection[int]]] = []
    with console.bar("predict", len(scans)) as advance:
        for done, (scan, target, writer) in enumerate(
            zip(scans, targets, writers, strict=True), start=1
        ):
            try:
                image = _read(scan, console)
                files, mask = _predict_scan(predictor, image, scan, target, writer, probabilities)
                written += files
                found.append((scan.name, np.unique(mask)))
            except DataError as error:
                if len(scans) > 1:
                    console.note(f"{scan.name}: not predicted: {error}")
                failed.append(error)
            advance(done, scan.name)
    for note in not_found(predictor.class_names, found):
        console.note(note)
    if failed:
        first = failed[0]
        if len(scans) == 1:
            raise first
        raise DataError(f"{len(failed)} of {len(scans)} scans were not predicted, first: {first}")
    return written


def not_found(
    class_names: Sequence[str], found: Sequence[tuple[str, Collection[int]]]
) -> Iterator[str]:
    """A line on each class, background aside, that masks lack.

    Args:
        class_names: of the model.
        found: each scan's name, and the class indices in its mask.
    """
    for index, name in enumerate(class_names[1:], start=1):
        lacking = [scan for scan, indices in found if index not in indices]
        if not lacking:
            continue
        line = (
            f"{name}: not found in {len(lacking)} of {len(found)} scan(s): {', '.join(lacking[:5])}"
        )
        line += f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        if len(lacking) == len(found):
            line += "; are they of the kind that the model was trained on?"
        yield line


def _read(scan: Scan, console: Console) -> Volume:
    """A scan's image, with a word on voxels that are no numbers."""
    image = read_image(scan.files)
    if note := note_on_values(image, scan.files[0]):
        console.note(f"{scan.name}: {note}")
    return image


def _predict_scan(
    predictor: Predictor,
    image: Volume,
    scan: Scan,
    target: Path,
    writer: Writer | DataError,
    probabilities: bool,
) -> tuple[list[Path], np.ndarray]:
    """Write a scan's mask and, if asked, its probabilities; returns the files and the class indices."""
    if isinstance(writer, DataError):
        raise writer
    target.parent.mkdir(parents=True, exist_ok=True)
    if not probabilities:
        mask = predictor.predict(image).array
        writer(Volume(mask, image.affine), target)
        return [target], mask
    probs = predictor.probabilities(image)
    write(probs, _probs_path(target), like=scan.files[0])
    mask = probs.array.argmax(0)
    writer(Volume(mask, image.affine), target)
    return [_probs_path(target), target], mask


def refuse_scans(taken: Sequence[Path], scans: Sequence[Scan]) -> None:
    """A mask never takes the place of a scan, whatever may be overwritten.

    Raises:
        UsageError: one of the files `taken` holds voxels of a scan.
    """
    if not taken:
        return
    stored = (part for scan in scans for file in scan.files for part in stored_files(file))
    own = {part.resolve() for part in stored}
    for path in taken:
        if path.resolve() in own:
            raise UsageError(
                f"{path}: is a scan to predict, and a mask would take its place; give another place "
                "with -o"
            )
