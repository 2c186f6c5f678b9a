"""One-file models: every method's network leaves torch as it is, and says where it came from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from made_models import randomized, saved_model
from toy import RECIPES_IN_TIME, build
from vclipseg import commands, export, lite
from vclipseg.data.volume import Volume, with_values
from vclipseg.errors import DataError, UsageError
from vclipseg.inference import load
from vclipseg.methods import METHODS

SIZES = [(2, 1), (3, 2), (4, 1), (2, 3)]  # classes and channels
PREDICTING = [
    *((name, {}, *SIZES[i % len(SIZES)]) for i, name in enumerate(METHODS)),
    ("mean_teacher", {"predict_with": "teacher"}, 2, 1),
    ("cps", {"predict_with": "mean"}, 2, 2),
    ("mcnet", {"predict_with": "mean", "decoders": 3}, 3, 1),
    ("vclipseg", {"predict_with": "first"}, 3, 2),
]


# The network


@pytest.mark.parametrize(("name", "preset"), RECIPES_IN_TIME)
def test_plain_layers_predict_the_same(name, preset):
    method = randomized(build(name, preset, num_classes=3, channels=2, filters=2))
    images = torch.randn(1, 2, 32, 16, 17)
    with torch.inference_mode():
        expected = method.predict(images)
        found = export.plain(method)(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "preset"), RECIPES_IN_TIME)
def test_what_only_training_needs_is_left_out(name, preset):
    method = build(name, preset, filters=2)
    kept = {key for key in method.state_dict() if not key.startswith(method.training_only)}
    assert set(export.without_training(method).state_dict()) == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "num_classes", "channels"),
    PREDICTING,
    ids=["-".join([p[0], *map(str, p[1].values()), f"{p[2]}-{p[3]}"]) for p in PREDICTING],
)
def test_every_method_is_exported(name, settings, num_classes, channels, tmp_path):
    """The graph gives torch's probabilities for any batch and size, and for borders repeated."""
    file = saved_model(
        tmp_path / "m.safetensors", name, num_classes=num_classes, channels=channels, **settings
    )
    predictor = load(file)
    export.export_onnx(predictor, file, tmp_path / "m.onnx")
    images = torch.randn(2, channels, 16, 48, 32)
    with torch.inference_mode():
        expected = predictor.method.predict(images).numpy()
        odd = predictor.method.predict(images[:1, :, :5, :33, 7:])[0].numpy()
    for engine in ("onnxruntime", "openvino"):
        model = lite.Model(tmp_path / "m.onnx", 1, engine)
        np.testing.assert_allclose(model.network(images.numpy()), expected, atol=1e-5)
        np.testing.assert_allclose(model.run(images.numpy()[0, :, :5, :33, 7:]), odd, atol=1e-5)


# The file


@pytest.mark.slow
def test_an_exported_model_gives_the_masks_of_its_run(tmp_path):
    file = saved_model(tmp_path / "m.safetensors", num_classes=3)
    assert export.export_onnx(load(file), file, tmp_path / "m.onnx", licence="CC-BY-4.0")
    affine = np.diag([-1.2, 0.9, 2.0, 1.0])
    image = Volume(np.random.default_rng(0).normal(size=(1, 30, 25, 13)).astype(np.float32), affine)
    predictor = load(file)
    probs = np.sort(predictor.probabilities(image).array, axis=0)
    expected = with_values(predictor.predict(image).array, [0, 7, 300])
    model = lite.Model(tmp_path / "m.onnx", threads=1)
    same = model.predict(image).array == expected
    assert same.mean() >= 0.9999
    assert (probs[-1] - probs[-2])[~same].max(initial=0) < 1e-4
    assert model.info["licence"] == {"model": "CC-BY-4.0"}
    assert list(tmp_path.glob("*.onnx*")) == [tmp_path / "m.onnx"]  # no second file for weights
    text = (tmp_path / "m.onnx").read_bytes()
    for path in (b"somebody", b"vclipseg/networks", str(tmp_path).encode()):
        assert path not in text  # nothing of the machines it was trained and exported on


