"""The public data set Pancreas-CT, prepared as the semi-supervised literature prepares it.

    Roth et al.: Data From Pancreas-CT. The Cancer Imaging Archive, 2016.
    doi:10.7937/K9/TCIA.2016.tNB1kqBU
    Wu et al.: Mutual consistency learning for semi-supervised medical image segmentation. Medical Image
    Analysis, 2022. arXiv:2109.09960 (whose lists of cases, size of voxels and cut these are)

DICOM series and label files become a folder in nnU-Net's layout: voxels of 1 mm (cubic B-spline, labels
nearest), HU as they are, 62 training and 20 test cases. What the literature does after that, a window and
a z-score, is the plan's to do: `prepare.intensity = "window_zscore"`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from vclipseg.data.cases import image_files
from vclipseg.data.dicom import dicom_files, read_series, series_folders
from vclipseg.data.flips import fit_label
from vclipseg.data.formats import strip_suffix
from vclipseg.data.importing import OnProgress, Record, claim, import_cases
from vclipseg.data.splits import hash_file
from vclipseg.data.volume import Volume, read_labels, write
from vclipseg.errors import DataError, UsageError
from vclipseg.files import write_text

CROPS = ("label", "none")


def _ids(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:04}" for number in numbers)


TRAIN = _ids(
    57, 18, 62, 31, 20, 17, 32, 79, 61, 64, 70, 19, 48, 76, 41, 52, 49, 71, 72, 34, 10, 15, 77, 80, 27, 47,
    22, 14, 68, 58, 7, 11, 24, 42, 82, 35, 12, 55, 75, 78, 16, 13, 53, 23, 56, 33, 38, 30, 81, 29, 36, 44, 2,
    45, 26, 65, 66, 43, 28, 63, 69, 3,
)  # fmt: skip
"""In the published order: the labeled cases are the first of it."""
TEST = _ids(1, 4, 5, 6, 8, 9, 21, 25, 37, 39, 40, 46, 50, 51, 54, 59, 60, 67, 73, 74)
SAME_SCAN = ("0002", "0025", "0070")
"""One scan, cut differently; the archive took the last two away in 2020."""
MARGIN, PATCH = 25, 96
"""Voxels kept beside the organ along X and Y, and the least that it is taken to measure there."""

FORMAT = 1
"""Raised whenever cases imported by an older version must not be kept."""
_NUMBER = re.compile(r"PANCREAS_?(\d{4})(?!\d)", re.IGNORECASE)
_LABEL = re.compile(r"label(\d{4})", re.IGNORECASE)


@dataclass(frozen=True)
class Imported:
    """What an import has made.

    Attributes:
        folder: the data set.
        cases: case id -> its record, in the order of the lists.
        kept: how many of them were there before.
        missing: case id -> why it could not be had.
        remarks: what every result on these data has to say of them.
    """

    folder: Path
    cases: dict[str, Record]
    kept: int
    missing: dict[str, str]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For a machine."""
        return {**vars(self), "folder": str(self.folder), "remarks": list(self.remarks)}

    def lines(self) -> list[str]:
        """For a person."""
        train, test = (sum(i in self.cases for i in ids) for ids in (TRAIN, TEST))
        labels = [record["label"] for record in self.cases.values()]
        turns = Counter((fit["flipped"] or "nothing", fit["by"]) for fit in labels)
        return [
            f"Pancreas-CT: {train} training and {test} test cases in {self.folder}"
            + (f", {self.kept} of them there already" if self.kept else ""),
            *(
                f"  labels turned along {axes}: {count} (by the {by})"
                for (axes, by), count in turns.most_common()
            ),
            *(f"  missing: {case_id}, {why}" for case_id, why in self.missing.items()),
            *self.remarks,
            f"next: vclipseg check {self.folder}",
        ]


