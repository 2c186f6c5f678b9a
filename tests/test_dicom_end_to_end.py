"""From folders of DICOM to masks: the same as from volumes, and nothing of the patient on the way."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "data"))  # dicom_made
from dicom_made import PATIENT, PATIENT_ID, oblique, write_series

from toy import TINY
from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.data.volume import Volume, read_image, read_labels, reorient, write
from vclipseg.errors import UsageError
from vclipseg.scans import find_scans, predict_scans

SET = [part for override in (*TINY, "train.steps=40") for part in ("--set", override)]
SHAPE = (24, 20, 18)


def oblique_affine():
    affine = oblique()
    affine[:3, :3] *= 3 / 0.7
    return affine


def upside_down():
    """Slices from head to foot."""
    return np.array([[-3.0, 0, 0, 30], [0, -3, 0, 20], [0, 0, -4, 90], [0, 0, 0, 1]])


def balls(seed):
    """Noise with a ball in it, and the ball."""
    rng = np.random.default_rng(seed)
    center = np.array(SHAPE)[:, None, None, None] / 2 + rng.uniform(-2, 2, (3, 1, 1, 1))
    ball = np.linalg.norm(np.indices(SHAPE) - center, axis=0) < 6
    return np.rint(rng.normal(0, 60, SHAPE) + 300 * ball), ball.astype(np.uint8)


def save_case(root, part, name, seed, affine, labeled=True):
    array, ball = balls(seed)
    write_series(
        root / f"images{part}" / name, array, affine,
        series=f"1.2.{seed}", t0020_000d=f"1.3.{seed}", t0010_0020=f"{PATIENT_ID}-{seed}",
    )  # fmt: skip
    if labeled:
        write(Volume(ball, affine), root / f"labels{part}" / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two labeled cases, one of them called as its patient, an unlabeled one and one for the test."""
    root = tmp_path_factory.mktemp("dicom") / "balls"
    save_case(root, "", "oblique", 0, oblique_affine())
    save_case(root, "", f"{PATIENT_ID}-1", 1, upside_down())
    save_case(root, "Un", "more", 2, oblique_affine(), labeled=False)
    save_case(root, "Ts", f"{PATIENT_ID}-3", 3, upside_down())
    return root


@pytest.mark.slow
def test_the_whole_way(scans, tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("VCLIPSEG_HOME", str(tmp_path / "home"))
    before = {file: file.read_bytes() for file in scans.rglob("*") if file.is_file()}
    run = tmp_path / "run"
    log = []
    for words in (
        ("check", scans),
        ("prepare", scans, "--plan", tmp_path / "plan.json"),
        ("train", scans, "--out", run, "--method", "supervised", *SET),
        ("evaluate", run),
        ("predict", run, scans / "images" / "oblique", "-o", tmp_path / "oblique.nii.gz"),
        ("predict", run, scans / "imagesTs", "-o", tmp_path / "reversed.nii.gz"),
        ("predict", run, scans, "-o", tmp_path / "masks"),
    ):
        code, out, err = run_cli(*words)
        assert code == 0, err
        log += [] if words[0] == "predict" else [out, err]
    assert {file: file.read_bytes() for file in scans.rglob("*") if file.is_file()} == before
    assert len(list((tmp_path / "masks").iterdir())) == 4

    for name, seed, affine in (("oblique", 0, oblique_affine()), ("reversed", 3, upside_down())):
        volume = Volume(balls(seed)[0][None].astype(np.float32), affine)
        write(reorient(volume, "PSR"), tmp_path / f"{name}_scan.nii.gz")
        again = tmp_path / f"{name}_again.nii.gz"
        code, _, err = run_cli("predict", run, tmp_path / f"{name}_scan.nii.gz", "-o", again)
        assert code == 0, err
        mask = reorient(read_labels(tmp_path / f"{name}.nii.gz"))
        expected = reorient(read_labels(again))
        assert expected.array.any()
        assert not expected.array.all()
        np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-4)
        np.testing.assert_array_equal(mask.array, expected.array)
        np.testing.assert_allclose(
            mask.affine, reorient(Volume(balls(seed)[1], affine)).affine, atol=1e-4
        )

    secrets = [*PATIENT.lower().split("^"), PATIENT_ID.lower()]
    for folder in (run, tmp_path / "home"):
        for file in folder.rglob("*"):
            content = file.read_bytes() if file.is_file() else b""
            content += gzip.decompress(content) if file.suffix == ".gz" else b""
            told = str(file.relative_to(folder)).lower() + content.decode("latin-1").lower()
            assert not [secret for secret in secrets if secret in told], file
    assert not [secret for secret in secrets if secret in "".join(log).lower()]
    assert len(json.loads((run / "splits.json").read_text())["test"]) == 1


def test_cases_are_as_from_volumes(scans):
    dataset = open_dataset(scans)
    case = dataset.case("oblique")
    array, ball = balls(0)
    np.testing.assert_array_equal(dataset.image(case).array[0], array)
    np.testing.assert_array_equal(dataset.labels(case).array, ball)
    assert dataset.name == "balls"


# Which series are one scan


class Threshold:
    """What `predict_scans` knows of a predictor."""

    description = {"channel_names": ["CT"]}  # noqa: RUF012
    label_values = (0, 1)
    class_names = ("background", "bone")

    def predict(self, volume):
        return Volume((volume.array[0] > 150).astype(np.uint8), volume.affine)


def predict(inputs, output=None):
    return predict_scans(Threshold(), inputs, output, Console(quiet=True))


def test_a_series_by_its_folder_or_its_files(scans):
    folder = scans / "images" / "oblique"
    files = sorted(folder.iterdir())
    (whole,) = find_scans([folder], 1)
    assert (whole.name, whole.files) == ("oblique", (folder,))
    (same,) = find_scans(files[3:9], 1)
    assert (same.name, same.files) == ("oblique", (files[0],))
    assert read_image(same.files).shape == SHAPE


def test_a_mask_for_each_series_of_a_folder(tmp_path):
    for n in range(2):
        names = [f"{n}-{k}" for k in range(SHAPE[2])]
        write_series(
            tmp_path / "in", balls(n)[0], oblique_affine(), series=f"1.2.{n}", names=names,
            t0020_0011=str(n + 4),
        )  # fmt: skip
    written = predict([tmp_path / "in"], tmp_path / "out")
    assert [file.name for file in written] == ["in-4.nii.gz", "in-5.nii.gz"]
    for n, file in enumerate(written):
        mask = read_labels(file)
        np.testing.assert_array_equal(mask.array, balls(n)[0] > 150)
        np.testing.assert_allclose(mask.affine, oblique_affine(), atol=1e-4)
    with pytest.raises(UsageError, match="one file for several scans"):
        predict([tmp_path / "in"], tmp_path / "mask.nii.gz")


def test_a_mask_beside_a_series_is_no_scan(tmp_path):
    write_series(tmp_path / "a", balls(0)[0], oblique_affine())
    (written,) = predict([tmp_path / "a"])
    assert written == tmp_path / "a_seg.nii.gz"
    assert [scan.name for scan in find_scans([tmp_path], 1)] == ["a"]
