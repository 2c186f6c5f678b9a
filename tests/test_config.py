from __future__ import annotations

import pytest

from vclipseg.config import (
    Experiment,
    build_experiment,
    load_experiment,
    merge,
    overridden,
    parse_override,
    read_recipe,
)
from vclipseg.errors import UsageError
from vclipseg.inference import PredictSettings
from vclipseg.methods import METHODS, NEEDS_TEXT, preset, presets


def recipe(folder, text, name="recipe.toml"):
    path = folder / name
    path.write_text(text)
    return path


# Layers: defaults, preset, own-data defaults, extended recipe, recipe, overrides


def test_nothing_said_is_the_default_method_with_its_robust_preset():
    e = load_experiment()
    assert (e.method_name, e.preset) == ("vclipseg", "robust")
    own = preset("vclipseg", "robust")
    assert own["method"].items() <= e.method.model_dump().items()
    assert own["train"].items() <= e.train.model_dump().items()


@pytest.mark.parametrize(
    ("name", "preset_name"), [(name, p) for name in METHODS for p in presets(name)]
)
def test_every_preset_makes_an_experiment(name, preset_name):
    e = load_experiment(None, [f"method.name={name}", f"method.preset={preset_name}"])
    assert (e.method_name, e.preset) == (name, preset_name)
    assert e.needs_text == (name in NEEDS_TEXT)
    for section, values in preset(name, preset_name).items():
        found = getattr(e, section).model_dump()
        checked = type(getattr(e, section)).model_validate(values).model_dump(include=set(values))
        assert checked.items() <= found.items()


def test_later_layers_win(tmp_path):
    recipe(
        tmp_path,
        'name = "base"\n[train]\nsteps = 1\nlr = 0.5\n[method]\nfilters = 3\n',
        "base.toml",
    )
    path = recipe(
        tmp_path,
        'extends = "base.toml"\n[method]\nname = "supervised"\npreset = "faithful"\n'
        "[train]\nsteps = 2\nseed = 5\n",
    )
    defaults = {"train": {"steps": 9, "lr": 9.0, "momentum": 0.4}, "method": {"filters": 9}}
    e = load_experiment(path, ["train.seed=7", "method.dropout=0.25"], defaults)
    assert (e.name, e.method_name, e.preset) == ("base", "supervised", "faithful")
    assert (e.train.steps, e.train.seed, e.train.lr) == (2, 7, 0.5)  # recipe, override, base
    assert e.train.momentum == 0.4  # defaults, over the preset
    assert e.train.optimizer == preset("supervised", "faithful")["train"]["optimizer"]
    assert (e.method.filters, e.method.dropout, e.method.dice) == (3, 0.25, "squared")


def test_presets_are_not_changed_by_what_is_laid_over_them():
    before = load_experiment()
    load_experiment(None, ["train.lr=0.123", "method.dropout=0.77", "text.words.a=b"])
    assert load_experiment() == before


def test_extends_is_relative_to_the_recipe_and_may_go_on(tmp_path):
    (tmp_path / "deep").mkdir()
    recipe(tmp_path, "[train]\nsteps = 1\nseed = 1\nlr = 0.1", "a.toml")
    recipe(tmp_path, 'extends = "../a.toml"\n[train]\nsteps = 2\nseed = 2', "deep/b.toml")
    path = recipe(tmp_path, 'extends = "deep/b.toml"\n[train]\nsteps = 3', "c.toml")
    assert read_recipe(path) == {"train": {"steps": 3, "seed": 2, "lr": 0.1}}