@dataclass(frozen=True)
class PancreasJob:
    """A case to import."""

    case_id: str
    series: Path
    label: Path
    out: Path
    crop: str

    @property
    def files(self) -> tuple[Path, Path]:
        """Image and label."""
        part = "Ts" if self.case_id in TEST else "Tr"
        image = self.out / f"images{part}" / f"{self.case_id}_0000.nii.gz"
        return image, self.out / f"labels{part}" / f"{self.case_id}.nii.gz"

    def sources(self) -> list[str]:
        """Hashes of the files in no order, and what else decides."""
        slices = sorted(hash_file(path) for path in dicom_files(self.series))
        return [*slices, hash_file(self.label), self.crop, f"format {FORMAT}"]

    def make(self) -> Record:
        """Write image and label.

        Raises:
            DataError: A file cannot be read, or the label does not fit the image.
        """
        image = read_series(self.series)
        try:
            mask, fit = fit_label(read_labels(self.label), image)
        except DataError as error:
            text = str(error)
            raise DataError(text if str(self.label) in text else f"{self.label}: {text}") from error
        scan, reference, box = to_millimetres(image, mask, self.crop)
        for volume, path in zip((scan, reference), self.files, strict=True):
            write(volume, path)
        return {
            "shape": list(image.shape),
            "spacing_mm": [round(mm, 6) for mm in image.spacing],
            "label": fit.to_json(),
            "box": box,
            "organ_ml": float(reference.array.sum()) / 1000,
        }


def import_pancreas_ct(
    dicom: str | Path,
    labels: str | Path,
    out: str | Path,
    *,
    crop: str = "label",
    without_duplicates: bool = False,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> Imported:
    """Make a data set of what is there of Pancreas-CT; what is imported already is kept.

    Args:
        dicom: folder with the series, as PANCREAS_0001/<study>/<series>/*.dcm or in any folders below one
            of that name.
        labels: folder with label0001.nii.gz and so on.
        out: the data set; a new folder, or that of an earlier import.
        crop: "label" cuts along X and Y around the reference, as the literature does; "none" does not.
        without_duplicates: leave out the cases that are the scan of another one.
        workers: processes, each of which needs about 2 GB; 1 works in this one.
        on_progress: called with cases done, all cases and the id of the one just done.

    Raises:
        UsageError: a folder is missing, `out` holds something else, or there is no such crop.
        DataError: no case is there, or some cannot be imported; the others are then imported.
    """
    if crop not in CROPS:
        raise UsageError(f"--crop {crop}: there are {' and '.join(CROPS)}.")
    out = Path(out)
    wanted = [i for i in (*TRAIN, *TEST) if not (without_duplicates and i in SAME_SCAN[1:])]
    series, masks = _series_by_case(Path(dicom)), _labels_by_case(Path(labels))
    missing = {
        i: "no DICOM series" if i not in series else "no label file"
        for i in wanted
        if i not in series or i not in masks
    }
    jobs = [PancreasJob(i, series[i], masks[i], out, crop) for i in wanted if i not in missing]
    if not jobs:
        raise DataError(
            f"{dicom} and {labels}: have no case in common. Series are looked for in folders named "
            "PANCREAS_0001, labels as label0001.nii.gz."
        )
    claim(out, [job.case_id for job in jobs])
    cases, kept = import_cases(jobs, workers, on_progress)
    remarks = _remarks(cases, crop)
    _describe(out, cases, missing, remarks, crop)
    return Imported(out, cases, kept, missing, remarks)


# ---- what is there -----------------------------------------------------------------------


def _series_by_case(root: Path) -> dict[str, Path]:
    """Case id -> the folder of its series, by the number in its path."""
    return _unique(
        (found[1], folder)
        for folder in series_folders(root)
        if (found := _NUMBER.search(str(Path(root.resolve().name, folder.relative_to(root)))))
    )


def _labels_by_case(root: Path) -> dict[str, Path]:
    """Case id -> its label file."""
    if not root.is_dir():
        raise UsageError(f"{root}: there is no such folder. Name the one with label0001.nii.gz.")
    folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())]
    return _unique(
        (found[1], file)
        for folder in folders
        for file in image_files(folder)
        if (found := _LABEL.fullmatch(strip_suffix(file)))
    )


