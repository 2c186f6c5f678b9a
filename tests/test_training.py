"""The loop, on a method of one weight whose every step can be worked out by hand, and on real ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from toy import LATE, RECIPES_IN_TIME, batch_for, build, fast, fit, make_batch
from vclipseg.checkpoint import load_state, save_state
from vclipseg.data.batch import Batch
from vclipseg.device import require_compiler
from vclipseg.errors import UsageError, VclipsegError
from vclipseg.methods import METHODS
from vclipseg.methods.base import Loss, Method, MethodSettings, Task, Term
from vclipseg.networks.batchnorm import BatchNorm3d
from vclipseg.runlog import RunLog, read_log
from vclipseg.training import (
    NonFiniteLossError,
    TrainSettings,
    learning_rate,
    make_machine,
    make_optimizer,
    measure_statistics,
    require_finite,
    start,
    train,
)


class Spring(Method):
    """One weight, pulled to the mean of the batch: L = 0.5 (w - m)^2."""

    def __init__(self, weight=1.0):
        super().__init__(MethodSettings(), Task(1, ("background", "organ"), 1))
        self.weight = torch.nn.Parameter(torch.tensor([weight]))
        self.fixed = torch.nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.register_buffer("statistic", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.calls = []

    def loss(self, batch, step):
        self.calls.append(("loss", step, torch.is_autocast_enabled("cpu"), self.training))
        self.statistic += 1
        self.count += 1
        gap = self.weight - batch.images.mean()
        return Loss(pull=Term(0.5, gap.square().sum()))

    def predict(self, images):
        return images

    def before_step(self, step):
        self.calls.append(("before", step))

    def after_step(self, step):
        self.calls.append(("after", step, self.weight.item()))


def pull_to(values):
    """Batches whose mean is the step's value."""

    def batch_at(step):
        return Batch(torch.full((1, 1, 2, 2, 2), float(values[step])), torch.zeros(1, 2, 2, 2))

    return batch_at


def run(settings, values=None, weight=1.0):
    """Spring trained for settings.steps; the state, and (step, lr, weight) after each step."""
    method, rows = Spring(weight), []
    values = np.zeros(settings.steps) if values is None else values

    def note(state, loss):
        rows.append((state.step, state.optimizer.param_groups[0]["lr"], method.weight.item()))

    return fit(method, settings, pull_to(values), note), rows


TARGETS = np.random.default_rng(0).normal(0, 2, 12)


# The optimizers


