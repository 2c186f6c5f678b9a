"""Score a recipe on the development list, by which settings, presets and defaults are chosen.

    python benchmarks/develop.py recipes/la-1.25mm-4/robust.toml --data FOLDER \\
        --set method.warmup=0 --out runs/try

The development list is fixed: the training cases that the recipe leaves unlabeled. Their labels are
read here, after training, and nowhere else; test cases are not touched. A row with the overrides, the
commit and the Dice, each case's too, goes to results/development.csv. A finished run of these settings in
--out, as of a grid, is not trained again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from vclipseg.commands import describe
from vclipseg.config import Experiment, load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import Dataset
from vclipseg.environment import computed_on
from vclipseg.errors import UsageError
from vclipseg.evaluation import evaluate
from vclipseg.experiment import new_run, open_split, train_run
from vclipseg.inference import load
from vclipseg.runs import Run
from vclipseg.scores import case_means, write_rows

COLUMNS = (
    *("recipe", "overrides", "seed", "cases", "dice", "lowest", "seconds", "device", "commit"),
    "case_dice",  # in the order of the split's unlabeled cases
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True, help="run folder, such as runs/try")
    parser.add_argument("--record", type=Path, default=Path("results/development.csv"))
    arguments = parser.parse_args()
    console = Console()
    experiment = load_experiment(arguments.recipe, arguments.overrides)
    command = sys.argv
    if (arguments.out / "experiment.json").is_file():
        run = finished(arguments.out, experiment)
    else:
        run, prepared = new_run(experiment, arguments.data, arguments.out, console, command)
        console.note(describe(run))
        train_run(run, prepared.cases, console)
    dataset, split = open_split(experiment, arguments.data)
    values = score(run.folder, dataset, split.unlabeled, console)
    row = make_row(arguments.recipe, arguments.overrides, run, values)
    append(arguments.record, row)
    print(json.dumps(row, indent=2))


def finished(folder: Path, experiment: Experiment) -> Run:
    """The run in a folder.

    Raises:
        UsageError: it is not finished, or of other settings.
    """
    run = Run.open(folder)
    if not run.model_path.is_file():
        raise UsageError(f"{folder}: not finished; go on with `vclipseg train --resume {folder}`")
    if run.experiment.to_json() != experiment.to_json():
        raise UsageError(f"{folder}: a run of other settings; name a new folder")
    return run


def score(
    folder: Path, dataset: Dataset, case_ids: tuple[str, ...], console: Console
) -> list[float]:
    """Dice of each development case, averaged over its classes."""
    labeled = [case_id for case_id in case_ids if dataset.case(case_id).label]
    with console.bar("develop", len(labeled)) as advance:
        rows = evaluate(
            load(folder).predict,
            dataset,
            labeled,
            on_progress=lambda done, total, case_id: advance(done, case_id, total),
        )
    return list(case_means(rows, "dice").values())


def make_row(recipe: Path, overrides: list[str], run: Run, values: list[float]) -> dict:
    """What the record says of a trained run and the Dice of its development cases."""
    return {
        "recipe": recipe.as_posix(),
        "overrides": " ".join(overrides),
        "seed": run.experiment.train.seed,
        "seconds": run.train_seconds,
        **trained_on(run),
        **dice_of(values),
    }


def trained_on(run: Run) -> dict[str, str]:
    """The columns about machine and commit."""
    environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    return {"device": computed_on(environment), "commit": environment["commit"] or ""}


def dice_of(values: list[float]) -> dict:
    """The columns about the Dice of development cases."""
    return {
        "cases": len(values),
        "dice": statistics.mean(values),
        "lowest": min(values),
        "case_dice": " ".join(f"{value:.4f}" for value in values),
    }


def append(path: Path, row: dict) -> None:
    """Add a row to the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, COLUMNS, [*read_rows(path), row])


def read_rows(path: Path) -> list[dict[str, str]]:
    """None where there is no record yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
