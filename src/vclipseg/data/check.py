"""Checking a data set before anybody trusts a result: every file, and cases against each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from vclipseg.data.cases import CHANNEL, Case, named_images, named_labels
from vclipseg.data.check_case import CaseFacts, inspect_case
from vclipseg.data.compare_cases import compare_cases, summarize
from vclipseg.data.datasets import ANY_VALUE, Dataset, open_dataset
from vclipseg.data.findings import Findings, Problem
from vclipseg.data.layouts import list_cases
from vclipseg.errors import DataError

OnProgress = Callable[[int, int, str], None]

POOL_BYTES = 64 * 2**20
"""A data set smaller than this is read sooner than processes have started."""
_FOLDER_PAIRS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"), ("images", "labels"))


def check_dataset(
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    label_values: Sequence[int] | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Findings:
    """Read every file of a data set once and say what is wrong with it. Changes nothing.

    Labels of test cases are checked like all others, but no number of theirs is reported.

    Args:
        folder: The folder, or a CSV file.
        class_names: As in `open_dataset`.
        label_values: As in `open_dataset`.
        workers: Processes, each holding one case in memory; 1 works in this one, None decides.
        on_progress: Called with cases done, all cases and the id of the one just read.

    Raises:
        UsageError: There is no data set, or the arguments do not fit it.
        DataError: Its cases cannot even be listed; the message names the file.
    """
    folder = Path(folder)
    try:
        dataset, described = _open(folder, class_names, label_values)
    except DataError:
        if lonely := _labels_without_image(folder):  # opening names only the first of them
            return Findings(folder, None, tuple(lonely), None)
        raise
    inspect = partial(
        inspect_case,
        num_channels=len(dataset.channel_names),
        label_values=dataset.label_values,
        class_names=dataset.class_names,
    )
    facts = list(_inspect_all(inspect, dataset.cases, workers, on_progress))
    problems = [*list_cases(folder).problems, *(p for f in facts for p in f.problems)]
    if dataset.layout != "csv":  # which is the only word on what belongs together
        problems += _labels_without_image(dataset.root, {c.label for c in dataset.cases})
    if not described:
        dataset, gaps = _describe(dataset, facts)
        problems += gaps
    problems += compare_cases(dataset, facts)
    problems.sort(key=lambda p: p.severity)  # "error" before "warning"; else the order of cases
    return Findings(dataset.root, dataset, tuple(problems), summarize(dataset, facts))


def _open(
    folder: Path, class_names: Sequence[str] | None, label_values: Sequence[int] | None
) -> tuple[Dataset, bool]:
    """The data set, and whether its classes are known; else any value is accepted for now."""
    described = bool(class_names or label_values or list_cases(folder).labels)
    values = label_values if described else ANY_VALUE
    return open_dataset(folder, class_names=class_names, label_values=values), described


def _describe(dataset: Dataset, facts: Sequence[CaseFacts]) -> tuple[Dataset, list[Problem]]:
    """Classes from the values that the training labels hold."""
    found = {v for f in facts if f.case.split == "train" for v in f.volumes_ml or {}}
    values = tuple(sorted({0} | (found & set(ANY_VALUE))))
    names = ("background", *(f"class_{i}" for i in range(1, len(values))))
    dataset = replace(dataset, class_names=names, label_values=values)
    if values == tuple(range(len(values))):
        return dataset, []
    message = (
        f"the label values {values} are not 0, 1, 2, ... without gaps. If they are meant so, ask "
        f"for it: label_values = {list(values)} (background first)."
    )
    return dataset, [Problem("label-value-gaps", "", None, message)]


def _labels_without_image(folder: Path, known: Collection[Path | None] = ()) -> list[Problem]:
    """Label files that no image is named like, but for those known to be of a case."""
    root = folder.parent if folder.name == "dataset.json" else folder
    problems = []
    for images, labels in _FOLDER_PAIRS:
        stems = {name for name, _ in named_images(root / images)}
        stems |= {match[1] for s in stems if (match := CHANNEL.match(s))}
        for case_id, file in named_labels(root / labels):
            if case_id not in stems and file not in known:
                message = (
                    f"no image in {images} belongs to this label. Give the two the same name "
                    "(but for the channel number _0000), or take the label away."
                )
                problems.append(Problem("label-without-image", case_id, file, message))
    return problems


# ---- reading all cases -----------------------------------------------------------------


def _inspect_all(
    inspect: Callable[[Case], CaseFacts],
    cases: Sequence[Case],
    workers: int | None,
    on_progress: OnProgress | None,
) -> Iterator[CaseFacts]:
    """Facts in the order of the cases."""
    workers = min(_choose_workers(cases) if workers is None else workers, len(cases))
    facts = map(inspect, cases) if workers <= 1 else _inspect_pooled(inspect, cases, workers)
    for done, fact in enumerate(facts, start=1):
        if on_progress:
            on_progress(done, len(cases), fact.case.case_id)
        yield fact


def _inspect_pooled(
    inspect: Callable[[Case], CaseFacts], cases: Sequence[Case], workers: int
) -> Iterator[CaseFacts]:
    """Read in processes that start afresh, as a forked torch may hang.

    If one of them is killed, most often for want of memory, this process reads the rest.
    """
    done = 0
    try:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for fact in pool.map(inspect, cases):
                yield fact
                done += 1
    except BrokenProcessPool:
        yield from map(inspect, cases[done:])


def _choose_workers(cases: Sequence[Case]) -> int:
    size = sum(_size(p) for c in cases for p in (*c.images, c.label) if p)
    return 1 if size < POOL_BYTES else min(os.cpu_count() or 1, 8)


def _size(path: Path) -> int:
    """Bytes of a file or, of a series in a folder, of all files in that."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
