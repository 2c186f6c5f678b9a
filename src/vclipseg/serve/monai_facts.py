"""What MONAI Label's clients are told of runs and their data."""

from __future__ import annotations

from typing import Any

from vclipseg import __version__
from vclipseg.data.reviews import read_reviews
from vclipseg.ranking import STRATEGIES
from vclipseg.serve.catalog import ServedRun
from vclipseg.serve.incoming import Scan
from vclipseg.serve.review_routes import cases_of
from vclipseg.serve.state import State

DESCRIPTIONS = {
    "combined": "Uncertain, novel and class-rare together",
    "uncertain": "Where the decoders differ most",
    "novel": "Least like what is labeled",
    "class_rare": "Shows classes that few labeled cases show",
    "random": "Any",
    "first": "As listed",
}


def first_run(state: State) -> ServedRun:
    """The run whose data set is the datastore: the first with a model and its data in reach."""
    runs = list(state.catalog.runs.values())
    ready = (run for run in runs if run.model_path.is_file() and run.has_data())
    return next(ready, runs[0])


def app_info(state: State) -> dict[str, Any]:
    """As MONAI Label's clients read it."""
    served = first_run(state)
    models = {
        run.id: {
            "type": "segmentation",
            "labels": class_numbers(run),
            "dimension": 3,
            "description": f"{run.run.name}: {run.run.method}",
            "config": {},
        }
        for run in state.catalog.runs.values()
        if run.model_path.is_file()
    }
    return {
        "name": "vclipseg",
        "description": f"vclipseg: {served.run.name}",
        "version": __version__,
        "labels": class_numbers(served),
        "models": models,
        "trainers": {},
        "strategies": {name: {"description": DESCRIPTIONS[name]} for name in STRATEGIES},
        "scoring": {},
        "train_stats": {},
        "datastore": stats(served),
    }


def class_numbers(served: ServedRun) -> dict[str, int]:
    """Foreground class -> its value in masks."""
    return {name: index for index, name in enumerate(served.class_names) if index}


def stats(served: ServedRun) -> dict[str, Any]:
    """How many images there are, and how many of them are decided about."""
    if not served.has_data():
        return {"total": 0, "completed": 0}
    unlabeled = cases_of(served, "unlabeled")
    done = set(read_reviews(served.dataset.root)) & set(unlabeled)
    return {"total": len(unlabeled), "completed": len(done)}


def objects(served: ServedRun) -> dict[str, Any]:
    """Images with the labels that they have."""
    reviews = read_reviews(served.dataset.root)
    return {
        case_id: {
            "image": {"info": {"name": f"{case_id}.nii.gz"}, "ext": ".nii.gz"},
            "labels": {"final": {"ext": ".nii.gz", "info": {"ts": reviews[case_id].when}}}
            if case_id in reviews and reviews[case_id].label
            else {},
        }
        for case_id in cases_of(served, "unlabeled")
    }


def session_info(scan: Scan) -> dict[str, Any]:
    """Without paths of this machine."""
    return {"name": scan.name, "image": scan.name, "path": "", "kind": scan.kind}
