"""Does a trained model fail by its weights, or by the statistics that it normalizes with?

    python benchmarks/statistics_shift.py RUN [RUN ...] --data FOLDER

Dropout changes the variance of what batch normalization sees in training; in prediction it is off, and
the running statistics no longer fit, the less so the fewer channels there are (Li et al., CVPR 2019,
https://arxiv.org/abs/1801.05134). Here a model is scored twice on every fourth case of the development
list: as it is, and with statistics taken anew, without dropout, from plain patches of the other
unlabeled cases. No label takes part in that. Rows go to results/statistics-shift.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vclipseg.checkpoint import load_model
from vclipseg.console import Console
from vclipseg.data.augment import AugmentSettings, draw, place
from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.data.preprocess import prepare_image
from vclipseg.evaluation import evaluate
from vclipseg.inference import Predictor, build_method
from vclipseg.methods.base import Method
from vclipseg.runs import Run
from vclipseg.scores import case_means, write_rows

COLUMNS = ("run", "method", "preset", "seed", "cases", "dice", "dice_taken_anew")
BATCHES, PATCHES = 40, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--record", type=Path, default=Path("results/statistics-shift.csv"))
    arguments = parser.parse_args()
    console = Console()
    for folder in arguments.runs:
        row = measure(Run.open(folder), arguments.data, console)
        console.note(f"{row['run']}: {row['dice']:.3f}, taken anew {row['dice_taken_anew']:.3f}")
        append(arguments.record, row)


def measure(run: Run, data: Path, console: Console) -> dict:
    """The row of a run."""
    settings = run.experiment.data
    dataset = open_dataset(
        data, class_names=settings.class_names, label_values=settings.label_values
    )
    scored = run.split.unlabeled[::4]
    others = [case_id for case_id in run.split.unlabeled if case_id not in scored]
    weights, description = load_model(run.folder / "checkpoints" / "model.safetensors")
    method = build_method(description, weights.get("text"))
    method.load_state_dict(weights, strict=False)
    model = Predictor(method, description)
    before = mean_dice(model, dataset, scored, console)
    take_statistics(method, patches(model, dataset, others))
    return {
        "run": run.folder.name,
        "method": description["method"]["name"],
        "preset": description["preset"],
        "seed": run.experiment.train.seed,
        "cases": len(scored),
        "dice": round(before, 6),
        "dice_taken_anew": round(mean_dice(model, dataset, scored, console), 6),
    }


def mean_dice(
    model: Predictor, dataset: Dataset, case_ids: tuple[str, ...], console: Console
) -> float:
    with console.bar("develop", len(case_ids)) as advance:
        rows = evaluate(
            model.predict,
            dataset,
            case_ids,
            on_progress=lambda done, total, case_id: advance(done, case_id, total),
        )
    return statistics.mean(case_means(rows, "dice").values())


def patches(model: Predictor, dataset: Dataset, case_ids: list[str]) -> list[Tensor]:
    """Batches (B, C, X, Y, Z) of plain patches at random places, one a case."""
    rng = np.random.default_rng(0)
    batches = []
    for n in range(BATCHES):
        chosen = [case_ids[(n * PATCHES + k) % len(case_ids)] for k in range(PATCHES)]
        rows = []
        for case_id in chosen:
            image = prepare_image(dataset.image(dataset.case(case_id)), model.plan)[0].array
            at = draw(AugmentSettings(), rng, image.shape[1:], model.description["patch"])
            rows.append(torch.from_numpy(place(at, image)))
        batches.append(torch.stack(rows).contiguous(memory_format=torch.channels_last_3d))
    return batches


@torch.no_grad()
def take_statistics(method: Method, batches: list[Tensor]) -> None:
    """Replace the running statistics of batch normalization by their mean over batches, without dropout."""
    layers = [m for m in method.modules() if isinstance(m, nn.BatchNorm3d)]
    method.eval()
    for layer in layers:
        layer.train()
    for n, images in enumerate(batches, start=1):
        for layer in layers:
            layer.momentum = 1 / n
        method.predict(images)
    method.eval()


def append(path: Path, row: dict) -> None:
    """Add a row to the record, in place of an older one of the same run."""
    rows: list[dict] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [old for old in csv.DictReader(file) if old["run"] != row["run"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, COLUMNS, [*rows, row])


if __name__ == "__main__":
    main()
