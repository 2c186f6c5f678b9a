"""What `speed.py` measures: each function gives the figures of one row of its table."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import reference
import torch
from torch.utils.flop_counter import FlopCounterMode

from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import Batch, PatchSampler, made_ahead
from vclipseg.data.volume import Volume
from vclipseg.inference import Predictor, PredictSettings
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Method, Task
from vclipseg.networks.folding import fold_batchnorm
from vclipseg.training import TrainSettings, make_machine, start, train

LEFT_ATRIA = (
    *((215, 140, 88), (175, 132, 88), (196, 148, 88), (209, 140, 88), (170, 136, 88)),
    *((210, 154, 88), (168, 136, 88), (215, 147, 88), (191, 154, 88), (186, 143, 88)),
    *((183, 133, 88), (190, 135, 88), (190, 138, 88), (187, 139, 88), (177, 139, 88)),
    *((182, 136, 88), (178, 146, 88), (192, 141, 88), (231, 143, 88), (232, 144, 88)),
)
"""Voxels of the 20 test cases of the Left Atrium, as the literature cuts them."""


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    filters: int
    patch: tuple[int, int, int]
    strides: tuple[int, int, int]
    scans: tuple[tuple[int, int, int], ...]
    ct: tuple[int, int, int]
    windows: int  # of which the reference is timed; the rest are counted
    matrix: int  # side of the matrices whose product tells the peak
    repeats: int
    threads: int = 2


PAPER = Sizes(16, (112, 112, 80), (18, 18, 4), LEFT_ATRIA, (512, 512, 400), 40, 4096, 3)
SMALL = Sizes(2, (32, 32, 16), (8, 8, 4), ((36, 34, 20), (34, 32, 18)), (48, 40, 20), 4, 256, 1)


@dataclass(frozen=True)
class Figures:
    """`value` is what the target is about: a ratio to the reference, or the figure itself."""

    reference: float | None
    ours: float
    value: float
    note: str = ""


def make_method(sizes: Sizes, classes: int = 2, preset_name: str = "faithful") -> Method:
    """VCLIPSeg, its text vectors random."""
    torch.manual_seed(0)
    names = ("background", *(f"organ {k}" for k in range(1, classes)))
    cls, values = method_class("vclipseg"), preset("vclipseg", preset_name)
    task = Task(1, names, 15_000, torch.nn.functional.normalize(torch.randn(classes, 512)))
    return cls(cls.Settings(**{**values["method"], "filters": sizes.filters}), task)


def make_batch(sizes: Sizes) -> Batch:
    """Two labeled and two unlabeled patches of noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2, *sizes.patch), generator=generator)
    return Batch(torch.randn(4, 1, *sizes.patch, generator=generator), labels)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# Training


def step(sizes: Sizes) -> Figures:
    """An optimizer step; the reference has the same equations in its own layout and layers."""
    batch = make_batch(sizes)
    settings = TrainSettings(optimizer="sgd", lr=0.01, lr_power=0, weights="last")
    plain = reference.plain(make_method(sizes))
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def plain_step() -> None:
        optimizer.zero_grad()
        plain.loss(batch, 7_500).total.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        plain_step()  # also the warm-up
    theirs = statistics.median(timed(plain_step) for _ in range(max(sizes.repeats - 1, 1)))
    ours = {p: step_seconds(sizes, batch, settings, p) for p in ("fp32", "bf16")}
    best = min(ours, key=lambda precision: ours[precision])
    peak, flop = peak_flops(sizes.matrix), counter.get_total_flops()
    note = (
        f"{best}; " + ", ".join(f"{p} {s:.3g} s" for p, s in ours.items()) + f"; {flop / 1e9:.0f} "
        f"GFLOP a step, {flop / ours['fp32'] / peak:.0%} of the peak of {peak / 1e9:.0f} GFLOP/s in "
        f"fp32, {flop / theirs / peak:.0%} for the reference"
    )
    return Figures(theirs, ours[best], theirs / ours[best], note)


