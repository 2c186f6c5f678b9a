"""Runs to serve: two tiny trainings on made-up atria, each test with copies of its own."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import uvicorn
from fastapi.testclient import TestClient

from toy import TINY
from vclipseg.commands import train_new
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.serve.app import create_app

sys.path.append(str(Path(__file__).parents[1] / "data"))  # dicom_made
SHAPE = (32, 32, 24)


@pytest.fixture(scope="session")
def served_data(tmp_path_factory) -> Path:
    """Made-up atria: 2 labeled, 3 unlabeled and 2 test cases. Not to be changed."""
    root = tmp_path_factory.mktemp("served") / "atria"
    return make_phantom(root, labeled=2, unlabeled=3, test=2, shape=SHAPE, spacing=3.0)


@pytest.fixture(scope="session")
def trained(served_data, tmp_path_factory) -> Path:
    """A folder with the runs `first` (vclipseg) and `second` (supervised). Not to be changed."""
    runs = tmp_path_factory.mktemp("trained")
    for name, method in (("first", "vclipseg"), ("second", "supervised")):
        experiment = load_experiment(None, [*TINY, f"method.name={method}"])
        train_new(experiment, served_data, runs / name, Console(quiet=True), check=False)
    return runs


@pytest.fixture
def data(served_data, tmp_path) -> Path:
    """The data set, to be reviewed."""
    return shutil.copytree(served_data, tmp_path / "atria")


@pytest.fixture
def runs(trained, data, tmp_path) -> Path:
    """The runs, pointing at `data`."""
    folder = shutil.copytree(trained, tmp_path / "runs")
    for file in folder.glob("*/experiment.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content["data"]["root"] = str(data)
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def client(runs):
    """A client of the two runs."""
    with TestClient(create_app(runs), base_url="http://localhost:8000") as made:
        yield made


@pytest.fixture
def ended(client):
    """Waits for a job: its JSON -> the JSON of its end."""

    def wait(job: dict, seconds: float = 60) -> dict:
        until = time.monotonic() + seconds
        while job["state"] in ("waiting", "running"):
            assert time.monotonic() < until, job
            time.sleep(0.02)
            job = client.get(f"/api/jobs/{job['id']}").json()
        return job

    return wait


@pytest.fixture
def server(runs):
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(create_app(runs), host="127.0.0.1", port=port, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(30)
