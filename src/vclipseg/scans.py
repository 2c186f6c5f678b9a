"""Scans in, masks out: what `vclipseg predict` does with files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vclipseg.console import Console
from vclipseg.data.cases import image_files
from vclipseg.data.formats import strip_suffix
from vclipseg.data.volume import Volume, read_image, with_values, write
from vclipseg.errors import UsageError
from vclipseg.inference import Predictor

CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True)
class Scan:
    """One case to predict: a file a channel, or one file with all of them."""

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
            raise UsageError(f"{path}: no NIfTI, NRRD or MHA image in this folder")
        for file in files:
            if not file.is_file():
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
    scans = {strip_suffix(file) for file in files} | {_case_name(file, 10_000) for file in files}
    outputs = {f"{scan}{ending}" for scan in scans for ending in ("_seg", "_seg_probs")}
    return [file for file in files if strip_suffix(file) not in outputs]


def _case_name(file: Path, channels: int) -> str:
    """The file's name without a channel number; numbers that no channel has belong to the name."""
    stem = strip_suffix(file)
    number = CHANNEL.search(stem)
    return stem[: number.start()] if number and int(number[1]) < channels else stem


def mask_path(scan: Scan, output: Path | None, several: bool) -> Path:
    """Where a scan's mask goes: a given file, a folder, or beside the scan as NAME_seg.nii.gz."""
    if output is None:
        return scan.files[0].parent / f"{scan.name}_seg.nii.gz"
    if output.name != strip_suffix(output) and not output.is_dir():
        if several:
            raise UsageError(f"{output}: one file for several scans; give a folder with -o")
        return output
    return output / f"{scan.name}.nii.gz"


def _probs_path(mask: Path) -> Path:
    return mask.with_name(f"{strip_suffix(mask)}_probs.nii.gz")


def predict_scans(
    predictor: Predictor,
    inputs: Sequence[Path],
    output: Path | None,
    console: Console,
    *,
    overwrite: bool = False,
    probabilities: bool = False,
) -> list[Path]:
    """Predict every scan; masks hold the data set's own label values, on the scan's own grid.

    Returns:
        The files written.

    Raises:
        UsageError: a file is there already and `overwrite` is off; nothing is predicted then.
    """
    scans = find_scans(inputs, len(predictor.description["channel_names"]))
    targets = [mask_path(scan, output, len(scans) > 1) for scan in scans]
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
        for done, (scan, target) in enumerate(zip(scans, targets, strict=True), start=1):
            image = read_image(scan.files)
            target.parent.mkdir(parents=True, exist_ok=True)
            if probabilities:
                probs = predictor.probabilities(image)
                written.append(_probs_path(target))
                write(probs, written[-1])
                mask = probs.array.argmax(0)
            else:
                mask = predictor.predict(image).array
            write(Volume(with_values(mask, predictor.label_values), image.affine), target)
            written.append(target)
            advance(done, scan.name)
    return written
