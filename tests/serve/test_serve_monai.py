"""Requests as the extension of 3D Slicer for MONAI Label makes them."""

from __future__ import annotations

import gzip
import json
from email.parser import BytesParser

import nibabel as nib
import numpy as np
from scans_made import hostile, mask, nifti

from vclipseg.data.datasets import open_dataset, split_cases


def parts(response):
    """The params and the mask of a multipart answer."""
    assert response.status_code == 200, response.text
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + response.content)
    found = {p.get_param("name", header="content-disposition"): p for p in message.get_payload()}
    content = found["image"].get_payload(decode=True)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    assert found["image"].get_filename().endswith(".nii.gz")
    return json.loads(found["params"].get_payload()), np.asarray(image.dataobj)


def test_a_session_of_slicer(client, data):
    """Info, next sample, its image, inference, the corrected label, and the next sample."""
    info = client.get("/info/").json()
    assert info["models"]["first"]["type"] == "segmentation"
    assert info["models"]["first"]["labels"] == {"left atrium": 1}
    assert info["models"]["first"]["dimension"] == 3
    assert {"random", "first", "combined"} <= set(info["strategies"])
    assert info["datastore"] == {"total": 3, "completed": 0}

    seen = set()
    for left in (2, 1, 0):
        sample = client.post("/activelearning/random", json={}).json()
        assert sample["id"] not in seen
        seen.add(sample["id"])
        assert "/" not in sample["path"]
        image = client.get("/datastore/image", params={"image": sample["id"]}).content
        answer = client.post(
            "/infer/first", params={"image": sample["id"]}, files={"params": (None, "{}")}
        )
        params, found = parts(answer)
        assert params["label_names"] == {"left atrium": 1}
        assert found.shape == nib.Nifti1Image.from_bytes(gzip.decompress(image)).shape
        answer = client.put(
            "/datastore/label",
            params={"image": sample["id"], "tag": "final"},
            data={"params": "{}"},
            files={"label": ("label.nii.gz", mask(image))},
        )
        assert answer.status_code == 200, answer.text
        assert client.get("/datastore/").json() == {"total": 3, "completed": 3 - left}
    assert client.post("/activelearning/random").json() == {}
    assert seen < set(split_cases(open_dataset(data)).labeled)
    label = client.get("/datastore/label", params={"label": sample["id"], "tag": "final"})
    assert label.status_code == 200
    listed = client.get("/datastore/", params={"output": "all"}).json()["objects"]
    assert set(listed[sample["id"]]["labels"]) == {"final"}


def test_sessions_and_files_sent_along(client):
    content = nifti()
    made = client.put("/session/", files={"files": ("a.nii.gz", content)}).json()
    of = f"/session/{made['session_id']}"
    assert client.get(of).json()["name"] == "a.nii.gz"
    by_session = client.post("/infer/first", params={"session_id": made["session_id"]})
    by_file = client.post("/infer/first", files={"file": ("a.nii.gz", content)})
    assert np.array_equal(parts(by_session)[1], parts(by_file)[1])
    uploaded = client.put("/datastore/", files={"file": ("a.nii.gz", content)}).json()["image"]
    only = client.post("/infer/first", params={"image": uploaded, "output": "image"})
    assert only.headers["content-type"] == "application/gzip"
    facts = client.post("/infer/first", params={"image": uploaded, "output": "json"})
    assert facts.json()["model"] == "first"
    assert client.delete(of).status_code == 200
    assert client.get(of).status_code == 404


def test_what_cannot_be_asked(client, data):
    case = open_dataset(data).unlabeled[0].case_id
    test = open_dataset(data).test[0].case_id
    image = client.get("/datastore/image", params={"image": case}).content
    for answer, code in (
        (client.post("/infer/nobody", params={"image": case}), 404),
        (client.post("/infer/first"), 400),
        (client.post("/infer/first", params={"image": "nobody"}), 404),
        (client.post("/infer/first", params={"session_id": "nobody"}), 404),
        (client.post("/infer/first", params={"image": case}, data={"params": "[1]"}), 400),
        (client.post("/infer/first", params={"image": case}, data={"params": "["}), 400),
        (client.post("/activelearning/best"), 400),
        (client.get("/datastore/image", params={"image": "../../etc/passwd"}), 404),
        (client.get("/datastore/label", params={"label": "nobody"}), 404),
        (client.get("/train/", params={"check_if_running": True}), 404),
        (client.post("/train/"), 405),
    ):
        assert answer.status_code == code, answer.text
    label = {"label": ("a.nii.gz", mask(image))}
    put = lambda **params: client.put("/datastore/label", params=params, files=label)  # noqa: E731
    assert put(image=test).status_code == 400
    assert put(image="nobody").status_code == 404
    assert put(image=case, tag="original").status_code == 400
    assert not (data / "reviews").exists()


def test_hostile_files(client):
    for name in ("text.nii", "cut.nii.gz", "bad.zip", "no-dicom.zip", "pickle.nii.gz"):
        content = hostile()[name]
        for answer in (
            client.post("/infer/first", files={"file": (name, content)}),
            client.put("/session/", files={"files": (name, content)}),
            client.put("/datastore/", files={"file": (name, content)}),
        ):
            assert answer.status_code in (400, 413, 422), name
