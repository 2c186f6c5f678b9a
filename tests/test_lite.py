"""Exported models: the same masks as `vclipseg predict`, and with hardly anything installed."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from data.made import affines, save_image
from made_models import soft_onnx, soft_predictor
from vclipseg import lite
from vclipseg.data import resample
from vclipseg.data.plan import Plan
from vclipseg.data.preprocess import prepare_image
from vclipseg.data.volume import Volume, read_image, read_labels, with_values, write
from vclipseg.errors import DataError, UsageError

SHEARED = np.array([[0, -1.1, 0.3, 5], [0.9, 0.2, 0, -20], [0, 0.1, 2.5, 7], [0, 0, 0, 1]])


def noise(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def plan(**values):
    return Plan.model_validate({"spacing": (1.0, 1.0, 1.0), "intensity": ("zscore",), **values})


# Preparing, against what training does


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 14)] * 3))
@settings(max_examples=40, deadline=None)
def test_linear_is_that_of_torch(old, new):
    x = noise(old)
    found = lite.linear(x, new)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, resample.linear(x, new).numpy(), atol=2e-6)


def test_places_along_a_large_axis_are_rounded_as_by_torch():
    x = noise((211, 3, 2))
    np.testing.assert_allclose(
        lite.linear(x, (487, 3, 2)), resample.linear(x, (487, 3, 2)).numpy(), atol=2e-6
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sigma", [0.55, 1.3, 4.0])
def test_smoothing_is_that_of_scipy(axis, sigma):
    x = noise((9, 7, 5))
    expected = gaussian_filter1d(x, sigma, axis=axis, mode="nearest")
    np.testing.assert_allclose(lite.smooth(x, sigma, axis), expected, atol=1e-6)


def test_the_first_of_equals_wins():
    values = np.random.default_rng(0).integers(0, 3, (4, 5, 6, 7)).astype(np.float32)
    expected = resample.running_argmax(map(torch.from_numpy, values))
    assert (lite.running_argmax(values) == expected).all()


PLANS = [
    plan(),
    plan(orientation="LPI", spacing=(0.7, 1.3, 2.0), intensity=("percentile",)),
    plan(spacing=(4.0, 0.8, 1.0), intensity=("window",), window=(-1.0, 2.0)),
    plan(crop="nonzero", intensity=("rescale", "none"), spacing=(1.5, 1.5, 1.5)),
]


@pytest.mark.parametrize("followed", PLANS, ids=range(len(PLANS)))
@given(affine=affines())
@settings(max_examples=10, deadline=None)
def test_images_are_prepared_as_for_training(followed, affine):
    array = noise((len(followed.intensity), 9, 8, 7))
    array[:, :2] = array[:, :, 6:] = 0
    expected, expected_trace = prepare_image(Volume(array, affine), followed)
    found, trace = lite.prepare(Volume(array, affine), followed.model_dump(mode="json"))
    assert trace == expected_trace
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.array, atol=1e-5)


# Predicting, against torch


@pytest.mark.parametrize(
    ("predict", "followed"),
    [
        ({"mode": "window"}, PLANS[0]),
        ({"mode": "whole"}, PLANS[1]),
        ({"mode": "auto"}, PLANS[1]),
        ({"mode": "window", "stride": (3, 2, 4), "blend": "uniform"}, PLANS[2]),
        ({"mode": "window", "window": (6, 64, 5)}, PLANS[3]),
    ],
    ids=["window", "whole", "auto", "stride", "two channels"],
)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_masks_are_those_of_torch(predict, followed, engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    channels = len(followed.intensity)
    predictor = soft_predictor(
        channels=channels,
        plan=followed.model_dump(mode="json"),
        predict={"precision": "fp32", **predict},
        patch=[8, 8, 8],
    )
    model = lite.Model(soft_onnx(tmp_path / "soft.onnx", predictor), 1, engine)
    image = Volume(noise((channels, 13, 10, 17)), SHEARED)
    image.array[:, :2] = 0
    probs = predictor.probabilities(image)
    found = model.probabilities(image)
    assert np.array_equal(found.affine, SHEARED)
    np.testing.assert_allclose(found.array, probs.array, atol=1e-5)
    mask, expected = model.predict(image), predictor.predict(image)
    sure = abs(probs.array[0] - probs.array[1]) > 1e-4
    assert sure.mean() > 0.9
    assert (mask.array == with_values(expected.array, [0, 7]))[sure].all()
    assert mask.array.dtype == np.uint8


def test_another_number_of_channels_is_refused(tmp_path):
    model = lite.Model(soft_onnx(tmp_path / "soft.onnx", soft_predictor()))
    with pytest.raises(UsageError, match=r"1 channel\(s\) \(MR0\).*\(2, 8, 8, 8\)"):
        model.predict(Volume(noise((2, 8, 8, 8)), np.eye(4)))


def test_files_that_are_no_model(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        lite.Model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(DataError, match=r"text.onnx: not a readable ONNX model"):
        lite.Model(tmp_path / "text.onnx")


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a scan."""
    folder = tmp_path_factory.mktemp("lite")
    soft_onnx(folder / "soft.onnx", soft_predictor(patch=[8, 8, 8]))
    write(Volume(noise((1, 9, 12, 10)), SHEARED), folder / "scan.nii.gz")
    return folder