def step_seconds(sizes: Sizes, batch: Batch, settings: TrainSettings, precision: str) -> float:
    """Median seconds of a step of the project's loop."""
    settings = settings.model_copy(update={"precision": precision, "steps": sizes.repeats + 2})
    machine = make_machine(settings)
    times = [time.perf_counter()]
    train(
        start(make_method(sizes), settings, machine),
        lambda step: batch,
        settings,
        machine,
        lambda *_: times.append(time.perf_counter()),
    )
    return statistics.median(np.diff(times)[1:])


def peak_flops(size: int) -> float:
    """Of the best of five products of square matrices, a second."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(5))


def waiting(sizes: Sizes) -> Figures:
    """Waiting for a batch that was made ahead, while steps take as long as a training step does."""
    image = np.random.default_rng(0).standard_normal((1, *LEFT_ATRIA[0]), dtype=np.float32)
    labels = (image[0] > 1).astype(np.uint8)
    sampler = PatchSampler(
        image=lambda case_id: image,
        labels=lambda case_id: labels,
        labeled=["a", "b"],
        unlabeled=["c", "d"],
        patch=sizes.patch,
        patches=lambda step: (2, 2),
        augment=AugmentSettings(rotate_flip=True, intensity=0.3),
        seed=0,
    )
    making = statistics.median(timed(lambda k=k: sampler.batch(k)) for k in range(5))
    settings = TrainSettings(steps=sizes.repeats + 3, weights="last")
    machine = make_machine(settings)
    waits: list[float] = []
    times = [time.perf_counter()]

    with made_ahead(sampler.batch, settings.steps) as next_batch:

        def batch_at(step: int) -> Batch:
            began = time.perf_counter()
            batch = next_batch(step)
            waits.append(time.perf_counter() - began)
            return batch

        state = start(make_method(sizes), settings, machine)
        train(state, batch_at, settings, machine, lambda *_: times.append(time.perf_counter()))
    share = 100 * sum(waits[1:]) / (times[-1] - times[1])
    return Figures(None, share, share, f"a batch takes {1000 * making:.0f} ms to make")


# Prediction


def make_predictor(sizes: Sizes, method: Method, fold: bool = True, **settings: Any) -> Predictor:
    """Of a method that is not trained."""
    description = {
        "class_names": method.class_names,
        "label_values": list(range(len(method.class_names))),
        "channel_names": ["image"],
        "plan": {"spacing": (1.0, 1.0, 1.0), "intensity": ("none",)},
        "predict": {},
        "patch": sizes.patch,
        "method": {"filters": sizes.filters},
    }
    method = method.eval()
    chosen = PredictSettings(**settings)
    return Predictor(fold_batchnorm(method) if fold else method, description, chosen)


def scans(sizes: Sizes) -> list[torch.Tensor]:
    """Images (1, X, Y, Z) of noise."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, *shape, generator=generator) for shape in sizes.scans]


def reference_prediction(sizes: Sizes, method: Method) -> tuple[float, int]:
    """Seconds for all scans, from a sample of windows and their number; and that number."""
    plain = reference.plain(method).eval()
    count = sum(
        len(reference.window_corners(shape, sizes.patch, sizes.strides)) for shape in sizes.scans
    )
    window = np.random.default_rng(2).standard_normal(sizes.patch, dtype=np.float32)
    reference.run_window(plain, window)
    seconds = [timed(lambda: reference.run_window(plain, window)) for _ in range(sizes.windows)]
    return statistics.median(seconds) * count, count


def predict_whole(sizes: Sizes) -> Figures:
    """Every scan in one pass."""
    return predict_all(sizes, mode="whole")


def predict_default(sizes: Sizes) -> Figures:
    """Every scan as `vclipseg predict` covers it: windows that overlap by half."""
    return predict_all(sizes, mode="window")


