"""What the ways to cover a volume do to the Dice of one trained model, on the test cases of its data.

    python benchmarks/modes.py RUN --data FOLDER --record results/prediction-modes.json

The literature's windows have strides of 18, 18 and 4 voxels for patches of 112 x 112 x 80, and count alike;
for other patches the strides are the same shares of them. Prints a line a way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from vclipseg.data.datasets import Dataset, open_dataset
from vclipseg.environment import commit, cpu_name
from vclipseg.evaluation import evaluate
from vclipseg.files import write_text
from vclipseg.inference import PredictSettings, load
from vclipseg.scores import case_means

SHARES = (18 / 112, 18 / 112, 4 / 80)  # of a patch, that the literature's windows move by


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.data)
    about = load(arguments.run).description
    patch = about["patch"]
    stride = tuple(max(1, round(share * n)) for share, n in zip(SHARES, patch, strict=True))
    ways = {
        "literature": PredictSettings(stride=stride, blend="uniform", batch=1, precision="fp32"),
        "default": PredictSettings(),
        "whole": PredictSettings(mode="whole"),
    }
    found = {name: measure(arguments.run, dataset, how) for name, how in ways.items()}
    theirs, seconds = found["literature"]
    rows = [
        {
            "way": name,
            "dice": round(statistics.mean(dices.values()), 5),
            "mean_difference": round(statistics.mean(dices[c] - theirs[c] for c in theirs), 5),
            "largest_difference": round(max(abs(dices[c] - theirs[c]) for c in theirs), 5),
            "times_as_fast": round(seconds / took, 2),
        }
        for name, (dices, took) in found.items()
    ]
    for row in rows:
        print(row)
    made = json.loads((arguments.run / "experiment.json").read_text(encoding="utf-8"))
    facts = {
        "model": f"{about['method']['name']}, {about['method']['filters']} filters, "
        f"{about['steps']} steps",
        "trained": [word for word in made["command"] if "=" in word or word.startswith("recipes/")],
        "cases": len(theirs),
        "patch": patch,
        "stride": stride,
        "device": cpu_name(),
    }
    if arguments.record:
        content = json.dumps({**facts, "commit": commit(), "ways": rows}, indent=2)
        write_text(arguments.record, content + "\n")


def measure(run: Path, dataset: Dataset, how: PredictSettings) -> tuple[dict[str, float], float]:
    """Dice of each test case, and the seconds of all, metrics included."""
    predictor = load(run, how)
    began = time.perf_counter()
    rows = evaluate(predictor.predict, dataset, tuple(case.case_id for case in dataset.test))
    return case_means(rows, "dice"), time.perf_counter() - began


if __name__ == "__main__":
    main()
