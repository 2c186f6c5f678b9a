"""What a GRID.toml means: cells, their settings, and what differs."""

from __future__ import annotations

import pytest

from vclipseg.benchmark.grids import differences, load_grid
from vclipseg.config import load_experiment
from vclipseg.errors import UsageError

RECIPE = """
name = "tiny"
[data]
labeled = 2
[text]
source = "orthogonal"
[method]
filters = 4
[train]
steps = 100
patch = [16, 16, 16]
"""


def write(folder, grid, recipe=RECIPE):
    (folder / "common.toml").write_text(recipe)
    path = folder / "mine.toml"
    path.write_text(f'extends = "common.toml"\n{grid}')
    return path


@pytest.fixture
def grid(tmp_path):
    return load_grid(write(tmp_path, """
[grid]
seeds = [0, 1]
labeled = [1, 2]
[[grid.methods]]
name = "supervised"
labeled = [1, 2, 4]
[[grid.methods]]
name = "vclipseg"
label = "equal weights"
set = { method = { dlb_weighting = "equal" }, train = { lr = 0.5 } }
[[grid.methods]]
name = "vclipseg"
preset = "faithful"
pretrain = { name = "supervised", preset = "robust", set = { train = { steps = 30 } } }
"""))  # fmt: skip


def test_cells_come_seed_by_seed(grid):
    assert grid.name == "mine"
    cells = [str(cell) for cell in grid.cells()]
    assert cells[:7] == [
        "supervised (robust), 1 labeled, seed 0",
        "vclipseg (robust, equal weights), 1 labeled, seed 0",
        "vclipseg (faithful), 1 labeled, seed 0",
        "supervised (robust), 2 labeled, seed 0",
        "vclipseg (robust, equal weights), 2 labeled, seed 0",
        "vclipseg (faithful), 2 labeled, seed 0",
        "supervised (robust), 4 labeled, seed 0",
    ]
    assert cells[7:] == [cell.replace("seed 0", "seed 1") for cell in cells[:7]]


def test_draws_and_folds_multiply(grid):
    more = load_grid(grid.path, ["grid.draws=[5, 6]", "grid.folds=3", "grid.seeds=[0]"])
    cells = list(more.cells())
    assert len(cells) == 7 * 2 * 3
    assert str(cells[-1]) == "supervised (robust), 4 labeled, draw 6, fold 2, seed 0"
    data = more.experiment(cells[-1]).data
    assert (data.draw, data.fold, data.folds, data.labeled) == (6, 2, 3, 4)


def test_a_cell_is_recipe_and_preset_and_its_own_settings(grid):
    supervised, equal, faithful = list(grid.cells())[:3]
    one = grid.experiment(equal)
    assert (one.name, one.method_name, one.preset) == ("tiny", "vclipseg", "robust")
    assert (one.method.dlb_weighting, one.train.lr) == ("equal", 0.5)
    assert (one.train.steps, one.method.filters, one.train.seed) == (100, 4, 0)
    assert one.method.teacher_decay == 0.99  # of the preset
    assert grid.experiment(supervised).method_name == "supervised"
    assert grid.experiment(faithful).train.optimizer == "sgd"


def test_a_first_stage_is_a_run_of_its_own(grid):
    faithful = list(grid.cells())[2]
    first = grid.experiment(faithful, first_stage=True)
    assert (first.method_name, first.train.steps, first.train.seed) == ("supervised", 30, 0)
    assert first.data == grid.experiment(faithful).data
    assert grid.experiment(faithful, init_from="runs/x").train.init_from == "runs/x"


def test_footnotes_say_what_differs_from_the_common_settings(grid):
    supervised, equal, faithful = grid.settings.methods
    assert differences(grid, supervised) == []
    assert differences(grid, equal) == ["train.lr = 0.5"]
    sgd, first = differences(grid, faithful)
    assert sgd == (
        "train.optimizer = sgd; train.lr = 0.01; train.lr_power = 0; train.weights = last"
    )
    assert first == "starts from 30 steps of supervised (robust), whose time is counted in"


def test_other_patches_and_width_are_told(tmp_path):
    grid = load_grid(write(tmp_path, """
[[grid.methods]]
name = "vclipseg"
label = "large"
set = { method = { patches = [4, 4], filters = 8 } }
"""))  # fmt: skip
    assert differences(grid, grid.settings.methods[0]) == [
        "method.filters = 8; 4 labeled and 4 unlabeled patches a step"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"it needs a \[grid\] table"),
        ("[grid]\nmethods = []", "grid.methods"),
        ("[grid]\nseed = [1]\nmethods = [{ name = 'supervised' }]", "did you mean seeds"),
        ("[grid]\nmethods = [{ name = 'supervised', set = { train = { steps = 1 } } }]", "label"),
        ("[grid]\nmethods = [{ name = 'supervised' }, { name = 'supervised' }]", "there twice"),
        ("[grid]\nfolds = 1\nmethods = [{ name = 'supervised' }]", "folds"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load_grid(write(tmp_path, text))


def test_a_wrong_method_or_setting_is_named_when_a_cell_is_built(tmp_path):
    grid = load_grid(write(tmp_path, "[grid]\nmethods = [{ name = 'nobody' }]"))
    with pytest.raises(UsageError, match="nobody"):
        grid.experiment(next(grid.cells()))
    text = "[grid]\nmethods = [{ name = 'supervised', label = 'x', set = { method = { filter = 2 } } }]"
    grid = load_grid(write(tmp_path, text))
    with pytest.raises(UsageError, match=r"mine.toml: supervised \(robust, x\): method.filter"):
        grid.experiment(next(grid.cells()))


def test_a_grid_is_no_recipe(grid):
    with pytest.raises(UsageError, match="vclipseg benchmark"):
        load_experiment(grid.path)
