"""The literature's protocol: the checkpoint that is best on the test list, which nothing else does here.

Public code of this field scores the test list every 200 of 15,000 steps from step 800 on and keeps the
weights with the highest mean Dice. `TestLooks` repeats that beside a training, to show how much it
flatters: it only reads the state, so that the training itself, its last weights and their scores stay
what they are without it. What it keeps is a run folder of its own, `paper/` in that of the run, whose
scores are marked in every table and report. Averaged weights get their statistics after the last step
(`train.statistics_batches`); looks before it see those of training.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vclipseg.checkpoint import save_model
from vclipseg.console import Console
from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.data.preprocess import prepare_image, restore_mask
from vclipseg.experiment import evaluate_run
from vclipseg.inference import Predictor
from vclipseg.metrics import dice
from vclipseg.records import settings_hash
from vclipseg.runs import Run, write_json
from vclipseg.scores import write_rows
from vclipseg.training import TrainState

FIRST, EVERY, PUBLISHED_STEPS = 800, 200, 15_000
FOLDER = "paper"
COLUMNS = ("step", "dice")
COPIED = (
    "environment.json",
    "splits.json",
    "plan.json",
    "text.safetensors",
    "log.csv",
)


def look_steps(total_steps: int) -> tuple[int, ...]:
    """After which steps the literature looks at the test list, scaled to the length of a run."""
    published = range(FIRST, PUBLISHED_STEPS + 1, EVERY)
    return tuple(sorted({max(1, round(s * total_steps / PUBLISHED_STEPS)) for s in published}))


class TestLooks:
    """Scores the test cases when the protocol does, and keeps the best weights.

    Give it to `train_run` as `look`. Looks that an interrupted training made already are not
    repeated.

    Args:
        run: the run that is trained.
        root: where its data are.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, run: Run, root: Path) -> None:
        self.run = run
        self.folder = run.folder / FOLDER
        self.wanted = frozenset(look_steps(run.experiment.train.steps))
        self.rows = read_looks(run.folder)
        dataset = open_dataset(root, classes=run.classes)
        random = torch.get_rng_state()
        self.predictor = Predictor(run.make_method(), run.model_description())
        torch.set_rng_state(random)
        self.cases = list(_prepared(dataset, run))
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, state: TrainState) -> None:
        """Look, if it is time."""
        if state.step not in self.wanted or any(row["step"] == state.step for row in self.rows):
            return
        score = self.score(state)
        if all(score > row["dice"] for row in self.rows):
            self.keep(state)
        self.rows.append({"step": state.step, "dice": score})
        write_rows(self.folder / "looks.csv", COLUMNS, self.rows)

    def score(self, state: TrainState) -> float:
        """Mean Dice over the test cases of the weights that the run evaluates."""
        self.predictor.method.load_state_dict(state.weights(), strict=False)
        self.predictor.method.eval()
        values = []
        for image, trace, reference in self.cases:
            mask = restore_mask(self.predictor.prepared(image).numpy(), trace).array
            values.append(_mean_dice(reference, mask, len(self.predictor.class_names)))
        return round(float(np.nanmean(values)), 6)  # as looks.csv keeps it

    def keep(self, state: TrainState) -> None:
        """Write the weights as the best so far."""
        description = {**self.run.model_description(), "protocol": "paper", "step": state.step}
        save_model(self.folder / "checkpoints" / "model.safetensors", state.model(), description)


def read_looks(run: Path) -> list[dict[str, Any]]:
    """The looks that a run folder records: `step` and mean test `dice`."""
    path = run / FOLDER / "looks.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {"step": int(row["step"]), "dice": float(row["dice"])} for row in csv.DictReader(file)
        ]


def evaluate_best(run: Run, console: Console, root: Path | None = None) -> Run:
    """Make `paper/` a run folder of its own and score the weights that were best on the test cases.

    Returns:
        That run. It says `"protocol": "paper"`, how often the test cases were looked at and which step
        was chosen, whenever it is evaluated; and it is another run to whatever starts from it.
    """
    folder, looks = run.folder / FOLDER, read_looks(run.folder)
    for name in COPIED:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, folder / name)
    chosen = max(looks, key=lambda row: row["dice"])
    marks = {"protocol": "paper", "looks": len(looks), "chosen_step": chosen["step"]}
    known = {"settings_hash": settings_hash({"run": run.settings_hash, **marks})}
    write_json(folder / "experiment.json", {**run.description, **known, **marks})
    best = Run.open(folder)
    evaluate_run(best, console, root)
    return best


def _prepared(dataset: Dataset, run: Run) -> Iterator[tuple[torch.Tensor, Any, np.ndarray]]:
    """Image (C, x, y, z) as the network sees it, how it was made, and reference (X, Y, Z)."""
    for case_id in run.split.test:
        case = dataset.case(case_id)
        if case.label:
            prepared, trace = prepare_image(dataset.image(case), run.plan)
            image = torch.from_numpy(np.ascontiguousarray(prepared.array, dtype=np.float32))
            yield image, trace, dataset.labels(case).array


def _mean_dice(reference: np.ndarray, mask: np.ndarray, num_classes: int) -> float:
    """Over the foreground classes that either has."""
    values = [dice(reference == k, mask == k) for k in range(1, num_classes)]
    defined: Iterable[float] = [value for value in values if not np.isnan(value)]
    return float(np.mean(list(defined))) if defined else float("nan")
