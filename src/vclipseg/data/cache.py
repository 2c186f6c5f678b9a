"""Prepared cases on disk, keyed by the content of their files and by the plan.

A folder holds for each case an image, a record of how it was made and, for cases asked
for with labels, the labels. Every file is written whole or not at all, so that a build that
was stopped goes on where it was. Labels that nobody asked for are neither read nor written.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from vclipseg.data.cases import Case
from vclipseg.data.datasets import Dataset
from vclipseg.data.dicom_labels import is_object
from vclipseg.data.preprocess import Plan, Trace, prepare_image, prepare_labels
from vclipseg.data.splits import Split, hash_file
from vclipseg.errors import DataError, VclipsegError
from vclipseg.files import replacing, write_text

OnProgress = Callable[[int, int, str], None]

FORMAT = 1
"""Raised whenever prepared cases of an older version must not be used."""
_CHUNK = 64  # voxels a side: what a patch touches is decoded, the rest is not


@dataclass(frozen=True)
class _Files:
    """Where a prepared case is; `labels` is None if they were not asked for."""

    image: Path
    record: Path
    labels: Path | None

    def missing(self) -> bool:
        return not all(p.is_file() for p in (self.image, self.record, self.labels) if p)


@dataclass(frozen=True)
class PreparedCases:
    """Prepared cases, read from disk on demand."""

    files: Mapping[str, _Files]

    @property
    def case_ids(self) -> tuple[str, ...]:
        """All cases, in the order they were asked for."""
        return tuple(self.files)

    def image(self, case_id: str) -> np.ndarray:
        """The image, float32 `(C, X, Y, Z)`."""
        return _load(self._of(case_id).image)

    def labels(self, case_id: str) -> np.ndarray:
        """The class indices, uint8 `(X, Y, Z)`; `IGNORED` where a person left the class open.

        Raises:
            DataError: The case was prepared without labels.
        """
        path = self._of(case_id).labels
        if path is None:
            raise DataError(f"case {case_id} was prepared without labels; it is unlabeled here.")
        return _load(path)

    def trace(self, case_id: str) -> Trace:
        """How the case was prepared, to undo it."""
        record = json.loads(self._of(case_id).record.read_text(encoding="utf-8"))
        return Trace.from_json(record["trace"])

    def _of(self, case_id: str) -> _Files:
        if case_id not in self.files:
            raise DataError(f"case {case_id} is not among the prepared cases.")
        return self.files[case_id]


def training_cases(split: Split) -> dict[str, bool]:
    """What training may read of a split: `prepare`'s `with_labels` for it."""
    return dict.fromkeys(split.labeled, True) | dict.fromkeys(split.unlabeled, False)


def prepare(
    dataset: Dataset,
    with_labels: Mapping[str, bool],
    plan: Plan,
    cache_dir: str | Path,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> PreparedCases:
    """Prepare the cases that the cache does not hold yet.

    Args:
        dataset: Where the cases are read from.
        with_labels: Case id -> whether its labels are prepared too.
        plan: How they are prepared.
        cache_dir: The folder of prepared cases; made if it is missing.
        workers: Processes; 1 works in this one.
        on_progress: Called with cases done, cases to do and the id of each one done.

    Raises:
        DataError: A case cannot be prepared; the message names it.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    files = {
        case_id: _files(dataset, dataset.case(case_id), labels, plan, cache_dir)
        for case_id, labels in with_labels.items()
    }
    missing = [case_id for case_id, paths in files.items() if paths.missing()]
    jobs = [(dataset, dataset.case(i), plan, files[i]) for i in missing]
    build = _build_all(jobs) if workers <= 1 or len(jobs) <= 1 else _build_pooled(jobs, workers)
    for done, case_id in enumerate(build, start=1):
        if on_progress is not None:
            on_progress(done, len(jobs), case_id)
    return PreparedCases(files)


_Job = tuple[Dataset, Case, Plan, _Files]


def _files(dataset: Dataset, case: Case, labels: bool, plan: Plan, cache_dir: Path) -> _Files:
    """Paths that change with the content of the files and with the plan, but not its notes."""
    key = _digest(FORMAT, plan.model_dump(exclude={"notes"}), [hash_file(p) for p in case.images])
    stem = f"{case.case_id}.{key}"
    path = None
    if labels:
        path = cache_dir / f"{stem}.{_label_key(dataset, case, key)}.labels.b2nd"
    return _Files(cache_dir / f"{stem}.image.b2nd", cache_dir / f"{stem}.json", path)


def _label_key(dataset: Dataset, case: Case, key: str) -> str:
    """It changes with all that class indices are made of: names too, where labels have names."""
    label = case.training_label
    if label is None:
        raise DataError(f"{dataset.root}: case {case.case_id} has no label file.")
    content: list[object] = [key, hash_file(label), dataset.label_values]
    if dataset.by_name or is_object(label):
        content += [dataset.class_names, case.review.classes if case.review else None]
    return _digest(*content)


def _digest(*content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build_all(jobs: list[_Job]) -> Iterator[str]:
    for job in jobs:
        yield _build(job)


def _build_pooled(jobs: list[_Job], workers: int) -> Iterator[str]:
    """Build in processes that start afresh, as a forked torch may hang."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker) as pool:
        waiting = {pool.submit(_build, job): job[1].case_id for job in jobs}
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise VclipsegError(
                "A process that prepares cases was killed, most often for want of memory. "
                "What is done is kept: run again with fewer workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)


def _build(job: _Job) -> str:
    """Prepare one case; the image's record is written last."""
    dataset, case, plan, files = job
    try:
        image = dataset.image(case)
        prepared, trace = prepare_image(image, plan)
        if files.labels:
            _save(_labels(dataset, case, trace), files.labels)
        _save(prepared.array, files.image)
    except VclipsegError as error:
        raise type(error)(f"case {case.case_id}: {error}") from error
    except Exception as error:
        raise DataError(
            f"case {case.case_id} ({case.images[0]}): {type(error).__name__}: {error}"
        ) from error
    record = {
        "case_id": case.case_id,
        "plan": plan.model_dump(),
        "trace": trace.to_json(),
    }
    write_text(files.record, json.dumps(record) + "\n")
    return case.case_id


def _labels(dataset: Dataset, case: Case, trace: Trace) -> np.ndarray:
    labels = dataset.training_labels(case)
    try:
        return prepare_labels(labels, trace).array
    except DataError as error:
        raise DataError(f"{case.training_label}: {error}") from error


def _save(array: np.ndarray, path: Path) -> None:
    """Compress without loss."""
    chunks = [min(_CHUNK, n) for n in array.shape]
    contiguous: Any = np.ascontiguousarray(array)

    with replacing(path) as unfinished:
        blosc2.asarray(
            contiguous,
            urlpath=str(unfinished),
            mode="w",
            chunks=chunks,
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 3, "nthreads": 1},
        )


def _load(path: Path) -> np.ndarray:
    try:
        packed: Any = blosc2.open(str(path), mode="r")
        return packed[:]
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Delete it and prepare again."
        ) from error
