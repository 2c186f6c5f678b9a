"""Runs, cases and volumes over HTTP."""

from __future__ import annotations

import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient

from vclipseg.data.datasets import open_dataset
from vclipseg.errors import UsageError
from vclipseg.serve.app import create_app
from vclipseg.serve.catalog import Catalog


def volume(response):
    assert response.status_code == 200, response.text
    image = nib.Nifti1Image.from_bytes(gzip.decompress(response.content))
    return np.asarray(image.dataobj), image.affine


def test_runs_are_listed(client):
    first, second = client.get("/api/runs").json()
    assert (first["id"], first["method"], second["method"]) == ("first", "vclipseg", "supervised")
    assert first["classes"] == ["background", "left atrium"]
    assert (first["labeled"], first["unlabeled"], first["test"]) == (2, 3, 2)
    assert first["has_model"]
    assert first["has_data"]
    assert 0 <= first["means"]["dice"] <= 1
    assert client.get("/api/runs/second").json() == second


def test_cases_begin_with_the_worst(client):
    cases = client.get("/api/runs/first/cases").json()
    roles = [case["role"] for case in cases]
    assert roles == ["test"] * 2 + ["unlabeled"] * 3 + ["labeled"] * 2
    dices = [case["metrics"]["dice"] for case in cases[:2]]
    assert dices == sorted(dices)
    assert cases[0]["has_reference"]
    assert cases[0]["has_prediction"]
    assert cases[0]["classes"]["left atrium"]["dice"] == dices[0]
    assert not any(case["has_reference"] for case in cases if case["role"] == "unlabeled")


def test_volumes_are_those_of_the_files(client, data):
    dataset = open_dataset(data)
    case = dataset.test[0]
    of = f"/api/runs/first/cases/{case.case_id}"
    array, affine = volume(client.get(f"{of}/image.nii.gz"))
    assert np.array_equal(array, dataset.image(case).array[0])
    assert np.allclose(affine, dataset.image(case).affine, atol=1e-4)
    assert np.array_equal(
        volume(client.get(f"{of}/reference.nii.gz"))[0], dataset.labels(case).array
    )
    mask, _ = volume(client.get(f"{of}/prediction.nii.gz"))
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


def test_a_browser_that_has_it_is_not_sent_it_again(client, data):
    case = open_dataset(data).test[0].case_id
    path = f"/api/runs/first/cases/{case}/image.nii.gz"
    tag = client.get(path).headers["etag"]
    again = client.get(path, headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_looking_shows_where_decoders_differ(client, data, ended):
    case = open_dataset(data).test[0].case_id
    of = f"/api/runs/first/cases/{case}"
    assert client.get(f"{of}/disagreement.nii.gz").status_code == 404
    before, _ = volume(client.get(f"{of}/prediction.nii.gz"))
    job = client.post(f"{of}/look")
    assert job.status_code == 202
    assert ended(job.json())["state"] == "done"
    array, _ = volume(client.get(f"{of}/disagreement.nii.gz"))
    assert array.shape == before.shape
    assert 0 < array.max() <= 100
    after, _ = volume(client.get(f"{of}/prediction.nii.gz"))
    assert np.array_equal(after, before)  # the same mask as `vclipseg evaluate` made
    cases = {c["id"]: c for c in client.get("/api/runs/first/cases").json()}
    assert 0 < cases[case]["uncertainty"] <= 1


def test_unlabeled_cases_do_not_show_a_label_that_they_have(client, data, runs):
    """In an experiment that hides labels they stay hidden."""
    dataset = open_dataset(data)
    case = dataset.unlabeled[0]
    folder = data / "labelsTr"
    hidden = folder / next(folder.iterdir()).name
    (data / "imagesTr" / f"{case.case_id}_0000.nii.gz").write_bytes(case.images[0].read_bytes())
    case.images[0].unlink()
    (folder / f"{case.case_id}.nii.gz").write_bytes(hidden.read_bytes())
    answer = client.get(f"/api/runs/first/cases/{case.case_id}/reference.nii.gz")
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/third",
        "/api/runs/third/cases",
        "/api/runs/first/cases/nobody/image.nii.gz",
        "/api/runs/first/cases/nobody/prediction.nii.gz",
        "/api/runs/first/cases/nobody/disagreement.nii.gz",
        "/api/runs/..%2f..%2fetc/cases",
        "/api/runs/first/cases/..%2f..%2f..%2fexperiment/disagreement.nii.gz",
        "/api/jobs/0",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
    ],
)
def test_what_is_not_there(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_channel_out_of_range(client, data):
    case = open_dataset(data).test[0].case_id
    of = f"/api/runs/first/cases/{case}/image.nii.gz"
    assert client.get(of, params={"channel": 1}).status_code == 404
    assert client.get(of, params={"channel": -1}).status_code == 422


def test_one_run_can_be_served_alone(runs):
    with TestClient(create_app(runs / "second"), base_url="http://localhost") as client:
        assert [run["id"] for run in client.get("/api/runs").json()] == ["second"]


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(UsageError, match="no run folder here"):
        create_app(tmp_path)


def test_data_out_of_reach_is_said(runs, data):
    data.rename(data.with_name("elsewhere"))
    with TestClient(create_app(runs), base_url="http://localhost") as client:
        assert not client.get("/api/runs/first").json()["has_data"]
        cases = client.get("/api/runs/first/cases").json()
        answer = client.get(f"/api/runs/first/cases/{cases[0]['id']}/image.nii.gz")
        assert answer.status_code == 400
        assert "say where with --data" in answer.json()["detail"]
    app = create_app(runs, data.with_name("elsewhere"))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/api/runs/first").json()["has_data"]


def test_runs_that_appear_later_are_found(client, runs):
    (runs / "first").rename(runs / "third")
    assert "third" in [run["id"] for run in client.get("/api/runs").json()]


def test_a_damaged_run_does_not_hide_the_others(client, runs):
    (runs / "first" / "cases.csv").write_text("case_id,dice\na,b\n")
    first, second = client.get("/api/runs").json()
    assert any("cannot be read" in line for line in first["missing"])
    assert second["means"]["dice"] is not None


def test_the_page_and_its_files(client):
    page = client.get("/")
    assert "text/html" in page.headers["content-type"]
    for name in ("app.css", "main.js", "viewer.js", "vendor/niivue/niivue.min.js"):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200, name
        if name.endswith(".js"):
            assert "javascript" in answer.headers["content-type"]
    assert "http" not in page.text  # nothing from elsewhere


def test_openapi_describes_the_routes(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/api/runs", "/info/", "/infer/{model}", "/datastore/label"} <= set(paths)
    assert client.get("/docs").status_code == 404  # its page would load from elsewhere


def test_runs_may_be_links(runs, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "one").symlink_to(runs / "first", target_is_directory=True)
    assert list(Catalog(links).runs) == ["one"]


def test_a_run_that_is_trained_anew_is_read_anew(client, runs):
    run = client.app.state.served.catalog.get("first")
    before = run.class_names, run.roles
    file = runs / "first" / "experiment.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["class_names"] = ["background", "atrium"]
    file.write_text(json.dumps(content))
    os.utime(file, (1, 1))  # in the same instant the clock may not have moved
    splits = runs / "first" / "splits.json"
    content = json.loads(splits.read_text(encoding="utf-8"))
    splits.write_text(json.dumps({**content, "labeled": content["test"], "test": []}))
    os.utime(splits, (1, 1))
    assert run.class_names == ("background", "atrium") != before[0]
    assert "labeled" in run.roles.values()
    assert "test" not in run.roles.values()
