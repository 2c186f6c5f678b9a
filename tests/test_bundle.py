"""MONAI bundles: MONAI accepts and loads them, and they predict as the run does."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import monai.bundle
import numpy as np
import pytest
import torch
from jsonschema import validate

from made_models import saved_model
from vclipseg import bundle
from vclipseg.data.volume import Volume, read_image, read_labels, with_values, write
from vclipseg.errors import UsageError
from vclipseg.inference import load

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TEXTS = (
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
    "authors", "copyright",
)  # fmt: skip
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in TEXTS},
        "changelog": {"type": "object"},
        "required_packages_version": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                side: {"type": "object", "additionalProperties": TENSOR}
                for side in ("inputs", "outputs")
            },
        },
    },
}
"""What MONAI's specification of bundles asks of metadata.json."""

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # of MONAI


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its bundle and a scan of two channels."""
    folder = tmp_path_factory.mktemp("bundle")
    file = saved_model(folder / "m.safetensors", num_classes=3, channels=2)
    bundle.export_bundle(load(file), file, folder / "atrium", licence="CC0-1.0")
    affine = np.diag([-1.2, 0.9, 2.0, 1.0])
    for channel in range(2):
        noise = np.random.default_rng(channel).normal(size=(1, 19, 25, 12)).astype(np.float32)
        write(Volume(noise, affine), folder / "scans" / f"a_{channel:04d}.nii.gz")
    return folder


def test_metadata_are_what_monai_asks_for(made):
    content = json.loads(
        (made / "atrium" / "configs" / "metadata.json").read_text(encoding="utf-8")
    )
    validate(content, SCHEMA)
    image = content["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["spatial_shape"]) == (2, [16, 16, 16])
    pred = content["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "background", "1": "organ", "2": "vessel"}
    assert content["copyright"] == "CC0-1.0"
    assert "CC0-1.0" in (made / "atrium" / "LICENSE").read_text(encoding="utf-8")
    texts = [file.read_bytes() for file in (made / "atrium").rglob("*") if file.is_file()]
    assert len(texts) == 5
    assert not any(b"somebody" in text or str(made).encode() in text for text in texts)


def test_monai_loads_the_network(made):
    network = monai.bundle.load("atrium", bundle_dir=made, workflow_type="inference")
    images = torch.randn(1, 2, 17, 30, 16)
    with torch.inference_mode():
        expected = load(made / "m.safetensors").method.predict(images)
        torch.testing.assert_close(network(images), expected, atol=1e-6, rtol=0)


def test_a_bundle_gives_the_masks_of_its_run(made, tmp_path):
    workflow = monai.bundle.ConfigWorkflow(
        config_file=str(made / "atrium/configs/inference.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(made / "atrium"),
        dataset_dir=str(made / "scans"),
        output_dir=str(tmp_path),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.run()
    scan = read_image(sorted((made / "scans").iterdir()))
    expected = load(made / "m.safetensors").predict(scan)
    mask = read_labels(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-6)
    assert (mask.array == with_values(expected.array, [0, 7, 300])).all()
    with pytest.raises(UsageError, match="exists already"):
        workflow.evaluator.run()


def test_a_zip_holds_the_same(made, tmp_path):
    file = made / "m.safetensors"
    bundle.export_bundle(load(file), file, tmp_path / "atrium.zip", licence="CC0-1.0")
    with zipfile.ZipFile(tmp_path / "atrium.zip") as archive:
        names = set(archive.namelist())
        metadata = archive.read("atrium/configs/metadata.json")
    files = [path for path in (made / "atrium").rglob("*") if path.is_file()]
    assert names == {str(path.relative_to(made)) for path in files}
    assert metadata == (made / "atrium/configs/metadata.json").read_bytes()


def test_only_bundles_are_replaced_and_only_when_asked(made, tmp_path):
    file = made / "m.safetensors"
    predictor = load(file)
    (tmp_path / "mine").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="exists already; give another name"):
            bundle.export_bundle(predictor, file, tmp_path / "mine", overwrite=overwrite)
    bundle.export_bundle(predictor, file, tmp_path / "atrium")
    weights = tmp_path / "atrium" / "models" / "model.pt"
    weights.write_bytes(b"old")
    with pytest.raises(UsageError, match="give --overwrite"):
        bundle.export_bundle(predictor, file, tmp_path / "atrium")
    bundle.export_bundle(predictor, file, tmp_path / "atrium", overwrite=True)
    assert weights.read_bytes() != b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atrium", "mine"]


def test_what_people_put_into_a_bundle_is_not_lost(made, tmp_path):
    """Its own configuration reads scans of `data` and writes masks to `predictions`."""
    file = made / "m.safetensors"
    bundle.export_bundle(load(file), file, tmp_path / "atrium")
    mine = tmp_path / "atrium" / "predictions" / "corrected.nii.gz"
    mine.parent.mkdir()
    mine.write_bytes(b"by hand")
    with pytest.raises(
        UsageError, match=r"holds predictions/corrected.nii.gz that no export wrote"
    ):
        bundle.export_bundle(load(file), file, tmp_path / "atrium", overwrite=True)
    assert mine.read_bytes() == b"by hand"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["verify_metadata", "verify_net_in_out"])
def test_monai_verifies_it(made, tmp_path, verb):
    """As MONAI's command line does; the schema lies there already, so that nothing is downloaded."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    configs = made / "atrium" / "configs"
    options = {
        "verify_metadata": ["--filepath", str(tmp_path / "schema.json")],
        "verify_net_in_out": [
            *("--net_id", "network_def", "--config_file", str(configs / "inference.json")),
            *("--device", "cpu"),
        ],
    }[verb]
    command = [sys.executable, "-m", "monai.bundle", verb, *options]
    done = subprocess.run(
        [*command, "--meta_file", str(configs / "metadata.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified with no error" in done.stdout + done.stderr