def test_what_a_model_says_of_itself(tmp_path):
    file = saved_model(tmp_path / "m.safetensors", channels=2)
    said = export.describe(load(file), file, "CC0-1.0")
    assert tuple(said) == lite.KEYS
    assert json.loads(json.dumps(said)) == said
    assert said["plan"]["spacing"] == [1.0, 1.0, 1.0]
    assert said["label_values"] == [0, 7]
    assert (said["window"], said["multiple"], said["filters"]) == ([16, 16, 16], 16, 2)
    assert said["text"]["source"] == "orthogonal"
    assert said["provenance"]["settings_hash"] == "0123456789ab"
    assert said["provenance"]["data"] == {"name": "toy", "layout": "plain", "hash": "h"}
    assert said["provenance"]["settings"]["method"]["name"] == "vclipseg"
    assert said["licence"] == {"model": "CC0-1.0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ({"source": "random"}, {}),
        (
            {"source": "clip", "model": "openai/clip-vit-base-patch32"},
            {"text_vectors": "text vectors of CLIP (clip-vit-base-patch32): MIT"},
        ),
        (
            {"source": "file", "made_as": "clip", "model": "/home/somebody/biomedclip"},
            {"text_vectors": "text vectors of CLIP (biomedclip): see that model"},
        ),
    ],
)
def test_the_licence_of_text_vectors(text, expected):
    assert export.text_licence(text) == expected


def test_paths_become_names():
    value = {"a": ["/home/somebody/vectors.safetensors", "A pixel of a/an {item}."], "b": 1}
    assert export.without_folders(value) == {
        "a": ["vectors.safetensors", "A pixel of a/an {item}."],
        "b": 1,
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("../../home/somebody/vec.safetensors", "vec.safetensors"),
        ("~/secret/model", "model"),
        (r"C:\Users\somebody\clip", "clip"),
        ("runs/somebody/vec.safetensors", "vec.safetensors"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ],
)
def test_paths_of_any_system_become_names(path, name):
    assert export.without_folders(path) == name


def test_labeled_cases_become_a_number():
    named = {"data": {"labeled": ["Mueller_Anna_1950", "Somebody_Else"], "fold": None}, "name": "a"}
    counted = {"data": {"labeled": 2, "fold": None}, "name": "a"}
    assert export.without_cases(named) == counted
    assert export.without_cases(counted) == counted


def test_a_folder_is_no_place_for_a_file(tmp_path):
    file = saved_model(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="is a folder"):
        export.export_onnx(load(file), file, tmp_path, overwrite=True)


def test_nothing_is_replaced_unasked(tmp_path):
    file = saved_model(tmp_path / "m.safetensors")
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(UsageError, match=r"m.onnx: exists already; give --overwrite"):
        export.export_onnx(load(file), file, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text(encoding="utf-8") == "mine"


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    file = saved_model(tmp_path / "m.safetensors")
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(
        UsageError, match=r'^no_such_package: not.*pip install "vclipseg\[export\]"'
    ):
        export.export_onnx(load(file), file, tmp_path / "m.onnx")


def test_the_name_decides_the_format(tmp_path):
    file = saved_model(tmp_path / "m.safetensors")
    result, lines = commands.export(file, tmp_path / "atrium", licence="CC0-1.0")
    assert lines == [str(tmp_path / "atrium")]
    assert result["copyright"] == "CC0-1.0"
    assert (tmp_path / "atrium" / "configs" / "inference.json").is_file()


def test_an_unknown_format(tmp_path):
    with pytest.raises(UsageError, match="there are onnx and monai"):
        commands.export(tmp_path, tmp_path / "m", "caffe", licence="")


@pytest.mark.slow
def test_a_file_that_predicts_something_else_is_not_left(tmp_path, monkeypatch):
    file = saved_model(tmp_path / "m.safetensors", "supervised")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(DataError, match=r"differ from torch's by"):
        export.export_onnx(load(file), file, tmp_path / "m.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]
