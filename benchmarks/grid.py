"""Run recipes x seeds and record them: runs.csv, cases.csv and table.md of a folder in results/.

    python benchmarks/grid.py results/hippocampus-4 recipes/hippocampus-4 --data FOLDER

Goes on from the runs.csv that is there; a failed cell is named at the end and run again next time.
Each worker is a process of one thread: two of those beat one of two threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from vclipseg.config import Experiment, load_experiment
from vclipseg.data.plan import make_plan
from vclipseg.experiment import open_split
from vclipseg.networks.text import text_vectors
from vclipseg.records import record, recorded, run_record
from vclipseg.runs import Run, identity
from vclipseg.scores import read_scores
from vclipseg.tables import write_table

RECORDING = Lock()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="folder of the record, results/NAME")
    parser.add_argument("recipes", type=Path, nargs="+", help="recipes, or a folder of them")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    arguments = parser.parse_args()
    cells = [
        (recipe, seed)
        for seed in arguments.seeds
        for given in arguments.recipes
        for recipe in (sorted(given.glob("*.toml")) if given.is_dir() else [given])
        if not recipe.stem.endswith("common")
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = list(pool.map(lambda cell: run_cell(*cell, arguments), cells))
    write_table(arguments.grid)
    failed = [cell for cell, result in zip(cells, results, strict=True) if not result]
    for recipe, seed in failed:
        print(f"FAILED: {recipe} seed {seed}", file=sys.stderr)
    return 1 if failed else 0


def run_cell(recipe: Path, seed: int, arguments: argparse.Namespace) -> bool:
    """Train and record one cell unless it is recorded; False if it failed."""
    experiment = load_experiment(recipe, [f"train.seed={seed}"])
    wanted = expected_identity(experiment, arguments.data)
    if wanted in recorded(arguments.grid):
        return True
    folder = arguments.runs / f"{arguments.grid.name}-{recipe.stem}-s{seed}-{wanted[:6]}"
    finished = (folder / "metrics.json").is_file()
    if not finished and not train(recipe, seed, folder, arguments.data):
        return False
    store(Run.open(folder), arguments.grid)
    return True


def expected_identity(experiment: Experiment, data: Path) -> str:
    """The `settings_hash` that a run of this experiment will have."""
    dataset, split = open_split(experiment, data)
    plan = make_plan(dataset, [*split.labeled, *split.unlabeled], experiment.prepare)
    text = text_vectors(experiment.text, dataset.class_names) if experiment.needs_text else None
    return identity(experiment, split, plan, text)


def train(recipe: Path, seed: int, folder: Path, data: Path) -> bool:
    vclipseg = [sys.executable, "-m", "vclipseg.cli", "train"]
    if (folder / "experiment.json").is_file():
        command = [*vclipseg, "--resume", str(folder), "--data", str(data)]
    else:
        command = [*vclipseg, str(recipe), "--data", str(data), "--out", str(folder), "--no-check"]
        command += ["--set", f"train.seed={seed}"]
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stderr.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            [*command, "--workers", "1"], env=environment, stderr=log, stdout=log, check=False
        ).returncode
    print(f"{folder.name}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


def store(run: Run, grid: Path) -> None:
    e = run.experiment
    environment = run.environment
    facts = {
        "settings_hash": identity(e, run.split, run.plan, run.text),
        "dataset": e.name,
        "method": e.method_name,
        "preset": e.preset,
        "text": run.text.label if run.text else "",
        "labeled": len(run.split.labeled),
        "draw": e.data.draw,
        "fold": None,
        "seed": e.train.seed,
        "filters": e.method.filters,
        "steps": e.train.steps,
        "weights": e.train.weights,
        "seconds": run.train_seconds,
        "device": f"{environment['device']}, {environment['threads']} thread(s)",
        "commit": environment["commit"] or "",
    }
    scores = read_scores(run.folder)
    with RECORDING:
        record(grid, [run_record(scores, lcc=lcc, **facts) for lcc in (False, True)], scores)


if __name__ == "__main__":
    sys.exit(main())
