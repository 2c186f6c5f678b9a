"""Every recipe of the repository is one that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.experiment import evaluate_run, new_run, train_run
from vclipseg.runlog import read_log

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))
SMALL = (
    "train.steps=2",
    "train.patch=[16, 16, 16]",
    "train.tensorboard=false",
    "train.threads=1",
    "method.filters=2",
    "prepare.spacing=[4.0, 4.0, 4.0]",
    "predict.window=[16, 16, 16]",
    "predict.stride=[16, 16, 16]",
    "text.source=orthogonal",
    "text.dim=8",
)
each_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=[str(path.relative_to(FOLDER)) for path in RECIPES]
)


def test_there_are_recipes():
    assert len(RECIPES) > 5


@each_recipe
def test_recipe_loads(recipe):
    experiment = load_experiment(recipe)
    assert experiment.name != "run"
    assert experiment.data.labeled


@each_recipe
def test_recipe_says_only_what_differs(recipe):
    """A person who reads a recipe sees what it changes, and comments say why."""
    assert len(recipe.read_text().splitlines()) < 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes") / "data"
    return make_phantom(root, labeled=4, unlabeled=2, test=1, shape=(24, 24, 18), spacing=4.0)


@pytest.mark.slow
@each_recipe
def test_recipe_runs(recipe, data, tmp_path):
    experiment = load_experiment(recipe, SMALL)
    run, prepared = new_run(experiment, data, tmp_path / "run", Console(quiet=True))
    train_run(run, prepared.cases, Console(quiet=True))
    summary = evaluate_run(run, Console(quiet=True))
    assert summary["num_cases"] == 1
    assert [row["step"] for row in read_log(run.folder / "log.csv")] == ["2"]
