"""Clients that ask a server on this machine for everything at once, honest and hostile ones.

    python benchmarks/serve_load.py RUNS --clients 16 --seconds 60

Serves a copy of a folder of runs and of their data, lets the clients look, predict, review and send
broken files, kills the server at the end (SIGKILL), and counts: crashes, answers of 5xx other than 503,
reviews that were confirmed and are not on the disk, and how its memory grew. Prints JSON, and writes it
where `--record` says.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np

from vclipseg.data.reviews import read_reviews
from vclipseg.environment import commit, cpu_name
from vclipseg.files import write_text

CONFIRMED: dict[str, int] = {}  # case id -> highest revision that the server confirmed
LOCK = threading.Lock()
KILL_SECONDS = 1.0  # before the end: clients are still saving then


@dataclass
class Tally:
    """What the clients saw."""

    answers: collections.Counter = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, response: httpx.Response, seconds: float, allowed: set[int]) -> None:
        with self.lock:
            self.answers[f"{name} {response.status_code}"] += 1
            self.seconds.append(seconds)
            if response.status_code not in allowed | {503}:
                self.wrong.append(f"{name}: {response.status_code} {response.text[:200]}")


class Client:
    """One client: a random request after the other."""

    def __init__(self, base: str, run: str, cases: list[dict], tally: Tally, seed: int) -> None:
        self.http = httpx.Client(base_url=base, timeout=120)
        self.run, self.tally, self.random = run, tally, random.Random(seed)
        self.cases = [case["id"] for case in cases]
        self.unlabeled = [case["id"] for case in cases if case["role"] == "unlabeled"]
        self.requests = (
            self.page,
            self.browse,
            self.queue,
            self.review,
            self.review,
            self.predict,
            self.infer,
            self.hostile_file,
            self.hostile_mask,
            self.hostile_name,
        )

    def work(self, until: float, crashed: threading.Event) -> None:
        while time.monotonic() < until and not crashed.is_set():
            try:
                self.random.choice(self.requests)()
            except httpx.TransportError as error:
                if time.monotonic() < until - KILL_SECONDS:
                    self.tally.wrong.append(f"no answer: {error!r}")

    def ask(self, name: str, method: str, path: str, *allowed: int, **given) -> httpx.Response:
        began = time.monotonic()
        response = self.http.request(method, path, **given)
        self.tally.add(name, response, time.monotonic() - began, set(allowed))
        return response

    def page(self) -> None:
        for path in ("/", "/static/main.js", "/api/runs", "/info/", "/openapi.json"):
            self.ask("page", "GET", path, 200)

    def browse(self) -> None:
        case = self.random.choice(self.cases)
        self.ask("cases", "GET", f"/api/runs/{self.run}/cases", 200)
        what = self.random.choice(("image", "reference", "prediction", "disagreement"))
        path = f"/api/runs/{self.run}/cases/{case}/{what}.nii.gz"
        self.ask("volume", "GET", path, 200, 404)

    def queue(self) -> None:
        self.ask("look", "POST", f"/api/runs/{self.run}/queue/look", 202)
        self.ask("queue", "GET", f"/api/runs/{self.run}/queue?strategy=combined", 200)
        self.ask("next", "POST", "/activelearning/combined", 200)

    def image(self, case: str) -> bytes:
        return self.ask(
            "volume", "GET", f"/api/runs/{self.run}/cases/{case}/image.nii.gz", 200
        ).content

    def review(self) -> None:
        case = self.random.choice(self.unlabeled)
        image = self.image(case)
        if image[:2] != b"\x1f\x8b":
            return
        files = {"mask": ("mask.nii.gz", box(image, self.random))}
        path = f"/api/runs/{self.run}/reviews/{case}?decision=fixed"
        answer = self.ask("review", "PUT", path, 200, 409, files=files)
        if answer.status_code == 200:
            with LOCK:
                CONFIRMED[case] = max(CONFIRMED.get(case, 0), answer.json()["revision"])

    def predict(self) -> None:
        files = {"files": ("scan.nii.gz", self.image(self.random.choice(self.cases)))}
        path = f"/api/runs/{self.run}/scans"
        answer = self.ask("predict", "POST", path, 202, 400, files=files)
        if answer.status_code == 202:
            self.ask("job", "GET", f"/api/jobs/{answer.json()['job']['id']}", 200, 404)

    def infer(self) -> None:
        image = self.random.choice(self.unlabeled)
        self.ask("infer", "POST", f"/infer/{self.run}?image={image}", 200)

    def hostile_file(self) -> None:
        name, content = self.random.choice(HOSTILE)
        files = {"files": (name, content)}
        self.ask(
            "hostile file", "POST", f"/api/runs/{self.run}/scans", 202, 400, 413, 422, files=files
        )

    def hostile_mask(self) -> None:
        case = self.random.choice(self.unlabeled)
        _, content = self.random.choice(HOSTILE)
        path = f"/api/runs/{self.run}/reviews/{case}?decision=fixed"
        self.ask("hostile mask", "PUT", path, 400, 413, 422, files={"mask": ("m.nii", content)})

    def hostile_name(self) -> None:
        path = self.random.choice(
            (
                "/api/runs/..%2f..%2fetc/cases",
                f"/api/runs/{self.run}/cases/..%2f..%2fexperiment/image.nii.gz",
                "/static/..%2f..%2fapp.py",
                "/datastore/image?image=../../etc/passwd",
                f"/api/runs/{self.run}/queue?strategy=%00",
            )
        )
        self.ask("hostile name", "GET", path, 400, 404)
        host = {"host": "evil.example"}
        self.ask("hostile host", "GET", "/api/runs", 403, headers=host)


HOSTILE = [
    ("a.nii", b""),
    ("a.nii", b"hello" * 1000),
    ("a.nii.gz", b"\x1f\x8b" + b"\xff" * 1000),
    ("a.zip", b"PK\x03\x04" + b"\xff" * 1000),
    ("a.nii", gzip.compress(b"\0" * 50_000_000)),
    ("../../a.pkl", b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
]


def box(image: bytes, chance: random.Random) -> bytes:
    """A mask on the grid of an image."""
    grid = nib.Nifti1Image.from_bytes(gzip.decompress(image))
    mask = np.zeros(grid.shape, np.uint8)
    low = [chance.randrange(n // 2) for n in grid.shape]
    mask[tuple(slice(a, a + n // 2) for a, n in zip(low, grid.shape, strict=True))] = 1
    return gzip.compress(nib.Nifti1Image(mask, grid.affine).to_bytes(), 1)


def copy_runs(runs: Path, folder: Path) -> Path:
    """Copies that may be written to."""
    copy = shutil.copytree(runs, folder / "runs", ignore=shutil.ignore_patterns("last.pt", "serve"))
    for file in sorted(copy.rglob("experiment.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        root = Path(content["data"]["root"])
        target = folder / root.name
        if not target.exists():
            shutil.copytree(root, target, ignore=shutil.ignore_patterns("reviews"))
        content["data"]["root"] = str(target)
        file.write_text(json.dumps(content))
    return copy


def memory_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def watch(
    server: subprocess.Popen, until: float, memory: list[float], crashed: threading.Event
) -> None:
    while time.monotonic() < until:
        if server.poll() is not None:
            crashed.set()
            return
        memory.append(memory_mb(server.pid))
        time.sleep(0.5)


def lost(folder: Path) -> list[str]:
    """Cases whose confirmed review is not on the disk."""
    found = {i: r.revision for root in folder.iterdir() for i, r in read_reviews(root).items()}
    return [case for case, revision in CONFIRMED.items() if found.get(case, 0) < revision]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, help="folder of runs with models and their data in reach"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="such as results/serve-load.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = json.dumps(load(arguments, Path(temporary)), indent=2)
    print(found)
    if arguments.record:
        write_text(arguments.record, found + "\n")


def load(arguments: argparse.Namespace, folder: Path) -> dict:
    runs = copy_runs(arguments.runs, folder)
    command = [sys.executable, "-m", "vclipseg.cli", "serve", str(runs), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout
    base = server.stdout.readline().strip().rstrip("/")
    run = next(r["id"] for r in httpx.get(f"{base}/api/runs").json() if r["has_model"])
    cases = httpx.get(f"{base}/api/runs/{run}/cases").json()
    tally, crashed, memory = Tally(), threading.Event(), [memory_mb(server.pid)]
    until = time.monotonic() + arguments.seconds
    clients = [
        Client(base, run, cases, tally, arguments.seed + n) for n in range(arguments.clients)
    ]
    work = [threading.Thread(target=c.work, args=(until, crashed)) for c in clients]
    work.append(
        threading.Thread(target=watch, args=(server, until - 2 * KILL_SECONDS, memory, crashed))
    )
    for thread in work:
        thread.start()
    time.sleep(max(0.0, until - time.monotonic() - KILL_SECONDS))
    if not crashed.is_set():
        server.send_signal(signal.SIGKILL)  # while clients are saving
    for thread in work:
        thread.join()
    server.wait()
    return {
        "command": "python benchmarks/serve_load.py RUNS "
        f"--clients {arguments.clients} --seconds {arguments.seconds:g} --seed {arguments.seed}",
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "requests": sum(tally.answers.values()),
        "answers": dict(sorted(tally.answers.items())),
        "median_seconds": round(statistics.median(tally.seconds or [0]), 3),
        "slowest_seconds": round(max(tally.seconds or [0]), 3),
        "crashed": crashed.is_set(),
        "wrong": tally.wrong[:20],
        "reviews_confirmed": sum(CONFIRMED.values()),
        "reviews_lost": lost(folder),
        "memory_mb": {
            "at_start": round(memory[0]),
            "after_a_third": round(max(memory[: max(1, len(memory) // 3)])),
            "highest": round(max(memory)),
        },
        "device": cpu_name(),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
