"""A training step and the prediction of a test set on a GPU, beside eager float32 on the same one.

    python benchmarks/gpu.py --record results/speed-gpu.json
    python benchmarks/gpu.py --variant bf16 --variant "bf16, graphs"
    python benchmarks/gpu.py --small --device cpu --variant fp32      # does it run? no figures

VCLIPSeg as published: 16 filters, two labeled and two unlabeled patches of 112 x 112 x 80. The reference is
torch's own layers in the plain memory layout, with one batch that lies on the GPU. Ours is the project's
loop with all that belongs to it: patches cut from volumes, the average, the log's means. Needs torch, numpy
and pydantic alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import measures
import reference
import speed
from measures import Figures, Sizes

from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import PatchSampler, made_ahead
from vclipseg.data.resident import Resident
from vclipseg.device import default_device
from vclipseg.methods.base import Loss
from vclipseg.training import TrainSettings, TrainState, make_machine, start, train

SGD = {"optimizer": "sgd", "lr": 0.01, "lr_power": 0, "weights": "last"}
VARIANTS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": "on"},
    "bf16, graphs": {"precision": "bf16", "compile": "graphs"},
    "bf16, saving memory": {"precision": "bf16", "save_memory": True},
}
WARM_UP = 3


@dataclass(frozen=True)
class Pace:
    """Of some steps."""

    ms: float  # a step
    gib: float  # at most, on the GPU
    loss: float  # after the last one

    def __str__(self) -> str:
        return f"{self.ms:.4g} ms, {self.gib:.3g} GiB, loss {self.loss:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), default=[])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--record", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if default_device().type != arguments.device:
        parser.error("no GPU here; try the script with --device cpu --small")
    sizes = measures.SMALL if arguments.small else measures.PAPER
    rows: list[dict] = []
    for row in measured(sizes, arguments.variant or list(VARIANTS), arguments.steps):
        rows.append(row)
        print(speed.describe(row), flush=True)
        if arguments.record:
            speed.write(arguments.record, rows, [row["name"] for row in rows])


def measured(sizes: Sizes, variants: list[str], steps: int) -> Iterator[dict]:
    """The rows of the table, each as it is known; a variant that fails is said and left out."""
    yield line("predicting 20 scans", "s", prediction(sizes), 5)
    eager = eager_pace(sizes, steps)
    print(f"eager fp32: {eager}", file=sys.stderr, flush=True)
    paces = {}
    for name in variants:
        try:
            paces[name] = our_pace(sizes, VARIANTS[name], steps)
            print(f"{name}: {paces[name]}", file=sys.stderr, flush=True)
        except Exception:  # a compiler's own, say: the others are measured all the same
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if paces:
        yield from of_steps(eager, paces)


def of_steps(eager: Pace, paces: dict[str, Pace]) -> list[dict]:
    """The rows of the training step."""
    best = min(paces, key=lambda name: paces[name].ms)
    least = min(paces, key=lambda name: paces[name].gib)
    ms, gib = paces[best].ms, paces[least].gib
    told = "; ".join(f"{name}: {pace}" for name, pace in {"eager fp32": eager, **paces}.items())
    return [
        line("training step, VCLIPSeg", "ms", Figures(eager.ms, ms, ms, f"{best}; {told}"), 60),
        line(
            "training step, times as fast as eager float32",
            "ms",
            Figures(eager.ms, ms, eager.ms / ms, best),
            5,
            at_least=True,
        ),
        line(
            "peak memory, training step",
            "GiB",
            Figures(eager.gib, gib, gib / eager.gib, f"{least}, {paces[least].ms:.4g} ms"),
            0.6,
        ),
    ]


def line(name: str, unit: str, figures: Figures, target: float, at_least: bool = False) -> dict:
    row = speed.Row(name, lambda sizes: figures, unit, target, at_least)
    return speed.line(row, figures, torch.get_num_threads())


def wait() -> None:
    """Until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Since `forget_peak`; without a GPU that of the process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return measures.peak_gib()


def eager_pace(sizes: Sizes, steps: int) -> Pace:
    """Of the reference."""
    forget_peak()
    device = default_device()
    method = reference.plain(measures.make_method(sizes)).to(device)
    batch = measures.make_batch(sizes).to(device)
    optimizer = torch.optim.SGD(method.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    seconds, loss = [], torch.zeros(())
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = method.loss(batch, 7_500).total
        loss.backward()
        optimizer.step()
        wait()
        seconds.append(time.perf_counter() - began)
    return Pace(1000 * statistics.median(seconds[WARM_UP:]), peak_gib(), loss.item())


def our_pace(sizes: Sizes, variant: dict, steps: int) -> Pace:
    """Of the project's loop, its volumes on the device; mean of all steps, nothing is waited for between."""
    forget_peak()
    settings = TrainSettings.model_validate({**SGD, **variant, "steps": WARM_UP + steps})
    machine = make_machine(settings)
    state = start(measures.make_method(sizes), settings, machine)
    clock: list[float] = []
    last: list[float] = []

    def on_step(state: TrainState, loss: Loss) -> None:
        if state.step in (WARM_UP, settings.steps):
            wait()
            clock.append(time.perf_counter())
            last.append(loss.total.item())

    with made_ahead(make_sampler(sizes, machine.device).batch, settings.steps) as batch_at:
        train(state, batch_at, settings, machine, on_step)
    return Pace(1000 * (clock[1] - clock[0]) / steps, peak_gib(), last[-1])


def make_sampler(sizes: Sizes, device: torch.device) -> PatchSampler:
    """Two labeled and two unlabeled patches of volumes of noise."""
    volumes = dict(zip("abcdefgh", measures.scans(sizes) * 4, strict=False))
    images = {name: volume.numpy() for name, volume in volumes.items()}
    labels = {name: (image[0] > 1).astype("uint8") for name, image in images.items()}
    return PatchSampler(
        image=images.__getitem__,
        labels=labels.__getitem__,
        labeled="abcd",
        unlabeled="efgh",
        patch=sizes.patch,
        patches=lambda step: (2, 2),
        augment=AugmentSettings(rotate_flip=True),
        seed=0,
        resident=Resident(device, 2**33),
    )


def prediction(sizes: Sizes) -> Figures:
    """The paper's windows and strides over every scan; seconds from images in memory to masks."""
    predictor = measures.make_predictor(
        sizes,
        measures.make_method(sizes),
        mode="window",
        window=sizes.patch,
        stride=sizes.strides,
        blend="uniform",
    )
    images = measures.scans(sizes)
    predictor.prepared(images[0])
    seconds = sum(
        measures.timed(lambda image=image: predictor.prepared(image).argmax(0)) for image in images
    )
    return Figures(None, seconds, seconds, f"{len(images)} scans, strides {sizes.strides}")


if __name__ == "__main__":
    main()
