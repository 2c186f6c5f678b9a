"""Does it matter which cases are annotated next? Strategies beside random, on data that has labels.

    python benchmarks/annotate_next.py recipes/hippocampus-4/robust.toml --data FOLDER --seeds 0 1 2

For each seed: labeled cases are drawn, a model is trained and looks at the others; each strategy names
as many more to annotate, their labels are given, and a model is trained anew. All are scored on the test
cases; nothing is chosen by that. Rows go to results/annotate-next/cases.csv as they come, and a
simulation that was stopped goes on from them.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.disagreement import look
from vclipseg.environment import commit
from vclipseg.evaluation import evaluate
from vclipseg.experiment import new_run, train_run
from vclipseg.inference import load
from vclipseg.ranking import Signals, rank
from vclipseg.runs import Prepared
from vclipseg.scores import case_means, write_rows

COLUMNS = ("recipe", "steps", "seed", "strategy", "labeled", "case_id", "dice", "commit")
STRATEGIES = ("random", "uncertain", "novel", "class_rare", "combined")
START = "start"
"""The model that looks at the candidates; its row shows what the added labels give."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--add", type=int, default=4, help="cases to annotate")
    parser.add_argument("--candidates", type=int, default=60, help="of how many unlabeled ones")
    parser.add_argument("--runs", type=Path, default=Path("runs/annotate-next"))
    parser.add_argument("--record", type=Path, default=Path("results/annotate-next/cases.csv"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        simulate(arguments, seed, Console())


def simulate(arguments: argparse.Namespace, seed: int, console: Console) -> None:
    """One start, and every strategy from there."""
    if all(is_recorded(arguments, seed, strategy) for strategy in STRATEGIES):
        return
    drawn = [f"data.draw={seed}"]
    run, prepared = trained(arguments, seed, START, drawn, console)
    labeled = prepared.split.labeled
    chosen = None
    for strategy in STRATEGIES:
        if is_recorded(arguments, seed, strategy):
            continue
        if chosen is None:
            candidates = prepared.split.unlabeled[: arguments.candidates]
            seen = signals(run, prepared, candidates, console)
            known = signals(run, prepared, labeled, console)
            chosen = {
                name: [c.case_id for c in rank(name, seen, known, seed)[: arguments.add]]
                for name in STRATEGIES
            }
        ids = [f'"{case_id}"' for case_id in (*labeled, *chosen[strategy])]
        trained(arguments, seed, strategy, [f"data.labeled=[{', '.join(ids)}]"], console)


def trained(
    arguments: argparse.Namespace,
    seed: int,
    strategy: str,
    overrides: Sequence[str],
    console: Console,
) -> tuple[Path, Prepared]:
    """A run with these labeled cases, scored on the test cases and recorded."""
    folder = arguments.runs / f"{seed}-{strategy}"
    shutil.rmtree(folder, ignore_errors=True)  # of a simulation that was stopped
    overrides = [*arguments.overrides, f"train.seed={seed}", *overrides]
    experiment = load_experiment(arguments.recipe, overrides)
    run, prepared = new_run(experiment, arguments.data, folder, console)
    console.note(f"seed {seed}, {strategy}: {', '.join(prepared.split.labeled)}")
    train_run(run, prepared.cases, console)
    if is_recorded(arguments, seed, strategy):
        return folder, prepared
    scores = evaluate(load(folder).predict, prepared.dataset, prepared.split.test)
    common = {
        "recipe": arguments.recipe.as_posix(),
        "steps": experiment.train.steps,
        "seed": seed,
        "strategy": strategy,
        "labeled": len(prepared.split.labeled),
        "commit": commit() or "",
    }
    dices = case_means(scores, "dice")
    append(
        arguments.record,
        [{**common, "case_id": case_id, "dice": round(dice, 6)} for case_id, dice in dices.items()],
    )
    return folder, prepared


def signals(
    run: Path, prepared: Prepared, case_ids: Sequence[str], console: Console
) -> list[Signals]:
    """What the model says of each case."""
    model, found = load(run), []
    with console.bar("look", len(case_ids)) as advance:
        for done, case_id in enumerate(case_ids, start=1):
            seen = look(model, prepared.dataset.image(prepared.dataset.case(case_id)))
            found.append(Signals(case_id, seen.uncertainty, seen.class_shares, seen.features))
            advance(done, case_id)
    return found


def is_recorded(arguments: argparse.Namespace, seed: int, strategy: str) -> bool:
    key = (arguments.recipe.as_posix(), str(seed), strategy)
    return any((r["recipe"], r["seed"], r["strategy"]) == key for r in recorded(arguments.record))


def recorded(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, COLUMNS, [*recorded(path), *rows])


if __name__ == "__main__":
    main()
