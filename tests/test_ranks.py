"""Several processes mean what one with the joint batch does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks_worker import METHODS, QUIET, STEPS, experiment
from vclipseg import ranks
from vclipseg.checkpoint import load_state
from vclipseg.errors import UsageError
from vclipseg.experiment import new_run, require_ranks, train_run
from vclipseg.runlog import read_log
from vclipseg.runs import Run, identity

SLOW = pytest.mark.slow
each_method = pytest.mark.parametrize("name", list(METHODS))


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
    seeds = {ranks.own_seed(1337 * 1_000_003 + step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds | {1337 * 1_000_003 + step for step in range(50)}) == 450


# Two processes


def start_two(out, *arguments):
    """The processes, as torchrun starts them; what they say goes into files."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = []
    for r in ("0", "1"):
        with (out / f"said.{r}").open("w") as said:
            environment = {**os.environ, **shared, "RANK": r, "LOCAL_RANK": r, "PYTHONPATH": path}
            command = [sys.executable, *map(str, arguments)]
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
    return processes


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """Folder with `one/NAME`, of one process with four patches, and `two/NAME`, of two with two each."""
    out = tmp_path_factory.mktemp("ranks")
    processes = start_two(out, Path(__file__).with_name("ranks_worker.py"), tiny_data, out / "two")
    try:
        for name in METHODS:
            run, prepared = new_run(experiment(name, 1), tiny_data, out / "one" / name, QUIET)
            train_run(run, prepared.cases, QUIET)
        for process in processes:
            process.wait(600)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(out / f"said.{r}").read_text() for r in (0, 1)]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
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
            torch.testing.assert_close(two[part][key], value, atol=2e-3, rtol=2e-3, msg=key)


@SLOW
@pytest.mark.parametrize("name", [*METHODS, "stopped"])
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
