"""Every recipe of the repository is one that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vclipseg.benchmark.grids import differences, load_grid
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.experiment import evaluate_run, new_run, train_run
from vclipseg.runlog import read_log
from vclipseg.tables.published import names, published

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.toml"))
GRIDS = [path for path in FILES if "\n[grid]\n" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in FILES if path not in GRIDS]
SMALL = (
    "data.labeled=4",
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
    assert len(recipe.read_text(encoding="utf-8").splitlines()) < 60


each_grid = pytest.mark.parametrize("path", GRIDS, ids=[path.stem for path in GRIDS])


def test_there_are_grids():
    wanted = ("methods", "budget", "ablation", "hippocampus", "table-1", "table-4")
    assert all(any(word in path.stem for path in GRIDS) for word in wanted)


@each_grid
def test_grid_loads(path):
    """Every cell of it is an experiment, and the supervised baseline is there at every budget."""
    grid = load_grid(path)
    cells = list(grid.cells())
    supervised = {cell.labeled for cell in cells if cell.entry.name == "supervised"}
    for cell in cells:
        assert cell.labeled in supervised
        experiment = grid.experiment(cell)
        assert experiment.data.labeled
        assert experiment.train.steps == grid.common().train.steps
        if cell.entry.pretrain:
            grid.experiment(cell, first_stage=True)


@each_grid
def test_grid_says_what_differs(path):
    grid = load_grid(path)
    for entry in grid.settings.methods:
        if entry.preset == "robust":
            changed = [note for note in differences(grid, entry) if "starts from" not in note]
            mixed = ["4 labeled and 4 unlabeled patches a step"]  # of which BCP's network sees four
            assert changed == (mixed if entry.name == "bcp" else []), "common settings"


@each_grid
def test_grid_names_published_figures(path):
    grid = load_grid(path)
    dataset = grid.settings.published
    for entry in grid.settings.methods:
        assert entry.published is None or entry.published in names(dataset)
    if path.stem.startswith("table-") and dataset:
        quoted = {
            figure.name
            for cell in grid.cells()
            if (figure := published(dataset, cell.labeled, cell.entry.name, cell.entry.shown,
                                    cell.entry.published))
        }  # fmt: skip
        assert "V-Net" in quoted
        assert len(quoted) >= 4


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
