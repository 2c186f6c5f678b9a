"""Scans in, masks out, and what is refused."""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import tempfile
import threading

import nibabel as nib
import numpy as np
import pytest
from dicom_made import oblique, write_series
from fastapi.testclient import TestClient
from scans_made import archive, fake_dicom, hostile, nifti, with_header

from vclipseg.data.dicom import read_series
from vclipseg.data.dicom_objects import read_labels as read_object
from vclipseg.data.volume import read_image
from vclipseg.inference import load
from vclipseg.serve import incoming
from vclipseg.serve.app import create_app
from vclipseg.serve.incoming import Scans
from vclipseg.serve.limits import ScanLimits, TooMuch, shown_name
from vclipseg.serve.temporary import TemporaryFolder

SMALL = ScanLimits(voxels=2_000_000, unpacked_bytes=20_000_000, files=100, kept=3)


def send(client, *files, run="first"):
    return client.post(f"/api/runs/{run}/scans", files=[("files", file) for file in files])


@pytest.fixture
def strict(runs):
    with TestClient(create_app(runs, scan_limits=SMALL), base_url="http://localhost:8000") as made:
        yield made


def test_the_mask_is_that_of_predict(client, runs, tmp_path, ended):
    content = nifti()
    scan = send(client, ("scan.nii.gz", content))
    assert scan.status_code == 202
    scan = scan.json()
    assert scan["name"] == "scan.nii.gz"
    job = ended(scan["job"])
    assert job["state"] == "done", job
    assert set(job["result"]["volumes_ml"]) == {"left atrium"}
    answer = client.get(f"/api/scans/{scan['id']}/masks/first")
    assert 'filename="scan_seg.nii.gz"' in answer.headers["content-disposition"]
    (tmp_path / "scan.nii.gz").write_bytes(content)
    (tmp_path / "mask.nii.gz").write_bytes(answer.content)
    image = read_image(tmp_path / "scan.nii.gz")
    found = read_image(tmp_path / "mask.nii.gz")
    assert np.array_equal(found.array[0], load(runs / "first").predict(image).array)
    assert np.allclose(found.affine, image.affine, atol=1e-4)
    for path in ("image.nii.gz", "masks/first.nii.gz"):
        assert client.get(f"/api/scans/{scan['id']}/{path}").status_code == 200
    assert client.get(f"/api/scans/{scan['id']}/masks/second").status_code == 404
    assert client.get(f"/api/scans/{scan['id']}/masks/first?format=pickle").status_code == 422
    assert client.delete(f"/api/scans/{scan['id']}").status_code == 204
    assert client.get(f"/api/scans/{scan['id']}/masks/first").status_code == 404


@pytest.fixture
def sent_series(client, tmp_path, ended):
    """A zipped DICOM series that was sent and predicted: its folder, and the scan."""
    folder = write_series(
        tmp_path / "series", np.random.default_rng(0).normal(0, 100, (24, 24, 12)), oblique()
    )
    files = {f"some/where/{p.name}": p.read_bytes() for p in folder.iterdir()}
    scan = send(client, ("series.zip", archive(files))).json()
    job = ended(scan["job"], 120)
    assert job["state"] == "done", job
    return folder, scan


def test_a_zipped_dicom_series(client, sent_series):
    _, scan = sent_series
    assert client.get(f"/api/scans/{scan['id']}/image.nii.gz").status_code == 200


