from __future__ import annotations

import shutil

import pytest

from toy import TINY
from vclipseg import commands
from vclipseg.commands import default_folder, resolve_train, summary_lines
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.data.plan import PlanSettings, make_plan
from vclipseg.data.reviews import save_review
from vclipseg.data.volume import Volume
from vclipseg.errors import UsageError

# What `vclipseg train` means


def test_a_folder_alone_is_trained_on_with_sizes_of_its_own(tiny_data):
    experiment, root = resolve_train(tiny_data, None, [])
    assert root == tiny_data
    assert (experiment.name, experiment.method_name, experiment.preset) == (
        "Phantom",
        "vclipseg",
        "robust",
    )
    assert experiment.train.patch == (32, 32, 32)
    assert experiment.augment.foreground_share > 0


def test_what_is_set_wins_over_the_sizes_of_the_data(tiny_data):
    experiment, _ = resolve_train(tiny_data, None, ["train.patch=[16, 16, 16]", "name=mine"])
    assert experiment.train.patch == (16, 16, 16)
    assert experiment.name == "mine"


def test_a_given_plan_decides_the_sizes(tiny_data):
    dataset = open_dataset(tiny_data)
    plan = make_plan(dataset, dataset.train, PlanSettings(spacing=(8.0, 8.0, 8.0)))
    experiment, _ = resolve_train(tiny_data, None, [], plan)
    assert experiment.train.patch == (16, 16, 16)


def test_a_recipe_is_taken_as_it_is(tiny_data, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[method]\nname = "supervised"\n')
    experiment, root = resolve_train(recipe, tiny_data, ["train.steps=7"])
    assert root == tiny_data
    expected = load_experiment(recipe, ["train.steps=7"])
    assert experiment == expected
    assert experiment.train.patch == type(expected.train)().patch  # nothing is decided from data


def test_without_data(tmp_path):
    with pytest.raises(UsageError, match="no data"):
        resolve_train(None, None, [])
    with pytest.raises(UsageError, match="no data"):
        resolve_train(tmp_path / "recipe.toml", None, [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("la", "runs/la-supervised-robust-s3"), ("a b/c", "runs/a-b-c-supervised-robust-s3")],
)
def test_default_folder(name, expected):
    experiment = load_experiment(
        None, [*TINY, "method.name=supervised", f'name="{name}"', "train.seed=3"]
    )
    assert default_folder(experiment).as_posix() == expected


# What a person reads in the end


def test_summary_lines():
    def value(mean, low=None, high=None):
        return {"mean": mean, "low": low, "high": high, "n": 3}

    mean = {
        "dice": value(0.8123, 0.7, 0.9),
        "jaccard": value(0.7),
        "hd95_mm": value(None),
        "assd_mm": value(1.5),
        "nsd": value(0.9),
    }
    lines = summary_lines({"mean": mean, "failures": 1, "num_cases": 3})
    assert lines[0].split() == ["Dice", "0.812", "[0.700,", "0.900]"]
    assert lines[1].split() == ["Jaccard", "0.700"]
    assert not any(line.startswith("95HD") for line in lines)  # nothing is made up
    assert lines[-1].split()[:2] == ["failures", "1"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_decisions_of_its_start(tiny_data, tmp_path):
    """What people decide while it is stopped counts in the next run, not in this one."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    dataset = open_dataset(data)
    first, second = (case.case_id for case in dataset.unlabeled)
    mask = dataset.labels(dataset.labeled[0])
    image = dataset.image(dataset.case(first))
    save_review(data, first, "fixed", Volume(mask.array, image.affine), {"background": 0, "a": 1})
    experiment, quiet = load_experiment(None, TINY), Console(quiet=True)
    run = commands.train_new(experiment, data, tmp_path / "run", quiet, check=False)
    assert first in run.split.labeled
    assert run.split.reviews == {first: 1}
    assert "3 labeled (1 reviewed)" in commands.describe(run)
    save_review(data, second, "ignored", None, {"background": 0, "a": 1})
    run.model_path.unlink()
    assert commands.resume(run.folder, quiet).split == run.split
    assert run.model_path.is_file()
