"""What each of two processes does that `test_ranks.py` starts: `ranks_worker.py DATA OUT`.

Its first part holds the bricks of `vclipseg.ranks` to what one process computes of all; the second trains.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from toy import TINY
from vclipseg import ranks
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.errors import Stopped, UsageError
from vclipseg.experiment import new_run, prepare_data, train_run
from vclipseg.networks.batchnorm import BatchNorm3d
from vclipseg.runs import Run

STEPS = 20
SETTINGS = (
    *TINY,
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.checkpoint_every=50",
    "data.labeled=2",
    "train.optimizer=sgd",  # AdamW makes full steps of gradients that are rounding alone
    "train.lr=0.01",
)
METHODS = {
    "supervised": ["method.name=supervised"],
    "mean_teacher": ["method.name=mean_teacher", "method.noise=0"],
    "vclipseg": ["method.name=vclipseg"],
}
"""All of preset robust, without random draws of each patch."""
QUIET = Console(quiet=True)


def experiment(name, ranks):
    """So many patches a step and rank, 4 in all."""
    each = 4 // ranks
    patches = [each, 0] if name == "supervised" else [each // 2, each // 2]
    overrides = [*SETTINGS, *METHODS[name], f"method.patches={patches}"]
    return load_experiment(None, overrides)


# Bricks


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


def check_sums():
    mine = torch.full((3,), float(ranks.rank() + 1))
    assert ranks.count() == 2
    assert ranks.across(mine).tolist() == [3.0] * 3
    assert ranks.across(torch.tensor(7)).item() == 14
    assert ranks.mean(float(ranks.rank())) == 0.5
    assert ranks.highest(10 * ranks.rank()) == 10
    assert ranks.gather(mine).tolist() == [[1.0] * 3, [2.0] * 3]


def check_gradients():
    """A ratio of sums and a mean, of weights that have a copy on each rank."""
    data = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def loss(w, x, across):
        y = (x * w).tanh()
        return (across(y.square().sum(0)) / across(y.exp().sum(0))).log().sum() + y.mean()

    whole = torch.linspace(0.5, 1.5, 5, requires_grad=True)
    expected = loss(whole, data, lambda s: s)
    expected.backward()
    mine, unused = torch.linspace(0.5, 1.5, 5, requires_grad=True), torch.ones(2, requires_grad=True)
    rare = torch.ones(2, requires_grad=True)
    rare.grad = torch.full((2,), 4.0) if ranks.rank() else None  # of one rank only
    value = loss(mine, data[ranks.rank() :: 2], ranks.across)
    value.backward()
    ranks.average_gradients([rare, mine, unused])
    close(ranks.mean(value.detach()), expected.detach())
    close(mine.grad, whole.grad)
    assert rare.grad.tolist() == [2.0] * 2
    assert unused.grad is None


def check_batchnorm():
    """Outputs, gradients and running statistics are those of the joint batch, in its layout."""
    torch.manual_seed(0)
    for channels, size in ((4, 16), (3, 2), (64, 2), (5, 1)):
        joint = torch.randn(4, channels, *[size] * 3) * 3 + 2
        pull = torch.randn_like(joint)
        theirs, ours = nn.BatchNorm3d(channels), BatchNorm3d(channels)
        for norm in (theirs, ours):
            nn.init.constant_(norm.weight, 0.7)
        a = joint.clone().requires_grad_()
        b = joint[ranks.rank() :: 2].to(memory_format=torch.channels_last_3d).requires_grad_()
        y, z = theirs(a), ours(b)
        (y * pull).mean().backward()
        (z * pull[ranks.rank() :: 2]).mean().backward()
        ranks.average_gradients(list(ours.parameters()))
        close(z, y[ranks.rank() :: 2], 1e-4)
        close(b.grad / 2, a.grad[ranks.rank() :: 2])  # d sum L_r = 2 dL
        for name, value in theirs.state_dict().items():
            close(ours.state_dict()[name], value)
        for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(mine.grad, expected.grad)


def check_half_precision():
    """As autocast has it: what is normalized in bfloat16, weights in float32."""
    x = torch.randn(1, 8, 4, 4, 4).bfloat16().requires_grad_()
    norm = BatchNorm3d(8)
    y = norm(x)
    y.float().square().mean().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32
    ranks.across(torch.ones(3, dtype=torch.bfloat16))


def check_draws():
    torch.manual_seed(5)
    with ranks.own_draws():
        own = ranks.gather(torch.rand(1))
    after = torch.rand(1)
    assert own[0] != own[1]
    torch.manual_seed(5)
    assert after == torch.rand(1)
    assert after not in own


# Runs


def begin(data, name, folder):
    with ranks.in_turns():
        if ranks.is_first():
            return new_run(experiment(name, 2), data, folder, QUIET)
        run = Run.open(folder)
        return run, prepare_data(run.experiment, data, QUIET, run.plan)


def keep(path):
    """A look that keeps the last state of each rank."""

    def look(state):
        if state.step == STEPS:
            torch.save(state.state_dict(), f"{path}.rank{ranks.rank()}.pt")

    return look


def train_all(data, out):
    for name in METHODS:
        run, prepared = begin(data, name, out / name)
        train_run(run, prepared.cases, QUIET, keep(out / name))


def train_stopped(data, out):
    """The second rank is told to stop; both do, and go on later."""

    def look(state):
        if state.step == 7 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run, prepared = begin(data, "vclipseg", out / "stopped")
    with pytest.raises(Stopped, match="stopped at step 8 of 20") as stopped:
        train_run(run, prepared.cases, QUIET, look)
    assert stopped.value.exit_code == 75
    train_run(run, prepared.cases, QUIET, keep(out / "stopped"))


def write_nothing(*arguments):
    raise AssertionError(f"another rank than the first writes {arguments[1]}")


def main(data, out):
    with ranks.joined():
        if not ranks.is_first():
            os.replace = write_nothing
        check_sums()
        check_gradients()
        check_batchnorm()
        check_half_precision()
        check_draws()
        train_all(data, out)
        train_stopped(data, out)
    with pytest.raises(UsageError, match="started together"):
        train_run(Run.open(out / "stopped"), None, QUIET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