def predict_all(sizes: Sizes, mode: str) -> Figures:
    """Every scan of the test set, beside the literature's windows."""
    method = make_method(sizes)
    theirs, count = reference_prediction(sizes, method)
    predictor = make_predictor(sizes, method, mode=mode)
    images = scans(sizes)
    predictor.prepared(images[0])
    ours = sum(timed(lambda image=image: predictor.prepared(image)) for image in images)
    return Figures(theirs, ours, theirs / ours, f"{count} windows for the reference")


def predict_windows(sizes: Sizes) -> Figures:
    """The paper's windows and strides, of one scan; its masks are compared voxel by voxel."""
    method = make_method(sizes).eval()
    shape = min(sizes.scans, key=np.prod)
    one = Sizes(**{**sizes.__dict__, "scans": (shape,)})
    image = scans(one)[0]
    began = time.perf_counter()
    theirs_probs = reference.predict(
        reference.plain(method), image[0].numpy(), sizes.patch, sizes.strides
    )
    theirs = time.perf_counter() - began
    predictor = make_predictor(
        sizes,
        method,
        mode="window",
        window=sizes.patch,
        stride=sizes.strides,
        blend="uniform",
        precision="fp32",
    )
    began = time.perf_counter()
    probs = predictor.prepared(image)[1].numpy()
    ours = time.perf_counter() - began
    other = (probs > 0.5) != (theirs_probs > 0.5)
    from_tie = float(np.abs(theirs_probs[other] - 0.5).max(initial=0))
    note = (
        f"fp32; {1 - other.mean():.5%} of the voxels alike, others up to {from_tie:.1e} from a tie"
    )
    return Figures(theirs, ours, theirs / ours, note)


def exported(sizes: Sizes) -> Figures:
    """An exported model, by its quickest engine, on one window; torch computes no more than it does."""
    import export_speed

    method = reference.plain(make_method(sizes).eval())
    images = torch.randn(1, 1, *sizes.patch)
    runs = export_speed.runs_of(method, images, sizes.threads)
    took = export_speed.seconds(runs, 7)
    medians = {name: statistics.median(s) for name, s in took.items()}
    theirs = medians.pop("torch")
    quickest = min(medians, key=medians.__getitem__)
    note = ", ".join(
        f"{name} {theirs / s:.2f} times as fast as torch" for name, s in medians.items()
    )
    with torch.inference_mode():
        expected = runs["torch"]()
        gap = max(float(np.abs(runs[name]() - expected).max()) for name in medians)
    note = f"fp32; {note}; largest difference of a probability {gap:.0e}"
    return Figures(theirs, medians[quickest], theirs / medians[quickest], note)


# Metrics


def metrics(sizes: Sizes) -> Figures:
    """Ellipsoids against shifted ones of other size."""
    from vclipseg.metrics import score

    pairs = []
    for shape in sizes.scans:
        grid = np.indices(shape, dtype=np.float32) / np.array(shape).reshape(3, 1, 1, 1) - 0.5
        label = (grid**2).sum(0) < 0.07
        prediction = np.roll(((grid * 1.1) ** 2).sum(0) < 0.07, 3, axis=1)
        pairs.append((label, prediction))
    reference.measure(*pairs[0])  # what is imported with the first call is no part of it
    score(*pairs[0], (0.625,) * 3)
    began = time.perf_counter()
    theirs = [reference.measure(prediction, label) for label, prediction in pairs]
    their_seconds = time.perf_counter() - began
    began = time.perf_counter()
    ours = [score(label, prediction, (0.625,) * 3) for label, prediction in pairs]
    seconds = time.perf_counter() - began
    names = ("dice", "jaccard", "hd95_voxel", "asd_voxel")
    gap = max(
        abs(a - b[n])
        for x, b in zip(theirs, ours, strict=True)
        for a, n in zip(x, names, strict=True)
    )
    note = f"NSD too, {nsd_share(pairs):.1%} on top, and mm; largest difference {gap:.0e}"
    return Figures(their_seconds, seconds, their_seconds / seconds, note)


