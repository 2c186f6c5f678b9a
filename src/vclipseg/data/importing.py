"""What importers of public data sets share: a folder of their own, and work that goes on where it stopped.

An importer makes a data set's files case by case and leaves a record of each in the folder `import`, last
and whole: a case with a record is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import SimpleITK as sitk

from vclipseg.errors import DataError, UsageError, VclipsegError
from vclipseg.files import write_text

OnProgress = Callable[[int, int, str], None]
Record = dict[str, Any]
RECORDS = "import"
"""Folder of the records, `<case_id>.json`."""


class Job(Protocol):
    """A case to import: what it is, and into which folder."""

    @property
    def case_id(self) -> str:
        """Names its files."""

    @property
    def out(self) -> Path:
        """The data set."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What is made of it."""

    def sources(self) -> list[str]:
        """Hashes of what it is made from, and whatever else decides what is made."""

    def make(self) -> Record:
        """Write the files; the record is what there is to say of them."""


J = TypeVar("J", bound=Job)


def claim(out: Path, case_ids: Sequence[str]) -> None:
    """Make a data set's folder, unless it holds anything but these cases of an earlier import.

    Raises:
        UsageError: It does.
    """
    records = out / RECORDS
    if out.exists() and not records.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists already. Name a new folder for the data set.")
    if others := sorted({p.stem for p in records.glob("*.json")} - set(case_ids)):
        raise UsageError(
            f"{out}: holds {', '.join(others)}, not among the cases to import. Name a new folder."
        )
    records.mkdir(parents=True, exist_ok=True)


def import_cases(
    jobs: Sequence[J], workers: int = 1, on_progress: OnProgress | None = None
) -> tuple[dict[str, Record], int]:
    """Import what is not there yet.

    Args:
        jobs: one a case.
        workers: processes; 1 works in this one.
        on_progress: called with cases done, all cases and the id of the one just done.

    Returns:
        Case id -> its record, in the order of the jobs, and how many were there before.

    Raises:
        DataError: Some could not be imported; all others are by then.
        UsageError: A case is there, but made from other sources.
    """
    attempts = _pooled(jobs, workers) if min(workers, len(jobs)) > 1 else map(_attempt, jobs)
    found: dict[str, Record | str] = {}
    kept = 0
    for done, (case_id, record, was_there) in enumerate(attempts, start=1):
        found[case_id] = record
        kept += was_there
        if on_progress:
            on_progress(done, len(jobs), case_id)
    if failed := [found[j.case_id] for j in jobs if isinstance(found[j.case_id], str)]:
        raise DataError(
            "\n".join(map(str, failed))
            + f"\n{len(failed)} of {len(jobs)} cases could not be imported, "
            "all others are. Mend these or take them away, and run it again."
        )
    return {j.case_id: r for j in jobs if isinstance(r := found[j.case_id], dict)}, kept


def _pooled(jobs: Sequence[J], workers: int) -> Iterator[tuple[str, Record | str, bool]]:
    """Work in processes that start afresh."""
    start = partial(sitk.ProcessObject.SetGlobalDefaultNumberOfThreads, 1)
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), start) as pool:
        try:
            for future in as_completed([pool.submit(_attempt, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise VclipsegError(
                "A process that imports cases was killed, most often for want of memory. What is "
                "done is kept: run again with fewer workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _attempt(job: Job) -> tuple[str, Record | str, bool]:
    """Case id, its record or why there is none, and whether it was there."""
    try:
        return job.case_id, *_import(job)
    except UsageError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, VclipsegError) else f"{type(error).__name__}: "
        return job.case_id, f"case {job.case_id}: {kind}{error}", False


def _import(job: Job) -> tuple[Record, bool]:
    """The record of a case, and whether it was there."""
    path = job.out / RECORDS / f"{job.case_id}.json"
    key = hashlib.sha256(json.dumps(job.sources()).encode()).hexdigest()[:16]
    if path.is_file() and all(file.is_file() for file in job.files):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("key") != key:
            raise UsageError(
                f"{job.out}: holds case {job.case_id}, but made from other files or in another way. "
                "Name a new folder."
            )
        return record, True
    record = {"key": key, **job.make()}
    write_text(path, json.dumps(record, indent=2) + "\n")
    return record, False
