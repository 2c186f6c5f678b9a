"""Score a network that learns from what finished runs say of the unlabeled scans, on the development list.

    python benchmarks/distill.py recipes/la-1.25mm-4/supervised.toml --data FOLDER \\
        --teachers RUN RUN --set augment.rotate=15 --out runs/student

RUN are finished run folders. The mean of their probabilities labels every unlabeled training scan, once; the
recipe is then trained on all scans as if all were labeled. Only the scores see the true labels of the
unlabeled scans. A row goes to results/development.csv, with the number of teachers among the overrides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from develop import append, make_row, score

from vclipseg.commands import describe
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import Dataset, Split
from vclipseg.data.volume import Volume, write
from vclipseg.experiment import new_run, open_split, train_run
from vclipseg.inference import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="in nnU-Net's layout")
    parser.add_argument("--teachers", type=Path, nargs="+", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True, help="run folder, such as runs/student")
    parser.add_argument("--record", type=Path, default=Path("results/development.csv"))
    arguments = parser.parse_args()
    console = Console()
    dataset, split = open_split(load_experiment(arguments.recipe, []), arguments.data)
    taught = arguments.out.with_name(f"{arguments.out.name}-data")
    with console.bar("label", len(split.unlabeled)) as advance:
        for done, case_id in enumerate(label_all(dataset, split, arguments.teachers, taught)):
            advance(done + 1, case_id)
    everything = f"data.labeled={len(split.labeled) + len(split.unlabeled)}"
    experiment = load_experiment(arguments.recipe, [*arguments.overrides, everything])
    run, prepared = new_run(experiment, taught, arguments.out, console, sys.argv)
    console.note(describe(run))
    train_run(run, prepared.cases, console)
    values = score(run.folder, dataset, split.unlabeled, console)
    overrides = [*arguments.overrides, f"teachers={len(arguments.teachers)}"]
    row = make_row(arguments.recipe, overrides, run, values)
    append(arguments.record, row)
    print(json.dumps(row, indent=2))


def label_all(
    dataset: Dataset, split: Split, teachers: Sequence[Path], folder: Path
) -> Iterator[str]:
    """Make a data set of which every training case is labeled; yields each case that was labeled."""
    folder.mkdir(parents=True)
    for name in ("imagesTr", "imagesTs", "labelsTs", "splits.json", "dataset.json"):
        (folder / name).symlink_to((dataset.root / name).resolve())
    labels = folder / "labelsTr"
    labels.mkdir()
    for case_id in split.labeled:
        write(dataset.labels(dataset.case(case_id)), labels / f"{case_id}.nii.gz")
    models = [load(run) for run in teachers]
    for case_id in split.unlabeled:
        image = dataset.image(dataset.case(case_id))
        mean = np.mean([model.probabilities(image).array for model in models], axis=0)
        mask = mean.argmax(0).astype(np.uint8)
        write(Volume(mask, image.affine), labels / f"{case_id}.nii.gz")
        yield case_id


if __name__ == "__main__":
    main()