def _unique(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for case_id, path in pairs:
        if case_id in found:
            raise DataError(
                f"{path}: case {case_id} is in {found[case_id]} too. Leave one of the two."
            )
        found[case_id] = path
    return found


# ---- voxels ------------------------------------------------------------------------------


def to_millimetres(
    image: Volume, mask: np.ndarray, crop: str
) -> tuple[Volume, Volume, list[list[int]]]:
    """Resample to voxels of 1 mm, whose first one stays where it is, and cut.

    Args:
        image: `(1, X, Y, Z)` in HU.
        mask: bool `(X, Y, Z)` on the same grid.
        crop: what to cut by.

    Returns:
        Image, int16, and labels, uint8, on their grid; and first and past-the-last voxel of the cut along
        its axes, counted in voxels of 1 mm.
    """
    whole = [max(1, int(n * mm + 1e-3)) for n, mm in zip(image.shape, image.spacing, strict=True)]
    box = [[0, n] for n in whole]
    labels = _sampled(mask.astype(np.uint8), image.spacing, box, sitk.sitkNearestNeighbor)
    if crop == "label":
        box = crop_box(labels)
        labels = np.ascontiguousarray(labels[tuple(slice(*ends) for ends in box)])
    # the spline is of the whole image, wherever it is looked at
    array = _sampled(image.array[0], image.spacing, box, sitk.sitkBSpline)
    hu = np.rint(array).clip(-(2**15), 2**15 - 1).astype(np.int16)
    affine = image.affine.copy()
    affine[:3, :3] /= image.spacing
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in box]
    return Volume(hu[None], affine), Volume(labels, affine), box


def crop_box(labels: np.ndarray) -> list[list[int]]:
    """The literature's cut of labels `(X, Y, Z)`: along X and Y, and Z whole.

    `MARGIN` beside the organ, and more beside one that measures less than `PATCH`. As published, the
    upper end is one voxel nearer than the lower.
    """
    box = []
    for axis in (0, 1):
        hit = np.flatnonzero(labels.any(axis=(1 - axis, 2)))
        first, last = int(hit[0]), int(hit[-1])
        margin = MARGIN + max(PATCH - (last - first), 0) // 2
        box.append([max(first - margin, 0), min(last + margin, labels.shape[axis])])
    return [*box, [0, labels.shape[2]]]


def _sampled(
    array: np.ndarray, spacing: Sequence[float], box: Sequence[Sequence[int]], interpolator: int
) -> np.ndarray:
    """An array `(X, Y, Z)` at the whole millimetres of a box, from the first voxel's center."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(interpolator)
    resample.SetUseNearestNeighborExtrapolator(True)
    resample.SetSize([stop - start for start, stop in box])
    resample.SetOutputOrigin([float(start) for start, _ in box])
    resample.SetOutputSpacing((1.0, 1.0, 1.0))
    return sitk.GetArrayFromImage(resample.Execute(image)).T


# ---- description -------------------------------------------------------------------------


def _remarks(cases: dict[str, Record], crop: str) -> tuple[str, ...]:
    """What has to be said wherever results on these data are shown."""
    remarks = []
    if crop == "label":
        remarks.append(
            "Volumes were cut around the reference labels, as the literature does, those of test cases "
            "too: nothing here tells how a model would find the organ in a whole scan."
        )
    same = [case_id for case_id in SAME_SCAN if case_id in cases]
    if len(same) > 1:
        names = [f"{i} ({'test' if i in TEST else 'training'})" for i in same]
        remarks.append(
            f"Cases {', '.join(names)} are one scan, cut differently; an import --without-duplicates "
            "has it once."
        )
    return tuple(remarks)


def _describe(
    out: Path,
    cases: dict[str, Record],
    missing: dict[str, str],
    remarks: Sequence[str],
    crop: str,
) -> None:
    """Write splits.json and dataset.json; the second makes the folder a data set."""
    split = {
        role: [i for i in ids if i in cases] for role, ids in (("train", TRAIN), ("test", TEST))
    }
    write_text(out / "splits.json", json.dumps(split, indent=2) + "\n")
    description = {
        "name": "Pancreas-CT",
        "description": "Contrast-enhanced abdominal CT with the pancreas, 1 mm",
        "reference": "https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
        "licence": "CC BY 3.0",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "pancreas": 1},
        "numTraining": len(split["train"]),
        "file_ending": ".nii.gz",
        "remarks": list(remarks),
        "import": {"format": FORMAT, "crop": crop, "missing": missing},
    }
    write_text(out / "dataset.json", json.dumps(description, indent=2) + "\n")