@pytest.mark.slow
def test_the_mask_of_a_dicom_series_as_an_object_of_it(client, sent_series, tmp_path):
    pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")
    folder, scan = sent_series
    assert scan["formats"] == ["nifti", "seg", "seg-labelmap", "rtstruct"]
    image = read_series(folder)
    url = f"/api/scans/{scan['id']}/masks/first"
    expected = read_labels_of(client.get(f"{url}.nii.gz").content, tmp_path / "mask.nii.gz")
    for kind in ("seg", "rtstruct"):
        answer = client.get(f"{url}?format={kind}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/dicom"
        assert 'filename="series_seg.dcm"' in answer.headers["content-disposition"]
        assert client.get(f"{url}?format={kind}").content == answer.content  # the same object
        (tmp_path / f"{kind}.dcm").write_bytes(answer.content)
        found = read_object(tmp_path / f"{kind}.dcm", image, ("background", "left atrium"))
        assert np.array_equal(found.array, expected)


def read_labels_of(content, path):
    path.write_bytes(content)
    return read_image(path).array[0]


def test_no_dicom_object_without_a_series(client, ended):
    scan = send(client, ("a.nii.gz", nifti())).json()
    assert scan["formats"] == ["nifti"]
    ended(scan["job"])
    answer = client.get(f"/api/scans/{scan['id']}/masks/first?format=seg")
    assert answer.status_code == 400
    assert "was not sent as DICOM" in answer.json()["detail"]


@pytest.mark.parametrize("name", hostile())
def test_what_is_damaged_or_too_much_is_refused(strict, name):
    answer = send(strict, (name, hostile()[name]))
    if answer.status_code == 202:  # the voxels, not the header, are at fault
        job = answer.json()["job"]
        while job["state"] in ("waiting", "running"):
            job = strict.get(f"/api/jobs/{job['id']}").json()
        assert job["state"] == "failed"
        detail = job["message"]
        assert "server's own output" not in detail
    else:
        assert answer.status_code in (400, 413, 422), answer.text
        detail = answer.json()["detail"]
    assert "/tmp" not in detail
    assert not list(strict.app.state.served.scans.folder.glob("*/sent/*.txt"))


def test_dicom_that_is_none_ends_its_own_process_only(strict):
    answer = send(strict, ("a.zip", archive({f"{i}.dcm": fake_dicom() for i in range(3)})))
    job = answer.json()["job"]
    while job["state"] in ("waiting", "running"):
        job = strict.get(f"/api/jobs/{job['id']}").json()
    assert job["state"] == "failed"
    assert "cannot be read" in job["message"]
    assert "/tmp" not in job["message"]
    assert strict.get("/api/runs").status_code == 200


def test_voxels_that_are_no_numbers(client, ended):
    raw = bytearray(with_header(nifti(), (70, "h", 16), (72, "h", 32)))
    raw[352:] = np.full(24 * 24 * 18, np.nan, "<f4").tobytes()
    job = ended(send(client, ("a.nii", bytes(raw))).json()["job"])
    assert "no numbers" in job["message"]


def test_a_spacing_that_would_blow_up(strict, ended):
    """A small file may say that its voxels are a meter wide."""
    content = with_header(nifti(), *((280 + 20 * i, "f", 1000.0) for i in range(3)))
    job = send(strict, ("a.nii", content)).json()["job"]
    while job["state"] in ("waiting", "running"):
        job = strict.get(f"/api/jobs/{job['id']}").json()
    assert "Is its spacing right?" in job["message"]


def test_names_are_not_paths(client, ended):
    for name in ("../../evil.nii.gz", "/etc/passwd", "..\\..\\evil", "a\0b.nii", "x" * 500):
        scan = send(client, (name, nifti())).json()
        assert "/" not in scan["name"]
        assert "\\" not in scan["name"]
        assert len(scan["name"]) <= 80
        client.delete(f"/api/scans/{scan['id']}")
    assert shown_name("../..") == "scan"
    assert shown_name(None) == "scan"
    assert shown_name('a"\r\nSet-Cookie: x') == "a_Set-Cookie_ x"


def test_channels_are_counted(client, ended):
    job = ended(send(client, ("a.nii.gz", nifti()), ("b.nii.gz", nifti())).json()["job"])
    assert "reads images of 1 channel" in job["message"]
    assert send(client, ("a.nii.gz", nifti()), ("b.zip", archive({}))).status_code == 400
    assert client.post("/api/runs/first/scans").status_code == 422


def test_the_queue_is_short(runs, monkeypatch):
    with TestClient(create_app(runs, waiting=0), base_url="http://localhost") as client:
        answer = send(client, ("a.nii.gz", nifti()))
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert not list(client.app.state.served.scans.folder.iterdir())


def test_a_run_without_a_model(client, runs):
    (runs / "first/checkpoints/model.safetensors").unlink()
    answer = send(client, ("a.nii.gz", nifti()))
    assert answer.status_code == 400
    assert "no finished model" in answer.json()["detail"]


def test_the_oldest_scans_are_forgotten(tmp_path):
    scans = Scans(tmp_path / "scans", SMALL)
    made = [scans.add([("a.nii.gz", io.BytesIO(nifti()))]) for _ in range(5)]
    assert [scans.get(scan.id) is not None for scan in made] == [False, False, True, True, True]
    assert len(list(scans.folder.iterdir())) == 3
    with pytest.raises(TooMuch):
        scans.add([])


def test_scans_that_another_request_forgets_are_no_error(tmp_path):
    scans = Scans(tmp_path / "scans", SMALL)
    first = scans.add([("a.nii.gz", io.BytesIO(nifti()))])
    shutil.rmtree(first.folder)  # as between another's decision and its end
    second = scans.add([("b.nii.gz", io.BytesIO(nifti()))])
    assert first.size == 0
    assert second.size > 0


def test_nothing_is_left_when_the_server_ends(runs):
    with TestClient(create_app(runs), base_url="http://localhost") as client:
        send(client, ("a.nii.gz", nifti()))
        folder = client.app.state.served.temporary
        assert folder.is_dir()
    assert not folder.exists()


def test_a_scan_forgotten_while_it_is_predicted_is_gone(client, ended):
    state = client.app.state.served
    begun, go_on = threading.Event(), threading.Event()
    look = state.models.look

    def slow(*arguments):
        begun.set()
        go_on.wait(10)
        return look(*arguments)

    state.models.look = slow
    scan = send(client, ("a.nii.gz", nifti())).json()
    begun.wait(10)
    assert client.delete(f"/api/scans/{scan['id']}").status_code == 204
    go_on.set()
    assert "forgotten" in ended(scan["job"])["message"]
    assert list(state.scans.folder.iterdir()) == []


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = TemporaryFolder()
    killed = tmp_path / "vclipseg-serve-killed"
    killed.mkdir()
    (killed / ".lock").touch()  # of a process that is gone
    (killed / "scan.dcm").touch()
    (tmp_path / "vclipseg-serve-begun").mkdir()  # not locked yet
    other = TemporaryFolder()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {living.path.name, other.path.name, "vclipseg-serve-begun"}
    for folder in (living, other):
        folder.remove()
        assert not folder.path.exists()


def test_a_mask_has_both_places_of_its_scan(client, ended):
    """As that of `vclipseg predict`: where a coregistration left two, viewers choose differently."""
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti()))
    elsewhere = image.affine.copy()
    elsewhere[:3, 3] += (30, 40, 50)
    image.set_qform(elsewhere, 1)
    scan = send(client, ("a.nii", image.to_bytes())).json()
    assert ended(scan["job"])["state"] == "done"
    answer = client.get(f"/api/scans/{scan['id']}/masks/first")
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert np.allclose(mask.get_qform(), elsewhere, atol=1e-4)
    assert np.allclose(mask.get_sform(), image.get_sform())


def test_all_files_of_a_scan_count(strict):
    files = [(f"{i}.nii.gz", nifti((100, 100, 60), 1.0)) for i in range(4)]  # 600 000 voxels each
    answer = send(strict, *files)
    assert answer.status_code == 413
    assert "4 files of more than 2000000 voxels" in answer.json()["detail"]


def test_a_series_of_more_than_a_thousand_files(client):
    files = [(f"{i}.dcm", fake_dicom()) for i in range(1001)]
    assert send(client, *files).status_code == 202


def test_a_full_disk_is_not_the_archives_fault(strict, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(incoming, "copy", full)
    for name, content in (("a.zip", archive({"a": fake_dicom()})), ("a.nii.gz", nifti())):
        answer = send(strict, (name, content))
        assert answer.status_code == 507
        assert "no space is left on the server" in answer.json()["detail"]