def test_a_mask_has_the_geometry_of_its_scan(folder, capsys):
    mask = folder / "mask.nii.gz"
    arguments = [str(folder / "soft.onnx"), str(folder / "scan.nii.gz"), "-o", str(mask)]
    assert lite.main([*arguments, "--probabilities"]) == 0
    assert capsys.readouterr().out == f"{folder / 'mask_probs.nii.gz'}\n{mask}\n"
    scan, written = nib.load(folder / "scan.nii.gz"), nib.load(mask)
    assert written.shape == scan.shape
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-6)
    labels = read_labels(mask).array
    probs = read_image(folder / "mask_probs.nii.gz").array
    assert (labels == with_values(probs.argmax(0), [0, 7])).all()
    before = mask.read_bytes()
    assert lite.main(arguments) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert mask.read_bytes() == before
    assert lite.main([*arguments, "--overwrite"]) == 0
    assert (read_labels(mask).array == labels).all()
    scan = folder / "scan.nii.gz"
    before = scan.read_bytes()
    assert lite.main([*arguments[:2], "-o", str(scan), "--overwrite"]) == 2
    assert "is the scan itself" in capsys.readouterr().err
    assert scan.read_bytes() == before


def test_an_image_without_numbers_has_no_mask(folder, tmp_path, capsys):
    """As `vclipseg predict` says it."""
    empty, part = (tmp_path / f"{name}.nii.gz" for name in ("empty", "part"))
    write(Volume(np.full((1, 9, 12, 10), np.nan, np.float32), SHEARED), empty)
    values = noise((1, 9, 12, 10))
    values[0, 0, 0, :3] = np.nan
    write(Volume(values, SHEARED), part)
    model, mask = str(folder / "soft.onnx"), tmp_path / "mask.nii.gz"
    assert lite.main([model, str(empty), "-o", str(mask)]) == 3
    assert "no voxel is a number" in capsys.readouterr().err
    assert not mask.exists()
    assert lite.main([model, str(part), "-o", str(mask)]) == 0
    assert "part.nii.gz: 3 voxels are no numbers" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_message(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "mask.nii.gz"
    assert (
        lite.main([str(folder / "soft.onnx"), str(folder / "scan.nii.gz"), "-o", str(target)]) == 2
    )
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_a_channel(tmp_path):
    soft_onnx(tmp_path / "soft.onnx", soft_predictor(channels=2, plan=PLANS[3].model_dump()))
    files = [save_image(tmp_path / f"scan_{i:04d}.nii.gz", seed=i) for i in range(2)]
    model = str(tmp_path / "soft.onnx")
    assert lite.main([model, *map(str, files), "-o", str(tmp_path / "mask.nii")]) == 0
    expected = lite.Model(tmp_path / "soft.onnx").predict(read_image(files)).array
    assert (read_labels(tmp_path / "mask.nii").array == expected).all()
    assert lite.main([model, str(files[0]), "-o", str(tmp_path / "other.nii")]) == 2


def test_a_model_says_what_it_is(folder, capsys):
    assert lite.main([str(folder / "soft.onnx"), "--info"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert tuple(said) == lite.KEYS
    assert said["class_names"] == ["background", "organ"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["soft.onnx"], 2, "no scan given"),
        (["none.onnx", "scan.nii.gz"], 2, "none.onnx: no such file"),
        (["soft.onnx", "none.nii.gz"], 3, "none.nii.gz: there is no such file"),
        (["soft.onnx", "scan.mha"], 2, "only NIfTI"),
        (["soft.onnx", "scan.nii.gz", "-o", "mask.png"], 2, "only NIfTI"),
        (["scan.nii.gz", "--info"], 3, "not a readable ONNX model"),
        (["soft.onnx", "scan.nii.gz", "--engine", "openvino"], 2, "pip install openvino"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    folder, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    assert lite.main(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


# Without the rest


ALLOWED = (
    "numpy", "nibabel", "onnxruntime", "vclipseg",
    # what these three need
    "packaging", "google", "flatbuffers", "typing_extensions", "importlib_resources",
)  # fmt: skip
ALONE = f"""
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {ALLOWED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv[0] = "lite"
runpy.run_module("vclipseg.lite", run_name="__main__")
"""


@pytest.mark.slow
def test_runs_where_little_is_installed(folder, tmp_path):
    """numpy, nibabel and onnxruntime, and what they need; no torch, pydantic, SimpleITK, scipy."""
    mask = tmp_path / "mask.nii.gz"
    arguments = [str(folder / "soft.onnx"), str(folder / "scan.nii.gz"), "-o", str(mask)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = lite.Model(folder / "soft.onnx").predict(read_image(folder / "scan.nii.gz"))
    assert (read_labels(mask).array == expected.array).all()


@pytest.mark.slow
def test_imports_nothing_heavy():
    heavy = ("torch", "pydantic", "SimpleITK", "h5py", "monai", "typer", "safetensors")
    code = f"import vclipseg.lite, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