def nsd_share(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """What it adds to the other metrics; with and without it take turns, the best of each counts."""
    from vclipseg.metrics import score

    def best_two(pair: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        times = []
        for _ in range(7):
            with_it = timed(lambda: score(*pair, (0.625,) * 3))
            with mock.patch("vclipseg.metrics._nsd", return_value=0.0):
                times.append((with_it, timed(lambda: score(*pair, (0.625,) * 3))))
        first, second = zip(*times, strict=True)
        return min(first), min(second)

    with_it, without = np.sum([best_two(pair) for pair in pairs], axis=0)
    return float(with_it / without - 1)


# Memory, each in a process of its own


def peak_gib() -> float:
    """Of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` of a child begins with what its parent held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reference_step_child(sizes: Sizes) -> dict[str, float]:
    """Two steps of the reference."""
    plain, batch = reference.plain(make_method(sizes)), make_batch(sizes)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    began = time.perf_counter()
    for _ in range(2):
        optimizer.zero_grad()
        plain.loss(batch, 7_500).total.backward()
        optimizer.step()
    return {"gib": peak_gib(), "seconds": (time.perf_counter() - began) / 2}


def our_step_child(sizes: Sizes) -> dict[str, float]:
    """Two steps of the project's loop where it saves memory."""
    settings = TrainSettings(
        optimizer="sgd",
        lr=0.01,
        lr_power=0,
        weights="last",
        steps=2,
        precision="bf16",
        save_memory=True,
    )
    machine, batch = make_machine(settings), make_batch(sizes)
    state = start(make_method(sizes), settings, machine)
    began = time.perf_counter()
    train(state, lambda step: batch, settings, machine)
    return {"gib": peak_gib(), "seconds": (time.perf_counter() - began) / 2}


def ct_child(sizes: Sizes) -> dict[str, float]:
    """A large CT with five classes, from the volume to its mask."""
    predictor = make_predictor(sizes, make_method(sizes, classes=5))
    rng = np.random.default_rng(3)
    array = rng.standard_normal((1, *sizes.ct), dtype=np.float32)
    began = time.perf_counter()
    predictor.predict(Volume(array, np.diag([0.75, 0.75, 0.75, 1])))
    return {"gib": peak_gib(), "seconds": time.perf_counter() - began}


CHILDREN = {
    "reference-step": reference_step_child,
    "step": our_step_child,
    "ct": ct_child,
}


def child(name: str, sizes: Sizes) -> dict[str, float]:
    """What a child process says of itself."""
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--child", name]
    command += ["--threads", str(sizes.threads)] + (["--small"] if sizes.ct == SMALL.ct else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_memory(sizes: Sizes) -> Figures:
    """Process by process."""
    theirs, ours = child("reference-step", sizes), child("step", sizes)
    note = (
        f"{theirs['seconds']:.3g} s a step for the reference, {ours['seconds']:.3g} s for ours with "
        "train.save_memory in bf16"
    )
    return Figures(theirs["gib"], ours["gib"], ours["gib"] / theirs["gib"], note)


def ct_memory(sizes: Sizes) -> Figures:
    """No reference: it would not fit."""
    figures = child("ct", sizes)
    return Figures(None, figures["gib"], figures["gib"], f"{figures['seconds']:.0f} s")


# Start


def help_start(sizes: Sizes) -> Figures:
    """From the shell to the text."""
    return beside_bare_start(sizes, "--help")


def info_start(sizes: Sizes) -> Figures:
    """From the shell to the list of methods."""
    return beside_bare_start(sizes, "info")


def beside_bare_start(sizes: Sizes, *arguments: str) -> Figures:
    """Median of the command and of an interpreter that does nothing, in turn."""
    bare, ours = [sys.executable, "-c", "pass"], [sys.executable, "-m", "vclipseg.cli", *arguments]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3 * sizes.repeats + 1):
        for mine in (True, False):
            command = ours if mine else bare
            run = timed(lambda c=command: subprocess.run(c, capture_output=True, check=True))
            seconds[mine].append(run)
    mine, nothing = (statistics.median(seconds[key]) for key in (True, False))
    return Figures(nothing, mine, mine / nothing)
