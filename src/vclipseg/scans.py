"""Scans in, masks out: what `vclipseg predict` does with files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vclipseg.console import Console
from vclipseg.data.cases import image_files
from vclipseg.data.dicom import dicom_files, read_series, series_folders
from vclipseg.data.dicom_codes import Codes, load_codes
from vclipseg.data.dicom_objects import SUFFIX, Writer, check_kind, dicom_writer
from vclipseg.data.formats import strip_suffix
from vclipseg.data.volume import Volume, read_image, with_values, write
from vclipseg.errors import UsageError
from vclipseg.inference import Predictor

CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True)
class Scan:
    """One case to predict: a file a channel, or one file with all of them; or the folder of a series."""

    name: str
    files: tuple[Path, ...]


def find_scans(inputs: Sequence[Path], channels: int) -> list[Scan]:
    """Files as they are, folders file by file; CASE_0000, CASE_0001 ... are one case's channels.

    Masks that an earlier prediction left beside the scans of a folder are not scans.

    Raises:
        UsageError: an input is missing, a folder holds no image, or a channel is missing.
    """
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in inputs:
        files = _scan_files(path) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{path}: no DICOM, NIfTI, NRRD or MHA image in this folder")
        for file in files:
            if not file.exists():
                raise UsageError(f"{file}: no such file")
            group = groups.setdefault((file.parent, _case_name(file, channels)), [])
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


def _scan_files(folder: Path) -> list[Path]:
    files = image_files(folder)
    if not files:
        return series_folders(folder)
    scans = {strip_suffix(file) for file in files} | {_case_name(file, 10_000) for file in files}
    outputs = {f"{scan}{ending}" for scan in scans for ending in ("_seg", "_seg_probs")}
    return [file for file in files if strip_suffix(file) not in outputs]


def _case_name(file: Path, channels: int) -> str:
    """The file's name without a channel number; numbers that no channel has belong to the name."""
    stem = strip_suffix(file)
    number = CHANNEL.search(stem)
    return stem[: number.start()] if number and int(number[1]) < channels else stem


def mask_path(scan: Scan, output: Path | None, several: bool, suffix: str = ".nii.gz") -> Path:
    """Where a scan's mask goes: a given file, a folder, or beside the scan as NAME_seg.nii.gz."""
    if output is None:
        return scan.files[0].parent / f"{scan.name}_seg{suffix}"
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
) -> list[Writer]:
    """What writes each scan's mask, of class indices."""
    if kind is None:
        if codes is not None:
            raise UsageError(f"{codes}: codes are for DICOM objects; ask for one with --dicom")
        return [_image_writer(predictor)] * len(scans)
    known: Codes = load_codes(codes, predictor.class_names) if codes else {}
    for scan in scans:
        if not scan.files[0].is_dir():
            raise UsageError(
                f"{scan.files[0]}: is no folder of a DICOM series, so that no DICOM object can be of it; "
                "write another format, such as -o mask.nii.gz"
            )
    method = made_by(predictor.description)
    return [
        dicom_writer(
            kind, dicom_files(scan.files[0]), predictor.class_names, method=method, codes=known
        )
        for scan in scans
    ]


def _image_writer(predictor: Predictor) -> Writer:
    def write_values(mask: Volume, path: Path) -> None:
        write(Volume(with_values(mask.array, predictor.label_values), mask.affine), path)

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
        UsageError: a file is there already and `overwrite` is off; nothing is predicted then.
    """
    kind = object_kind(dicom, output)
    scans = find_scans(inputs, len(predictor.description["channel_names"]))
    writers = _writers(scans, kind, codes, predictor)
    suffix = SUFFIX if kind else ".nii.gz"
    targets = [mask_path(scan, output, len(scans) > 1, suffix) for scan in scans]
    written_too = [_probs_path(target) for target in targets] if probabilities else []
    taken = [path for path in (*targets, *written_too) if path.exists()]
    if taken and not overwrite:
        raise UsageError(
            f"{taken[0]}: exists already"
            + (f" (and {len(taken) - 1} more)" if len(taken) > 1 else "")
            + "; give --overwrite, or another place with -o"
        )
    twice = {target for target in targets if targets.count(target) > 1}
    if twice:
        raise UsageError(f"{min(twice)}: two scans of the same name would be written there")
    written = []
    with console.bar("predict", len(scans)) as advance:
        for done, (scan, target, write_mask) in enumerate(
            zip(scans, targets, writers, strict=True), start=1
        ):
            image = _read(scan)
            target.parent.mkdir(parents=True, exist_ok=True)
            if probabilities:
                probs = predictor.probabilities(image)
                written.append(_probs_path(target))
                write(probs, written[-1])
                mask = probs.array.argmax(0)
            else:
                mask = predictor.predict(image).array
            write_mask(Volume(mask, image.affine), target)
            written.append(target)
            advance(done, scan.name)
    return written


def _read(scan: Scan) -> Volume:
    return read_series(scan.files[0]) if scan.files[0].is_dir() else read_image(scan.files)
