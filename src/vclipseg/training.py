"""The one loop that trains every method.

A step is a function of the state and the step's number alone: batch, dropout and every other random
draw are seeded by it. So a run that was stopped and resumed equals an unbroken one, on the CPU bit for
bit. Several processes may train together (`vclipseg.ranks`): gradients are averaged over them, and all else
is computed alike by each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vclipseg.data.batch import Batch
from vclipseg.device import Machine, default_device, require_compiler, resolve_precision
from vclipseg.errors import VclipsegError
from vclipseg.heap import keep_freed_memory
from vclipseg.methods.base import Ema, Loss, Method, Term, let_follow
from vclipseg.networks.vnet import recompute
from vclipseg.ranks import across, average_gradients, local_rank, mean, own_draws
from vclipseg.settings import Settings

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]


class TrainSettings(Settings):
    """How long, how fast, and which weights count in the end."""

    seed: Annotated[int, Field(ge=0)] = 1337
    """Of initial weights, patches, augmentation and dropout."""
    init_from: str | None = None
    """Folder of a finished run whose weights this one starts from, where name and shape are the same."""
    steps: Annotated[int, Field(gt=0)] = 15_000
    """Optimizer steps."""
    patch: Size = (112, 112, 80)
    """Size of a training patch in prepared voxels."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with momentum, as published, or AdamW."""
    lr: Annotated[float, Field(gt=0)] = 4e-3
    """Learning rate of the first step."""
    lr_power: Annotated[float, Field(ge=0)] = 0.9
    """The rate falls as (1 - step/steps)^lr_power; 0 keeps it constant."""
    lr_horizon: Annotated[float, Field(ge=1)] = 1.0
    """How many times `steps` that fall would take; above 1 the rate does not reach 0."""
    lr_drop_every: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the run after which the rate is divided by 10, again and again; 0: never."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum, with SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of either optimizer."""
    weights: Literal["last", "ema"] = "ema"
    """Which weights are evaluated and shipped: the last, or their running average."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the running average keeps each step."""
    statistics_batches: Annotated[int, Field(ge=0)] = 25
    """Batches of plain patches, neither mixed nor changed in intensity, of which averaged weights get the
    statistics that batch normalization predicts with (Izmailov et al., UAI 2018); 0: those of training."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the convolutions: "auto" is bf16 where the machine computes it in hardware. Weights, losses and
    averages are float32 always."""
    save_memory: bool = False
    """Compute the stages of the networks again in backward instead of storing them: less than half of what
    is stored, a third more work, the same result up to rounding."""
    resident: Literal["auto", "always", "never"] = "auto"
    """Hold the prepared volumes on the device that trains, and cut and change patches there; "auto" does so
    on a GPU. Volumes beyond half of its free memory are sent there each time."""
    compile: Literal["off", "on", "graphs"] = "off"
    """Compile the networks with `torch.compile`; "graphs" also records them as CUDA graphs. Needs a C++
    compiler."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads; all of the machine's when left out."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between rows of log.csv, each their mean."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    """Steps between checkpoints."""
    tensorboard: bool = True
    """Also write the log for TensorBoard."""

    @model_validator(mode="after")
    def _stages_are_not_compiled(self) -> Self:
        if self.save_memory and self.compile != "off":
            raise ValueError("save_memory and compile cannot be had together")
        return self

    @property
    def batches(self) -> int:
        """That a run needs: one a step, and those that averaged weights are measured by."""
        return self.steps + (self.statistics_batches if self.weights == "ema" else 0)

    def is_read_after(self, steps: int) -> bool:
        """Whether anything is logged or saved once `steps` are done."""
        return steps == self.steps or not (steps % self.log_every and steps % self.checkpoint_every)


class NonFiniteLossError(VclipsegError):
    """A loss became NaN or infinite; the message names the term."""


@dataclass
class TrainState:
    """All that changes while training."""

    method: Method
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] = field(default_factory=dict)  # empty unless weights = "ema"
    step: int = 0
    unseen: list[tuple[int, Loss]] = field(default_factory=list)  # steps whose losses no one read

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; tensors are not copied."""
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step = state["step"]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)

    def require_finite(self) -> None:
        """Read the losses that no one has read yet, as before a checkpoint.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if self.unseen:
            require_finite(self.unseen)
            self.unseen.clear()

    def weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated: the average where there is one, else the last."""
        return {**self.method.state_dict(), **self.average}

    def model(self) -> dict[str, Tensor]:
        """Of these, what prediction needs: what a model file holds."""
        unneeded = self.method.training_only
        return {k: v for k, v in self.weights().items() if not k.startswith(unneeded)}


def make_machine(settings: TrainSettings) -> Machine:
    """One device, the GPU of this rank where there are GPUs, and the precision asked for."""
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.backends.cudnn.benchmark = True  # all patches are of one size
    return Machine(device, resolve_precision(settings.precision, device.type))


