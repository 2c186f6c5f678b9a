"""Predictors in memory, and what they said about a run's cases, kept in `RUN/serve/`.

serve/<case_id>.nii.gz                 the mask, class indices
serve/<case_id>.disagreement.nii.gz    whole percents
serve/<case_id>.json                   signals; written last: now the case is looked at
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.data.volume import Volume, read_labels, write
from vclipseg.disagreement import Look, look
from vclipseg.errors import UsageError
from vclipseg.files import write_text
from vclipseg.inference import Predictor, load
from vclipseg.ranking import Signals
from vclipseg.serve.catalog import NotFound, ServedRun
from vclipseg.serve.jobs import Job, Jobs
from vclipseg.serve.volumes import percent
from vclipseg.windows import window_starts

IN_MEMORY = 2
"""Models held at once."""


class Models:
    """Predictors by run, looks at cases, and the queue that makes them."""

    def __init__(self, jobs: Jobs, temporary: Path) -> None:
        self.jobs, self.temporary = jobs, temporary
        self.loaded: OrderedDict[str, tuple[float, Predictor]] = OrderedDict()
        self.lock = threading.Lock()
        self.pending: dict[tuple[str, str], Job] = {}

    def predictor(self, run: ServedRun) -> Predictor:
        """The model of a run; of the worker thread only.

        Raises:
            UsageError: it has no finished model.
        """
        if not run.model_path.is_file():
            raise UsageError(f"{run.id}: has no finished model yet")
        changed = run.model_path.stat().st_mtime
        known = self.loaded.get(run.id)
        if known is None or known[0] != changed:
            known = self.loaded[run.id] = (changed, load(run.folder))
        self.loaded.move_to_end(run.id)
        while len(self.loaded) > IN_MEMORY:
            self.loaded.popitem(last=False)
        return known[1]

    def look(self, run: ServedRun, image: Volume, job: Job) -> Look:
        """Look at an image (C, X, Y, Z), saying how far it is."""
        predictor = self.predictor(run)
        windows = count_windows(predictor, image)
        done = 0

        def on_windows(count: int) -> None:
            nonlocal done
            job.step(min(0.95, 0.1 + 0.85 * done / windows), "predicting")
            done += count

        job.step(0.1, "predicting")
        return look(predictor, image, on_windows)

    # cases of a run

    def folder(self, run: ServedRun) -> Path:
        """Where looks at a run's cases are kept: in the run, if it can be written to."""
        if os.access(run.folder, os.W_OK):
            return run.folder / "serve"
        return self.temporary / run.id

    def signals(self, run: ServedRun, case_id: str) -> Signals | None:
        """What the model said of a case; None if it has not been looked at since it was trained."""
        file = self.folder(run) / f"{case_id}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["model"] != stamp(run):
                return None
            return Signals(
                case_id,
                float(content["uncertainty"]),
                tuple(map(float, content["class_shares"])),
                tuple(map(float, content["features"])),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def mask(self, run: ServedRun, case_id: str) -> Volume:
        """The model's mask of a case, class indices: that of a look, or of the evaluation."""
        run.case(case_id)
        if self.signals(run, case_id) is None:
            return run.prediction(case_id)
        stored = read_labels(self.folder(run) / f"{case_id}.nii.gz")
        return Volume(stored.array.astype(np.uint8), stored.affine)

    def disagreement(self, run: ServedRun, case_id: str) -> Volume:
        """Whole percents (X, Y, Z) uint8.

        Raises:
            NotFound: the case has not been looked at.
        """
        run.case(case_id)
        if self.signals(run, case_id) is None:
            raise NotFound(f"{case_id}: has not been looked at yet")
        stored = read_labels(self.folder(run) / f"{case_id}.disagreement.nii.gz")
        return Volume(stored.array.astype(np.uint8), stored.affine)

    def look_at(self, run: ServedRun, case_id: str, *, ahead: bool = False) -> Job:
        """Look at a case of a run; one that is waiting already is not asked for again."""
        run.case(case_id)
        with self.lock:
            job = self.pending.get((run.id, case_id))
            if job and not job.ended.is_set():
                if not ahead:
                    self.jobs.hurry(job)
                return job
            submit = self.jobs.ahead if ahead else self.jobs.submit
            job = submit(f"look at {case_id}", lambda job: self._look_at(run, case_id, job))
            self.pending[run.id, case_id] = job
            return job

    def _look_at(self, run: ServedRun, case_id: str, job: Job) -> dict[str, Any]:
        if self.signals(run, case_id) is None:
            job.step(0.0, "reading")
            made = self.look(run, run.dataset.image(run.case(case_id)), job)
            self._keep(run, case_id, made)
        return {"run": run.id, "case": case_id}

    def _keep(self, run: ServedRun, case_id: str, made: Look) -> None:
        folder = self.folder(run)
        write(made.mask, folder / f"{case_id}.nii.gz")
        write(percent(made.disagreement), folder / f"{case_id}.disagreement.nii.gz")
        content = {
            "model": stamp(run),
            "uncertainty": made.uncertainty,
            "class_shares": made.class_shares,
            "features": made.features,
        }
        write_text(folder / f"{case_id}.json", json.dumps(content) + "\n")


def stamp(run: ServedRun) -> str:
    """Which model it is: looks of an earlier one do not count."""
    try:
        found = run.model_path.stat()
    except OSError:
        return ""
    return f"{run.settings_hash} {found.st_size} {found.st_mtime_ns}"


def count_windows(predictor: Predictor, image: Volume) -> int:
    """About how many windows an image is covered by."""
    spacing = np.array(predictor.plan.spacing)
    shape = np.maximum(1, np.rint(np.array(image.shape) * image.spacing / spacing)).astype(int)
    window = [min(w, int(n)) for w, n in zip(predictor.window, shape, strict=True)]
    stride = predictor.settings.stride or tuple(max(1, w // 2) for w in window)
    starts = (window_starts(int(n), w, s) for n, w, s in zip(shape, window, stride, strict=True))
    return max(1, int(np.prod([len(s) for s in starts])))