# Errors name the file, the key and the nearest name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstpes = 5", "train.stpes: unknown setting; did you mean steps?"),
        ("[trian]\nsteps = 5", "trian: unknown setting; did you mean train?"),
        (
            "[method]\ncopypaste = 0.5",
            "method.copypaste: unknown setting; did you mean copy_paste?",
        ),
        ("[method]\nzzz = 0.5", "method.zzz: unknown setting"),
        ("[train]\nsteps = 0", "train.steps: Input should be greater than 0 (got 0)"),
        ('[train]\nsteps = "many"', "train.steps: "),
        ("[train]\npatch = [1, 2]", "train.patch.2: "),
        ('[prepare]\norientation = "RRS"', "prepare.orientation: "),
        ("train = 5", "train: "),
        ('method = "supervised"', "method: expected method.name = 'supervised'"),
        ("[augment]\nintensity = 9", "augment.intensity: "),
        ('[text]\nsource = "bert"', "text.source: "),
        ("steps = 5", "steps: unknown setting; did you mean steps?"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_experiment(path)
    assert f"{path}: {message}" in str(error.value)


def test_each_mistake_has_a_line():
    with pytest.raises(UsageError) as error:
        load_experiment(None, ["train.lr=-1", "predict.batch=0", "data.lableed=4"])
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["data.lableed", "train.lr", "predict.batch"]
    assert "did you mean labeled?" in lines[0]


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(UsageError, match=f"no method 'unet'; there are {', '.join(METHODS)}"):
        load_experiment(None, ["method.name=unet"])
    with pytest.raises(UsageError, match=r"no preset 'best'; it has .*faithful"):
        load_experiment(None, ["method.preset=best"])


def test_broken_recipes(tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        load_experiment(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="no such recipe"):
        load_experiment(tmp_path)
    broken = recipe(tmp_path, "[train\nsteps = 5")
    with pytest.raises(UsageError, match=r"recipe\.toml: not valid TOML"):
        load_experiment(broken)
    with pytest.raises(UsageError, match=r"base\.toml: no such recipe"):
        load_experiment(recipe(tmp_path, 'extends = "base.toml"'))
    recipe(tmp_path, 'extends = "b.toml"', "a.toml")
    recipe(tmp_path, 'extends = "a.toml"', "b.toml")
    with pytest.raises(UsageError, match=r"a\.toml: extends itself"):
        load_experiment(tmp_path / "a.toml")


# Overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=500", {"train": {"steps": 500}}),
        ("train.lr = 1e-3", {"train": {"lr": 0.001}}),
        ("train.patch=[32, 32, 16]", {"train": {"patch": [32, 32, 16]}}),
        ("augment.rotate_flip=true", {"augment": {"rotate_flip": True}}),
        ("text.source=orthogonal", {"text": {"source": "orthogonal"}}),
        ('text.source="clip"', {"text": {"source": "clip"}}),
        ("text.template=A {item} = x", {"text": {"template": "A {item} = x"}}),
        ("text.words.left atrium=atrium", {"text": {"words": {"left atrium": "atrium"}}}),
        ("text.words={a = 'b'}", {"text": {"words": {"a": "b"}}}),
        ("name=", {"name": ""}),
    ],
)
def test_parse_override(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["train.steps", "=5", " =5", ""])
def test_an_override_without_a_key_or_value(text):
    with pytest.raises(UsageError, match="expected key=value, such as"):
        parse_override(text)


def test_merge_goes_table_by_table():
    below = {"a": {"x": 1, "y": 2}, "b": 1}
    above = {"a": {"y": 3}, "b": {"z": 1}, "c": {"d": 4}}
    merge(below, above)
    assert below == {"a": {"x": 1, "y": 3}, "b": {"z": 1}, "c": {"d": 4}}
    below["c"]["d"] = 5
    assert above["c"] == {"d": 4}


def test_overridden_keeps_a_runs_own_settings():
    own = PredictSettings(stride=(18, 18, 4), blend="uniform")
    found = overridden(
        own, ["predict.batch=2", "train.steps=1", "predict.blend=gaussian"], "predict"
    )
    assert (found.stride, found.blend, found.batch) == ((18, 18, 4), "gaussian", 2)
    assert overridden(own, [], "predict") == own
    with pytest.raises(
        UsageError, match=r"--set: predict\.bach: unknown setting; did you mean batch"
    ):
        overridden(own, ["predict.bach=2"], "predict")


# Round trip


@pytest.mark.parametrize("name", list(METHODS))
def test_json_makes_the_same_experiment(name):
    e = load_experiment(None, [f"method.name={name}", "train.seed=3", "data.labeled=['a', 'b']"])
    content = e.to_json()
    again = build_experiment(
        {
            **{k: v for k, v in content.items() if k != "preset"},
            "method": {**content["method"], "preset": content["preset"]},
        },
        {},
    )
    assert again == e
    assert again.to_json() == content
    assert type(again.method) is type(e.method)


def test_an_experiment_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_experiment().name = "other"
    assert isinstance(load_experiment(), Experiment)
