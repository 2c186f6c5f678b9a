"""Scans in, masks out: what `vclipseg predict` does with files and folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vclipseg.console import Console
from vclipseg.data.cases import image_files
from vclipseg.data.dicom import series_files
from vclipseg.data.dicom_tree import Series, name_series, scan_tree
from vclipseg.data.formats import is_series, strip_suffix
from vclipseg.data.volume import Volume, read_image, with_values, write
from vclipseg.errors import UsageError
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
    for note in _notes(inputs, scans):
        console.note(note)
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
