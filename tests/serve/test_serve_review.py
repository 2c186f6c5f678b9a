"""The queue of unlabeled cases, and decisions that the next training follows."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import nibabel as nib
import numpy as np
import pytest
from scans_made import hostile, mask, nifti

from vclipseg.data.datasets import open_dataset, split_cases
from vclipseg.data.reviews import IGNORED, latest_review
from vclipseg.serve.models import Models

QUEUE = "/api/runs/first/queue"


def volume(response):
    assert response.status_code == 200, response.text
    image = nib.Nifti1Image.from_bytes(gzip.decompress(response.content))
    return np.asarray(image.dataobj)


def image_of(client, case):
    return client.get(f"/api/runs/first/cases/{case}/image.nii.gz").content


def decide(client, case, decision, content=None, **query):
    files = {"mask": ("mask.nii.gz", content)} if content is not None else None
    of = f"/api/runs/first/reviews/{case}"
    return client.put(of, params={"decision": decision, **query}, files=files)


@pytest.fixture
def case(data):
    return open_dataset(data).unlabeled[0].case_id


def test_the_queue_ranks_what_was_looked_at(client, data):
    queue = client.get(QUEUE).json()
    assert (queue["looked_at"], queue["total"], queue["looking"]) == (0, 3, False)
    assert queue["ignored_value"] == 2
    assert [c["place"] for c in queue["cases"]] == [None] * 3
    client.post(f"{QUEUE}/look")
    until = time.monotonic() + 120
    while queue["looking"] or queue["looked_at"] < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
        queue = client.get(QUEUE).json()
    uncertain = [c["uncertainty"] for c in queue["cases"]]
    assert uncertain == sorted(uncertain, reverse=True)
    assert [c["place"] for c in queue["cases"]] == [1, 2, 3]
    assert queue["cases"][0]["reasons"]
    for strategy in queue["strategies"]:
        ranked = client.get(QUEUE, params={"strategy": strategy}).json()["cases"]
        assert len({c["id"] for c in ranked}) == 3
    assert client.get(QUEUE, params={"strategy": "best"}).status_code == 400


def test_a_fixed_mask_is_a_label_of_the_next_training(client, data, case):
    before = {p: p.read_bytes() for p in data.rglob("*.nii.gz")}
    content = mask(image_of(client, case))
    answer = decide(client, case, "fixed", content, after=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["revision"] == 1
    dataset = open_dataset(data)
    assert case in split_cases(dataset).labeled
    saved = dataset.training_labels(dataset.case(case))
    assert np.array_equal(
        saved.array, volume(client.get(f"/api/runs/first/reviews/{case}/mask.nii.gz"))
    )
    assert saved.array.sum() == 6**3
    assert latest_review(data, case).model  # which model's mask it was
    assert all(p.read_bytes() == content for p, content in before.items())
    row = next(c for c in client.get(QUEUE).json()["cases"] if c["id"] == case)
    assert (row["decision"], row["revision"]) == ("fixed", 1)


def test_voxels_that_nobody_knows(client, data, case):
    assert decide(client, case, "fixed", mask(image_of(client, case), value=2)).status_code == 200
    dataset = open_dataset(data)
    labels = dataset.training_labels(dataset.case(case)).array
    assert (labels == IGNORED).sum() == 6**3
    shown = volume(client.get(f"/api/runs/first/reviews/{case}/mask.nii.gz"))
    assert (shown == 2).sum() == 6**3


def test_accepting_takes_the_models_mask(client, data, case, ended):
    assert decide(client, case, "accepted").status_code == 404  # there is none yet
    ended(client.post(f"/api/runs/first/cases/{case}/look").json())
    assert decide(client, case, "accepted").status_code == 200
    dataset = open_dataset(data)
    found = dataset.training_labels(dataset.case(case)).array
    prediction = client.get(f"/api/runs/first/cases/{case}/prediction.nii.gz")
    assert np.array_equal(found, volume(prediction))


def test_ignored_cases_and_reopened_ones(client, data, case):
    assert decide(client, case, "ignored").status_code == 200
    split = split_cases(open_dataset(data))
    assert case not in split.labeled + split.unlabeled
    answer = client.delete(f"/api/runs/first/reviews/{case}", params={"after": 1})
    assert answer.json() | {"when": ""} == {
        "case": case,
        "decision": "open",
        "revision": 2,
        "when": "",
    }
    assert case in split_cases(open_dataset(data)).unlabeled


def test_two_people_at_once(client, data, case):
    content = mask(image_of(client, case))
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: decide(client, case, "fixed", content, after=0), range(8))
        )
    assert sorted(a.status_code for a in answers) == [200] + [409] * 7
    assert "decided meanwhile" in next(a for a in answers if a.status_code == 409).text
    assert latest_review(data, case).revision == 1


def test_only_unlabeled_cases_are_reviewed(client, data):
    dataset = open_dataset(data)
    for case in (dataset.test[0].case_id, dataset.labeled[0].case_id):
        answer = decide(client, case, "ignored")
        assert answer.status_code == 400
        assert "only unlabeled ones are reviewed" in answer.json()["detail"]
    for case in ("nobody", "..", "%2e%2e", "a%00b"):
        assert decide(client, case, "ignored").status_code in (404, 405)
    assert not (data / "reviews").exists()


def test_masks_that_do_not_fit(client, data, case):
    image = image_of(client, case)
    for content, words in (
        (mask(nifti((20, 24, 18))), "voxels of"),
        (mask(nifti((32, 32, 24))), "mm"),
        (mask(image, value=3), "other than 0 to 2"),
        (image, "values"),
    ):
        answer = decide(client, case, "fixed", content)
        assert answer.status_code == 422, answer.text
        assert words in answer.json()["detail"]
    assert decide(client, case, "fixed").status_code == 400
    assert decide(client, case, "accepted", mask(image)).status_code == 400
    assert decide(client, case, "best").status_code == 422
    assert decide(client, case, "ignored", after=-1).status_code == 422
    assert not (data / "reviews").exists()


def test_hostile_masks(client, data, case):
    for name, content in hostile().items():
        answer = decide(client, case, "fixed", content)
        assert answer.status_code in (400, 413, 422), name
        assert "/tmp" not in answer.text, name
    assert not (data / "reviews").exists()
    assert not list(client.app.state.served.temporary.glob("*/mask.*"))


def test_looks_of_an_earlier_model_do_not_count(client, runs, case, ended):
    ended(client.post(f"/api/runs/first/cases/{case}/look").json())
    models: Models = client.app.state.served.models
    run = client.app.state.served.catalog.get("first")
    assert models.signals(run, case)
    os.utime(runs / "first/checkpoints/model.safetensors", ns=(1, 1))
    assert models.signals(run, case) is None


@pytest.mark.slow
def test_a_killed_server_loses_no_saved_label(runs, data, case):
    """SIGKILL while clients save: what was answered with 200 is there."""
    command = [sys.executable, "-m", "vclipseg.cli", "serve", str(runs), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        base = server.stdout.readline().strip().rstrip("/")
        saved = save_for(2, base, case)
        server.send_signal(signal.SIGKILL)
    assert saved
    found = latest_review(data, case)
    assert found.revision >= saved
    assert found.labels((0, 1)).array.sum() == 6**3


def save_for(seconds, base, case):
    """Save masks of a case for some seconds; the last revision that the server confirmed."""
    saved = 0
    with httpx.Client(base_url=base, timeout=60) as client:
        content = mask(image_of(client, case))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            answer = decide(client, case, "fixed", content, after=saved)
            assert answer.status_code == 200
            saved = answer.json()["revision"]
    return saved
