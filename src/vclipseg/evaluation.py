"""Predictions against references: a row per case and class. Nothing is chosen here.

`metrics.py` says what an empty mask scores; `scores.py` what is made of the rows; `compare.py` how
two runs are compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg import metrics
from vclipseg.data.datasets import Dataset
from vclipseg.data.mask_pairs import MaskPairs, open_masks
from vclipseg.data.volume import Volume, reorient, write
from vclipseg.errors import DataError
from vclipseg.scores import CaseScore, EvaluateSettings, read_scores, summarize, write_scores

__all__ = [
    "CaseScore",
    "EvaluateSettings",
    "evaluate",
    "evaluate_folder",
    "on_grid_of",
    "read_scores",
    "score_case",
    "summarize",
    "write_scores",
]

Progress = Callable[[int, int, str], None]

OFF_GRID = 0.1  # how far corners may be apart, in voxels: text headers and float32 round


def evaluate(
    predict_mask: Callable[[Volume], Volume],
    dataset: Dataset,
    case_ids: Sequence[str],
    settings: EvaluateSettings | None = None,
    on_progress: Progress | None = None,
    *,
    save_to: Path | None = None,
    workers: int = 1,
) -> list[CaseScore]:
    """Predict cases and score them on their own grid.

    Args:
        predict_mask: image (C, X, Y, Z) -> class indices (X, Y, Z) on the image's grid.
        dataset: where images and references are.
        case_ids: cases that have a reference.
        settings: how to score.
        on_progress: called with (cases done, cases, case id) as each case is scored.
        save_to: folder for the predicted masks, `<case_id>.nii.gz`.
        workers: threads that score while the next case is predicted.

    Returns:
        For each case and foreground class a row as predicted and one of its largest component.

    Raises:
        DataError: a prediction does not lie on its reference's grid, or holds an unknown class.
    """
    settings = settings or EvaluateSettings()
    pending: deque[tuple[str, Future[list[CaseScore]]]] = deque()
    scores: list[CaseScore] = []
    done = 0

    def collect() -> None:
        nonlocal done
        case_id, future = pending.popleft()
        scores.extend(future.result())
        done += 1
        if on_progress:
            on_progress(done, len(case_ids), case_id)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for case_id in case_ids:
            case = dataset.case(case_id)
            reference, prediction = dataset.labels(case), predict_mask(dataset.image(case))
            if save_to is not None:
                write(prediction, save_to / f"{case_id}.nii.gz", like=case.images[0])
            masks = reference, prediction, dataset.class_names
            pending.append((case_id, pool.submit(score_case, case_id, *masks, settings)))
            if len(pending) > workers:  # no more masks in memory than are worked on
                collect()
        while pending:
            collect()
    return scores


def evaluate_folder(
    predictions: Path,
    references: Path,
    class_names: Sequence[str],
    settings: EvaluateSettings | None = None,
    on_progress: Progress | None = None,
    *,
    label_values: Sequence[int] | None = None,
) -> list[CaseScore]:
    """Score a folder of masks against a folder of references, matched by file name.

    Both may hold DICOM objects (SEG, RTSTRUCT), whose segments are named as the classes.

    Args:
        predictions: masks of any readable format; those without a reference are not looked at.
        references: masks of any readable format. Every one must have a prediction.
        class_names: names by class index, background first.
        settings: how to score.
        on_progress: called with (cases done, cases, case id).
        label_values: the stored value of each class, when it is not its index; in both folders.

    Raises:
        UsageError: a folder is missing or holds no masks.
        DataError: a prediction is missing or on another grid, a value or segment names no class, or an
            RTSTRUCT has neither a volume nor its series to be read on.
    """
    settings = settings or EvaluateSettings()
    folders = (Path(references), Path(predictions))
    pairs = MaskPairs(*(open_masks(folder, class_names, label_values) for folder in folders))
    scores: list[CaseScore] = []
    for done, case_id in enumerate(pairs.case_ids, start=1):
        scores += score_case(case_id, *pairs.read(case_id), class_names, settings)
        if on_progress:
            on_progress(done, len(pairs.case_ids), case_id)
    return scores


def score_case(
    case_id: str,
    reference: Volume,
    prediction: Volume,
    class_names: Sequence[str],
    settings: EvaluateSettings,
) -> list[CaseScore]:
    """Score one predicted mask: for each foreground class a row with `lcc` 0 and one with 1.

    Args:
        case_id: whose masks these are, for the rows and for errors.
        reference: class indices (X, Y, Z).
        prediction: class indices (X, Y, Z) on the same grid; its axes may be turned or flipped.
        class_names: names by class index, background first.
        settings: how to score.

    Raises:
        DataError: the two are not on one grid, or the prediction holds an unknown class.
    """
    prediction = on_grid_of(reference, prediction, case_id)
    low, high = prediction.array.min(), prediction.array.max()
    if low < 0 or high >= len(class_names):
        raise DataError(
            f"case {case_id}: the predicted mask holds values {low} to {high}, but the classes are "
            f"0 to {len(class_names) - 1} ({', '.join(class_names)}). Score it with the classes "
            "it was predicted with."
        )
    scores: list[CaseScore] = []
    for class_id, class_name in enumerate(class_names[1:], start=1):
        of_class = reference.array == class_id, prediction.array == class_id
        scores += _score_class(case_id, class_id, class_name, *of_class, reference, settings)
    return scores


def on_grid_of(reference: Volume, prediction: Volume, case_id: str) -> Volume:
    """The prediction with its axes in the reference's order.

    Raises:
        DataError: its shape differs, or a corner lies more than `OFF_GRID` voxels off.
    """
    if prediction.orientation != reference.orientation:
        prediction = reorient(prediction, reference.orientation)
    if prediction.shape != reference.shape:
        raise DataError(
            f"case {case_id}: the prediction has {_times(prediction.shape)} voxels of "
            f"{_times(prediction.spacing)} mm, the reference {_times(reference.shape)} of "
            f"{_times(reference.spacing)} mm. Resample the prediction to the reference's grid."
        )
    gap_mm = _corner_gap_mm(reference, prediction)
    if not gap_mm <= OFF_GRID * min(reference.spacing):
        raise DataError(
            f"case {case_id}: the prediction lies up to {gap_mm:.3g} mm away from the reference. "
            "Write it with the affine of the image it was made from."
        )
    return prediction


def _score_class(
    case_id: str,
    class_id: int,
    class_name: str,
    reference: metrics.Mask,
    prediction: metrics.Mask,
    grid: Volume,
    settings: EvaluateSettings,
) -> list[CaseScore]:
    largest = metrics.largest_component(prediction)
    plain = metrics.score(reference, prediction, grid.spacing, settings.nsd_tolerance_mm)
    if np.array_equal(largest, prediction):  # one piece or none: nothing to measure again
        filtered = plain
    else:
        filtered = metrics.score(reference, largest, grid.spacing, settings.nsd_tolerance_mm)
    rows: list[tuple[int, metrics.Mask, dict[str, Any]]]
    rows = [(0, prediction, plain), (1, largest, filtered)]
    return [
        CaseScore(case_id, class_id, class_name, lcc, **values, counts=_counts(reference, mask))
        for lcc, mask, values in rows
    ]


def _counts(reference: metrics.Mask, prediction: metrics.Mask) -> tuple[int, int, int, int]:
    """Voxels: true positive, false positive, false negative, true negative."""
    tp = int(np.count_nonzero(reference & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(reference)) - tp
    return tp, fp, fn, reference.size - tp - fp - fn


def _corner_gap_mm(first: Volume, second: Volume) -> float:
    """The largest distance between the same corner of two grids of one shape."""
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in first.shape))])
    return float(np.linalg.norm((corners @ (first.affine - second.affine).T)[:, :3], axis=1).max())


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
