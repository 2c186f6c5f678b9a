from __future__ import annotations

import pytest

from toy import TINY
from vclipseg.commands import default_folder, resolve_train, summary_lines
from vclipseg.config import load_experiment
from vclipseg.data.datasets import open_dataset
from vclipseg.data.plan import PlanSettings, make_plan
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