def start(method: Method, settings: TrainSettings, machine: Machine) -> TrainState:
    """The state before the first step; moves the method to the device.

    Raises:
        UsageError: its networks are to be compiled, and cannot be.
    """
    method.to(device=machine.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    recompute(method, settings.save_memory)
    if settings.compile != "off":
        require_compiler(machine.device)
        for network in method.children():
            network.compile(mode="reduce-overhead" if settings.compile == "graphs" else None)
    parameters = [p for p in method.parameters() if p.requires_grad]
    average = {}
    if settings.weights == "ema":
        average = {name: value.clone() for name, value in averaged(method).items()}
    return TrainState(method, make_optimizer(parameters, settings), average)


def make_optimizer(parameters: list, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW."""
    s = settings
    if s.optimizer == "sgd":  # fused, it fails where some weights have their first gradient later
        return torch.optim.SGD(
            parameters,
            s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            nesterov=s.nesterov,
        )
    fused = parameters[0].device.type in ("cuda", "cpu") or None
    return torch.optim.AdamW(parameters, s.lr, weight_decay=s.weight_decay, fused=fused)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of a step: a polynomial fall, drops to a tenth, or both."""
    done = step / settings.steps
    fall = (1 - done / settings.lr_horizon) ** settings.lr_power
    drops = int(done / settings.lr_drop_every + 1e-9) if settings.lr_drop_every else 0
    return settings.lr * fall * 0.1**drops


def train(
    state: TrainState,
    batch_at: Callable[[int], Batch],
    settings: TrainSettings,
    machine: Machine,
    on_step: Callable[[TrainState, Loss], None] = lambda state, loss: None,
) -> None:
    """Go on from `state` until `settings.steps` optimizer steps are done.

    Args:
        state: changed in place.
        batch_at: the batch of a step.
        settings: of the run.
        machine: device and precision.
        on_step: called after each step; what it raises ends the training.

    Raises:
        NonFiniteLossError: a term of the loss is NaN or infinite. A GPU would have to be waited for to
            know: there it is raised with the next row of the log or before a checkpoint that is due;
            who saves in between asks `TrainState.require_finite` first.
    """
    if machine.device.type == "cpu":
        keep_freed_memory()
    method, optimizer = state.method.train(), state.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    while state.step < settings.steps:
        step = state.step
        torch.manual_seed(settings.seed * 1_000_003 + step)
        if settings.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        batch = batch_at(step).to(machine.device)
        method.before_step(step)
        optimizer.zero_grad(set_to_none=True)
        with machine.autocast(), own_draws():
            loss = method.loss(batch, step)
        total = loss.total
        state.unseen.append((step, detached(loss)))
        if machine.device.type == "cpu" or settings.is_read_after(step + 1):
            state.require_finite()
        total.backward()
        average_gradients(trained)
        optimizer.step()
        method.after_step(step)
        follow(state, settings.ema_decay)
        state.step += 1
        if state.average and state.step == settings.steps:
            measure_statistics(state, batch_at, settings, machine)
        on_step(state, loss)


def averaged(method: Method) -> dict[str, Tensor]:
    """The entries of the state that a running average is taken of.

    They are the trained weights, and the statistics of the networks that predict. Teachers are averages
    already, and memories are read in training only.
    """
    parameters = dict(method.named_parameters())
    teachers = [f"{name}." for name, m in method.named_modules() if isinstance(m, Ema)]
    left_out = (*teachers, *method.training_only)
    return {
        name: value
        for name, value in method.state_dict().items()
        if value.is_floating_point()
        and (
            parameters[name].requires_grad if name in parameters else not name.startswith(left_out)
        )
    }


@torch.no_grad()
def follow(state: TrainState, decay: float) -> None:
    """Let the average follow: m <- a m + (1 - a) w with a = min(1 - 1/(t+1), decay)."""
    if not state.average:
        return
    keep = min(1 - 1 / (state.step + 1), decay)
    current = state.method.state_dict()
    let_follow([(mine, current[name]) for name, mine in state.average.items()], 1 - keep)


@torch.no_grad()
def measure_statistics(
    state: TrainState, batch_at: Callable[[int], Batch], settings: TrainSettings, machine: Machine
) -> None:
    """Give the average the statistics of plain patches, which are what it will see.

    Those of training are of other weights, and of patches that are mixed and changed in intensity.
    """
    method = copy.deepcopy(state.method).eval()
    method.load_state_dict(state.weights())
    norms = [
        module.train()
        for name, module in method.named_modules()
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in state.average
    ]
    for i in range(settings.statistics_batches if norms else 0):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # the mean of all so far
        batch = batch_at(settings.steps + i).to(machine.device)
        with machine.autocast():
            method.opinions(batch.plain)
    measured = method.state_dict()
    for name, value in state.average.items():
        value.copy_(measured[name])


def detached(loss: Loss) -> Loss:
    """Its terms without their gradients."""
    terms = Loss()
    for name, (weight, value) in loss.items():
        terms[name] = Term(weight, value.detach())
    return terms


def require_finite(losses: list[tuple[int, Loss]]) -> None:
    """Look at the losses of some steps; every rank must look at the same ones.

    Raises:
        NonFiniteLossError: one of them is NaN or infinite.
    """
    totals = across(torch.stack([loss.total for _, loss in losses]))
    for (step, loss), finite in zip(losses, torch.isfinite(totals).tolist(), strict=True):
        if not finite:
            raise NonFiniteLossError(describe_nonfinite(loss, step))


def describe_nonfinite(loss: Loss, step: int) -> str:
    """Which term broke, and what helps."""
    terms = ", ".join(f"{name}={float(mean(term.value.detach())):g}" for name, term in loss.items())
    return (
        f"step {step}: the loss is not finite ({terms}). Lower train.lr, or set train.precision to "
        "fp32; `vclipseg check` finds NaN or extreme values in the data."
    )