@pytest.mark.parametrize("power", [0.0, 0.9])
def test_sgd_with_momentum_and_decay(power):
    s = fast(steps=12, optimizer="sgd", lr=0.1, lr_power=power, momentum=0.8, weight_decay=0.01)
    _, rows = run(s, TARGETS)
    w, velocity = 1.0, 0.0
    for step, target in enumerate(TARGETS):
        velocity = 0.8 * velocity + (w - target) + 0.01 * w
        w -= 0.1 * (1 - step / 12) ** power * velocity
        assert rows[step][2] == pytest.approx(w, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_may_have_their_first_gradient_later_than_others(optimizer):
    early, late = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    stepper = make_optimizer([early, late], fast(steps=2, optimizer=optimizer, lr=0.1))
    early.grad = torch.ones(1)
    stepper.step()
    late.grad = torch.ones(1)
    stepper.step()
    assert early < late < 1


def test_adamw():
    s = fast(steps=12, optimizer="adamw", lr=0.1, weight_decay=0.02)
    _, rows = run(s, TARGETS)
    w, mean, square = 1.0, 0.0, 0.0
    for step, target in enumerate(TARGETS):
        lr, g = 0.1 * (1 - step / 12) ** 0.9, w - target
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        w -= lr * 0.02 * w
        w -= (
            lr
            * mean
            / (1 - 0.9 ** (step + 1))
            / (math.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        )
        assert rows[step][2] == pytest.approx(w, rel=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.9, 1.0])
def test_rate_falls_polynomially(power):
    _, rows = run(fast(steps=10, lr=0.2, lr_power=power))
    expected = [(i + 1, 0.2 * (1 - i / 10) ** power) for i in range(10)]
    assert [row[:2] for row in rows] == [(i, pytest.approx(lr)) for i, lr in expected]


def test_rate_drops_to_a_tenth_after_each_share_of_the_run():
    s = fast(steps=12, lr=1.0, lr_power=0.0, lr_drop_every=5 / 12)
    assert [learning_rate(s, step) for step in range(12)] == pytest.approx(
        [1.0] * 5 + [0.1] * 5 + [0.01] * 2
    )


def test_rate_of_a_longer_horizon_does_not_reach_zero():
    s = fast(steps=14, lr=1.0, lr_power=0.9, lr_horizon=17 / 14)
    assert learning_rate(s, 7) == pytest.approx((1 - 7 / 17) ** 0.9)


def test_frozen_weights_are_left_alone():
    state, _ = run(fast(steps=3))
    assert state.method.fixed.item() == 7
    assert sum(len(g["params"]) for g in state.optimizer.param_groups) == 1


# The running average


def test_average_in_closed_form():
    state, rows = run(fast(steps=12, weights="ema", ema_decay=0.7), TARGETS)
    keep = [min(1 - 1 / (t + 1), 0.7) for t in range(12)]
    shares = [(1 - keep[t]) * math.prod(keep[t + 1 :]) for t in range(12)]
    expected = sum(share * row[2] for share, row in zip(shares, rows, strict=True))
    assert sum(shares) == pytest.approx(1)
    assert state.average["weight"].item() == pytest.approx(expected, rel=1e-5)
    statistics = sum(share * (i + 1) for i, share in enumerate(shares))
    assert state.average["statistic"].item() == pytest.approx(statistics, rel=1e-5)


def test_average_is_of_what_is_learned():
    state, _ = run(fast(steps=3, weights="ema"))
    assert set(state.average) == {"weight", "statistic"}  # neither frozen weights nor counters


@pytest.mark.parametrize("weights", ["last", "ema"])
def test_weights_that_count_in_the_end(weights):
    state, rows = run(fast(steps=12, weights=weights, ema_decay=0.9), TARGETS)
    found = state.weights()
    assert set(found) == set(state.method.state_dict())
    expected = state.average["weight"].item() if weights == "ema" else rows[-1][2]
    assert found["weight"].item() == expected
    assert (found["weight"].item() == rows[-1][2]) == (weights == "last")
    assert found["count"].item() == 12


class Normed(Method):
    """A batch normalization after one weight, in a network that predicts and in one that does not."""

    training_only = ("aside.",)

    def __init__(self):
        super().__init__(MethodSettings(), Task(1, ("background", "organ"), 1))
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.norm, self.aside = BatchNorm3d(1), BatchNorm3d(1)

    def loss(self, batch, step):
        mixed = self.norm(self.weight * batch.images) + self.aside(self.weight * batch.images)
        return Loss(pull=Term(1.0, (self.weight - 3).square().sum() + 0 * mixed.sum()))

    def predict(self, images):
        return self.norm(self.weight * images)


def test_the_average_normalizes_by_plain_patches_of_its_own():
    """Mean and variance are those of w x over batches after the last, w the averaged weight."""
    seen = []

    def batch_at(step):
        seen.append(step)
        plain = torch.full((1, 1, 2, 2, 2), float(step))
        plain[..., 0] += 4
        return Batch(plain + 100, torch.zeros(1, 2, 2, 2), plain)

    state = fit(Normed(), fast(steps=5, lr=0.1, statistics_batches=3), batch_at)
    weight = state.average["weight"].item()
    assert weight != state.method.weight.item()
    assert seen == [*range(5), 5, 6, 7]
    mean = np.mean([step + 2 for step in (5, 6, 7)])
    assert state.average["norm.running_mean"].item() == pytest.approx(weight * mean, rel=1e-5)
    variance = weight**2 * 4 * 8 / 7
    assert state.average["norm.running_var"].item() == pytest.approx(variance, rel=1e-5)
    assert "aside.running_mean" not in state.average
    assert state.method.norm.running_mean.item() > 20  # of changed images, as the training had them
    assert state.method.training


@pytest.mark.parametrize("changes", [{"weights": "last"}, {"statistics_batches": 0}])
def test_statistics_of_training_stay_where_they_are_asked_for(changes):
    def batch_at(step):
        assert step < 4
        return make_batch(step)

    state = fit(build("supervised"), fast(steps=4, **changes), batch_at)
    assert state.step == 4


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_measures_its_statistics_without_changing_its_state(name):
    """What predicts is normalized anew; the state that training would go on from is what it was."""
    method = build(name, "robust", steps=4)
    settings = fast(weights="ema", statistics_batches=1)
    state = start(method, settings, make_machine(settings))
    before = {key: value.clone() for key, value in method.state_dict().items()}
    measure_statistics(state, lambda step: batch_for(method), settings, make_machine(settings))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    moved = [
        key
        for key, value in state.average.items()
        if key.endswith("running_mean") and not torch.equal(value, before[key])
    ]
    assert moved
    assert all(torch.isfinite(value).all() for value in state.average.values())


def test_average_of_a_teachers_method_leaves_the_teacher_out():
    method = build("vclipseg", "robust", teacher_decay=0.9)
    settings = fast(steps=1)
    state = start(method, settings, make_machine(settings))
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained <= set(state.average)
    teacher = {name for name, _ in method.teacher.named_parameters(prefix="teacher")}
    assert not teacher & set(state.average)
    assert not any(name.startswith("teacher.") for name in state.average)  # nor its statistics


@pytest.mark.parametrize("name", ["caml", "arco", "caussl"])
def test_average_leaves_memories_out(name):
    """What is read in training only, and is not trained, need not be averaged."""
    method = build(name, "robust")
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    average = set(start(method, fast(steps=1), make_machine(fast(steps=1))).average)
    assert trained <= average
    others = [name for name in average - trained if name.startswith(method.training_only)]
    assert others == []
    assert any(name.endswith("running_mean") for name in average)


# The loop


def test_order_of_a_step():
    state, rows = run(fast(steps=2))
    assert state.method.calls == [
        ("before", 0),
        ("loss", 0, False, True),
        ("after", 0, rows[0][2]),
        ("before", 1),
        ("loss", 1, False, True),
        ("after", 1, rows[1][2]),
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision(precision):
    state, _ = run(fast(steps=1, precision=precision))
    assert state.method.calls[1] == ("loss", 0, precision == "bf16", True)
    assert state.method.weight.dtype == state.average["weight"].dtype == torch.float32


def test_random_draws_are_seeded_by_seed_and_step():
    class Noisy(Spring):
        def loss(self, batch, step):
            self.calls.append(torch.rand(()).item())
            return super().loss(batch, step)

    def draws(seed, first=0):
        method, settings = Noisy(), fast(steps=4, seed=seed)
        state = start(method, settings, make_machine(settings))
        state.step = first
        torch.rand(5)  # what came before does not matter
        train(state, pull_to(np.zeros(4)), settings, make_machine(settings))
        return [call for call in method.calls if isinstance(call, float)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(1, first=2) == draws(1)[2:]
    assert len(set(draws(1))) == 4


def test_nothing_is_done_after_the_last_step():
    settings = fast(steps=3)
    state, _ = run(settings)
    fit(state.method, settings, pull_to([]), state=state)
    assert state.step == 3


def test_what_on_step_raises_ends_the_training():
    method, settings = Spring(), fast(steps=5)
    state = start(method, settings, make_machine(settings))

    def stop(state, loss):
        if state.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(state, pull_to(np.zeros(5)), settings, make_machine(settings), stop)
    assert state.step == 2
    assert method.calls[-1][:2] == ("after", 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_term(bad):
    class Broken(Spring):
        def loss(self, batch, step):
            loss = super().loss(batch, step)
            if step == 2:
                loss["culprit"] = Term(1.0, torch.tensor(bad))
            return loss

    method, settings = Broken(), fast(steps=5)
    state = start(method, settings, make_machine(settings))
    with pytest.raises(NonFiniteLossError, match=rf"step 2.*pull=.*culprit={bad:g}") as error:
        train(state, pull_to(np.zeros(5)), settings, make_machine(settings))
    assert "train.lr" in str(error.value)
    assert isinstance(error.value, VclipsegError)
    assert math.isfinite(method.weight.item())
    assert state.step == 2


def test_a_broken_image_names_the_terms_of_a_real_method():
    method = build("supervised", "robust")
    batch = batch_for(method)
    batch.images[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="dice=nan, ce=nan"):
        fit(method, fast(steps=1), lambda step: batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": 0},
        {"ema_decay": 1.0},
        {"optimizer": "adam"},
        {"step": 5},
        {"patch": (1, 2)},
        {"save_memory": True, "compile": "on"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        TrainSettings(**wrong)


# Compiled networks and losses that are looked at later


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_are_compiled_in_one_piece(precision):
    """A graph without a break; how it is then made quick is the compiler's affair."""
    method = build("vclipseg", "robust")
    images = batch_for(method, size=32).images
    torch._dynamo.reset()
    for network in (method.network, method.teacher):
        whole = torch.compile(network, backend="eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = whole(images).logits
        assert all(torch.isfinite(z).all() for z in logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler
def test_compiled_networks_have_the_same_gradients():
    try:
        require_compiler(torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))
    gradients = []
    for choice in ("off", "on"):
        method = build("supervised", "robust", filters=2)
        settings = fast(compile=choice)
        start(method, settings, make_machine(settings))
        torch.manual_seed(0)
        method.loss(batch_for(method, size=32), LATE).total.backward()
        parts = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    plain, compiled = gradients
    assert (compiled - plain).norm() < 0.01 * plain.norm()  # small maps make rounding errors larger


@pytest.mark.parametrize(
    ("done", "read"), [(1, False), (3, True), (5, True), (6, True), (7, False), (8, True)]
)
def test_losses_are_looked_at_before_they_are_logged_or_saved(done, read):
    settings = fast(steps=8, log_every=3, checkpoint_every=5)
    assert settings.is_read_after(done) == read


def test_the_first_loss_of_several_that_is_not_finite_is_named():
    def loss(value):
        return Loss(pull=Term(0.5, torch.tensor(1.0)), culprit=Term(1.0, torch.tensor(value)))

    require_finite([(4, loss(1.0)), (5, loss(2.0))])
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*pull=1, culprit=nan"):
        require_finite([(4, loss(1.0)), (5, loss(math.nan)), (6, loss(math.inf))])


# Stopping and going on


def assert_same(a, b, path="state"):
    """Bit for bit, however deep."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def rows_of(folder):
    rows = read_log(folder / "log.csv")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def logged(folder, settings, stop=None):
    """What `on_step` does in a run: log, save, and perhaps stop."""
    state_file = folder / "last.pt"
    state = None

    def begin(make):
        nonlocal state
        method = make()
        state = start(method, settings, make_machine(settings))
        content = load_state(state_file) if state_file.is_file() else None
        log = RunLog(folder, content["step"] if content else 0)
        if content:
            log.load_state_dict(content.pop("log"))
            state.load_state_dict(content)

        def on_step(state, loss):
            log.add(loss)
            if state.step % settings.log_every == 0:
                log.row(state.step, state.optimizer.param_groups[0]["lr"])
            if state.step == stop:
                log.write()
                save_state(state_file, {**state.state_dict(), "log": log.state_dict()})
                raise KeyboardInterrupt

        def batch_at(step):
            return batch_for(method, step, step=step)

        try:
            train(state, batch_at, settings, make_machine(settings), on_step)
        except KeyboardInterrupt:
            assert state.step == stop
        log.close()
        return state

    return begin


@pytest.mark.parametrize(("name", "preset"), RECIPES_IN_TIME)
def test_a_resumed_run_equals_an_unbroken_one(name, preset, tmp_path):
    """Weights, optimizer, average and log; it is stopped amid the rows of steps 2 and 4."""
    settings = fast(steps=4, log_every=2)

    def made(seed):
        return lambda: build(name, preset, steps=4, seed=seed)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    unbroken = logged(whole, settings)(made(0))
    logged(broken, settings, stop=3)(made(0))
    resumed = logged(broken, settings)(made(1))  # initial weights must not matter
    assert_same(resumed.state_dict(), unbroken.state_dict())
    assert rows_of(broken) == rows_of(whole)
    assert [row["step"] for row in rows_of(whole)] == ["2", "4"]


def test_a_resumed_run_equals_an_unbroken_one_in_bfloat16(tmp_path):
    settings = fast(steps=3, precision="bf16")

    def trained(first, method):
        state = start(method, settings, make_machine(settings))
        if first:
            state.load_state_dict(load_state(tmp_path / "last.pt"))

        def on_step(state, loss):
            if not first and state.step == 2:
                save_state(tmp_path / "last.pt", state.state_dict())

        return fit(method, settings, lambda step: make_batch(step), on_step, state)

    unbroken, resumed = trained(False, build()), trained(True, build(seed=1))
    assert_same(resumed.state_dict(), unbroken.state_dict())
