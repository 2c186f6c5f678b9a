"""What the processes do that `test_ranks.py` starts: `ranks_worker.py DATA OUT`, alone or as two ranks.

Two ranks first hold the bricks of `vclipseg.ranks`, and a step of each method, to what one process computes
of all. Then they train, and so does the one. All is in float64: in float32 tiny networks turn rounding into
other weights within a few steps.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from toy import TINY, build, make_batch
from vclipseg import ranks
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.batch import Batch
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
    "train.statistics_batches=2",
    "data.labeled=2",
    "train.lr=1e-4",  # at higher rates even rounding in float64 grows to 1e-4 within 20 steps
)
TRAINED: dict[str, dict[str, float]] = {
    "supervised": {},
    "mean_teacher": {"noise": 0.0},
    "vclipseg": {},
}
"""Methods of preset robust, without random draws of each patch."""
EXACT = {
    **TRAINED,
    "ua_mt": {"noise": 0.0, "teacher_dropout": 0.0},
    "cps": {},
    "mcnet": {},
    "caussl": {},
    "bcp": {},
}
QUIET = Console(quiet=True)


def experiment(name, ranks):
    """So many patches a step and rank, 4 in all."""
    each = 4 // ranks
    patches = [each, 0] if name == "supervised" else [each // 2, each // 2]
    own = [f"method.{key}={value}" for key, value in TRAINED[name].items()]
    overrides = [*SETTINGS, f"method.name={name}", *own, f"method.patches={patches}"]
    return load_experiment(None, overrides)


def in_double():
    """Everything in float64 from here on."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    make_method, to = Run.make_method, Batch.to
    Run.make_method = lambda run: make_method(run).double()
    Batch.to = lambda batch, device: doubled(to(batch, device))


def doubled(batch):
    plain = None if batch.plain_images is None else batch.plain_images.double()
    return replace(batch, images=batch.images.double(), plain_images=plain)


# Bricks


def close(found, expected, name=None):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=name)


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
    mine, unused = (
        torch.linspace(0.5, 1.5, 5, requires_grad=True),
        torch.ones(2, requires_grad=True),
    )
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
        close(z, y[ranks.rank() :: 2])
        close(b.grad / 2, a.grad[ranks.rank() :: 2])  # d sum L_r = 2 dL
        for name, value in theirs.state_dict().items():
            close(ours.state_dict()[name], value)
        for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(mine.grad, expected.grad)


def check_half_precision():
    """As autocast has it: what is normalized in bfloat16, weights in float32."""
    x = torch.randn(1, 8, 4, 4, 4).bfloat16().requires_grad_()
    norm = BatchNorm3d(8, dtype=torch.float32)
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


def gradients(name, batch):
    """Loss, gradients and running statistics of one step, late in a run."""
    method = build(name, steps=100, filters=2, **EXACT[name]).double().train()
    generator = torch.Generator().manual_seed(1)
    loss = method.loss(replace(doubled(batch), generator=generator), 50)
    loss.total.backward()
    ranks.average_gradients([p for p in method.parameters() if p.requires_grad])
    found = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {"loss": ranks.mean(loss.total.detach()), **found, **dict(method.named_buffers())}


def joint_batch(name):
    return make_batch(2, patches=(8, 0) if name == "supervised" else (4, 4), num_classes=2)


def own_rows(batch):
    mine = slice(ranks.rank(), None, 2)
    images = torch.cat([part[mine] for part in batch.split(batch.images)])
    return replace(batch, images=images, labels=batch.labels[mine])


def check_methods(expected):
    for name, whole in expected.items():
        found = gradients(name, own_rows(joint_batch(name)))
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            close(found[key], value, f"{name} {key}")


# Runs


def begin(data, name, folder):
    with ranks.in_turns():
        if ranks.is_first():
            return new_run(experiment(name, ranks.count()), data, folder, QUIET)
        run = Run.open(folder)
        return run, prepare_data(run.experiment, data, QUIET, run.plan)


def keep(path):
    """A look that keeps the last state of each rank."""

    def look(state):
        if state.step == STEPS:
            torch.save(state.state_dict(), f"{path}.rank{ranks.rank()}.pt")

    return look


def train_all(data, out):
    for name in TRAINED:
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
    in_double()
    if ranks.launched() == 1:
        train_all(data, out)
        return
    expected = {name: gradients(name, joint_batch(name)) for name in EXACT}
    with ranks.joined():
        if not ranks.is_first():
            os.replace = write_nothing
        check_sums()
        check_gradients()
        check_batchnorm()
        check_half_precision()
        check_draws()
        check_methods(expected)
        train_all(data, out)
        train_stopped(data, out)
    with pytest.raises(UsageError, match="started together"):
        train_run(Run.open(out / "stopped"), None, QUIET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
