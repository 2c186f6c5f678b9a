"""Several processes mean what one with the joint batch does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks_worker import STEPS, TRAINED
from toy import TINY
from vclipseg import ranks
from vclipseg.checkpoint import load_state
from vclipseg.errors import UsageError
from vclipseg.experiment import require_ranks
from vclipseg.runlog import read_log
from vclipseg.runs import Run, identity

SLOW = pytest.mark.slow
PATIENCE = 900.0  # seconds, on a busy machine
each_method = pytest.mark.parametrize("name", list(TRAINED))


# One process


def test_alone_nothing_is_done():
    x = torch.ones(2, requires_grad=True)
    assert ranks.across(x) is x
    assert (ranks.count(), ranks.rank(), ranks.launched()) == (1, 0, 1)
    assert (ranks.mean(3), ranks.highest(4)) == (3, 4)
    assert ranks.gather(x).shape == (1, 2)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with ranks.joined(), ranks.in_turns(), ranks.own_draws():
        assert torch.equal(torch.rand(2), expected)
    ranks.average_gradients([x])
    assert x.grad is None


def test_ranks_draw_from_seeds_of_their_own():
    seeds = {
        ranks.own_seed(1337 * 1_000_003 + step, rank) for step in range(50) for rank in range(8)
    }
    assert len(seeds | {1337 * 1_000_003 + step for step in range(50)}) == 450


# Two processes


HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_worker(data, out, said, **environment):
    """A process of `ranks_worker.py`; what it says goes into a file."""
    command = [sys.executable, HERE / "ranks_worker.py", data, out]
    with said.open("w") as file:
        return subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": PATH, **environment}, stdout=file, stderr=file
        )


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """Folder with `one/NAME`, of one process with four patches, and `two/NAME`, of two with two each."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # as torchrun has it
    said = [out / f"said.{n}" for n in range(3)]
    processes = [
        start_worker(tiny_data, out / "two", said[int(r)], **shared, RANK=r, LOCAL_RANK=r)
        for r in ("0", "1")
    ]
    processes.append(start_worker(tiny_data, out / "one", said[2]))
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0, 0], "\n".join(file.read_text(encoding="utf-8") for file in said)
    return out


@SLOW
@each_method
def test_two_processes_have_the_losses_of_one(trained, name):
    one, two = (read_log(trained / ranks / name / "log.csv") for ranks in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert float(b[key]) == pytest.approx(float(a[key]), abs=1e-4), (a["step"], key)


@SLOW
@each_method
def test_two_processes_have_the_weights_of_one(trained, name):
    one, two = (load_state(trained / r / name / "checkpoints/last.pt") for r in ("one", "two"))
    for part in ("method", "average"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, atol=1e-5, rtol=1e-5, msg=key)


@SLOW
@pytest.mark.parametrize("name", [*TRAINED, "stopped"])
def test_all_of_the_state_is_alike_on_both(trained, name):
    """Teachers, averages and the optimizer's moments too; and it is what the first one saved."""
    first, second = (torch.load(trained / "two" / f"{name}.rank{r}.pt") for r in (0, 1))
    assert_same(first, second)
    saved = load_state(trained / "two" / name / "checkpoints/last.pt")
    saved.pop("log")
    assert_same(first, saved)


@SLOW
def test_stopped_and_resumed_is_unbroken(trained):
    whole, broken = (torch.load(trained / "two" / f"{n}.rank0.pt") for n in ("vclipseg", "stopped"))
    assert_same(whole, broken)
    rows = [read_log(trained / "two" / name / "log.csv") for name in ("vclipseg", "stopped")]
    for a, b in zip(*rows, strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}


@SLOW
def test_a_run_knows_how_many_trained_it(trained):
    one, two = (Run.open(trained / ranks / "vclipseg") for ranks in ("one", "two"))
    assert (one.ranks, two.ranks) == (1, 2)
    asked = two.experiment, two.split, two.plan, two.text
    assert two.settings_hash == identity(*asked, ranks=2) != identity(*asked)
    with pytest.raises(UsageError, match=r"begun by 2 process\(es\), and now there are 1"):
        require_ranks(two)


@SLOW
def test_torchrun_trains_from_the_command_line(tiny_data, tmp_path):
    """One run folder, one report, one result; a process alone cannot go on with it."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    sets = [word for setting in (*TINY, "data.labeled=1") for word in ("--set", setting)]
    run = [
        *launch,
        "-m",
        "vclipseg",
        "train",
        str(tiny_data),
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    done = subprocess.run([*run, *sets], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["num_cases"] == 2
    assert "2 processes with 4 patches each step; train.lr is not scaled" in done.stderr
    assert done.stderr.count("train vclipseg: 4/4") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"experiment.json", "log.csv", "report.html", "predictions"} <= names
    assert not [name for name in names if name.startswith(".")]
    alone = [sys.executable, "-m", "vclipseg", "train", "--resume", str(tmp_path / "run")]
    refused = subprocess.run(alone, capture_output=True, text=True, timeout=PATIENCE)
    assert refused.returncode == 2
    assert "begun by 2 process(es)" in refused.stderr


def assert_same(a, b, path="state"):
    """Bit for bit, however deep."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path
