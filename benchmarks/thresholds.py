"""The Dice of a trained run on the development list where less than the most likely class counts.

    python benchmarks/thresholds.py recipes/la-1.25mm-4/robust.toml --data FOLDER \\
        --out runs/try --set method.name=cps --set method.preset=original

For runs of one foreground class: a voxel is foreground where its probability is above the threshold. A
model with a Dice of 0 at one half and a high one below it has found the organ, and is not sure of it.
The run in --out is one that `develop.py` left of these settings. Rows go to results/thresholds.csv.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from develop import finished, read_rows, trained_on

from vclipseg import metrics
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import Dataset
from vclipseg.errors import UsageError
from vclipseg.experiment import open_split
from vclipseg.inference import Predictor, load
from vclipseg.methods.base import Method
from vclipseg.networks.vnet import Head
from vclipseg.scores import write_rows

COLUMNS = (
    *("recipe", "overrides", "seed", "cases", "threshold", "dice"),
    "highest",  # mean over cases of the highest probability of any voxel
    "ceiling",  # the highest probability that the weights of the last convolution allow
    *("device", "commit"),
)
THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True, help="a finished run")
    parser.add_argument("--record", type=Path, default=Path("results/thresholds.csv"))
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.recipe, arguments.overrides)
    run = finished(arguments.out, experiment)
    dataset, split = open_split(experiment, arguments.data)
    predictor = load(run.folder)
    dices, highest = measure(predictor, dataset, split.unlabeled)
    about = {
        "recipe": arguments.recipe.as_posix(),
        "overrides": " ".join(arguments.overrides),
        "seed": experiment.train.seed,
        "cases": len(split.unlabeled),
        "highest": f"{highest:.4f}",
        "ceiling": f"{ceiling(predictor.method):.4f}",
        **trained_on(run),
    }
    rows = [
        {**about, "threshold": threshold, "dice": f"{dice:.4f}"}
        for threshold, dice in zip(THRESHOLDS, dices, strict=True)
    ]
    for row in rows:
        print(row["threshold"], row["dice"], row["highest"], row["ceiling"])
    add_rows(arguments.record, rows)


def ceiling(method: Method) -> float:
    """The highest probability of foreground that any head which predicts can give.

    A head reads features that are never negative. Where none counts for the foreground more than for
    the background, nothing lifts its probability above what the biases give.
    """
    ceilings = []
    for name, head in method.named_modules():
        if not isinstance(head, Head) or name.startswith(method.training_only):
            continue
        weights, bias = (p[1] - p[0] for p in (head.weight, head.bias))
        ceilings.append(1.0 if (weights > 0).any() else bias.sigmoid().item())
    return max(ceilings)


def measure(
    predictor: Predictor, dataset: Dataset, case_ids: tuple[str, ...]
) -> tuple[list[float], float]:
    """Mean Dice at each threshold, and the mean of the highest probabilities.

    Raises:
        UsageError: the model has more than one foreground class.
    """
    if (classes := len(predictor.class_names) - 1) != 1:
        raise UsageError(f"thresholds are for one foreground class, and the model has {classes}")
    dices, highest = [], []
    with Console().bar("thresholds", len(case_ids)) as advance:
        for done, case_id in enumerate(case_ids, 1):
            case = dataset.case(case_id)
            foreground = predictor.probabilities(dataset.image(case)).array[1]
            reference = dataset.labels(case).array > 0
            dices.append([metrics.dice(reference, foreground > t) for t in THRESHOLDS])
            highest.append(float(foreground.max()))
            advance(done, case_id, len(case_ids))
    means = [statistics.mean(column) for column in zip(*dices, strict=True)]
    return means, statistics.mean(highest)


def add_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to the record, in place of those of the same run."""
    run = (rows[0]["recipe"], rows[0]["overrides"])
    kept = [row for row in read_rows(path) if (row["recipe"], row["overrides"]) != run]
    write_rows(path, COLUMNS, [*kept, *rows])


if __name__ == "__main__":
    main()
