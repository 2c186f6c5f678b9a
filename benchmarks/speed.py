"""Time a training step, a whole-volume and a windowed prediction, and the scoring of a case.

    python benchmarks/speed.py                      # sizes for a CPU
    python benchmarks/speed.py --paper              # 112 x 112 x 80, batch of 4, 16 filters

Prints JSON; figures are the median of several runs in one process on made-up input. Machines differ
and are noisy: compare only what stands in one output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from vclipseg.data.batch import Batch
from vclipseg.device import default_device, resolve_precision
from vclipseg.environment import commit, cpu_name
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Task
from vclipseg.metrics import score
from vclipseg.training import TrainSettings, make_fabric, start, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="the paper's size; for a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    patch, filters = ((112, 112, 80), 16) if arguments.paper else ((64, 64, 48), 8)
    rows = []
    for name, preset_name in (
        ("supervised", "robust"),
        ("vclipseg", "faithful"),
        ("vclipseg", "robust"),
    ):
        for precision in ("fp32", "bf16"):
            seconds = step_seconds(name, preset_name, patch, filters, precision, arguments.repeats)
            title = f"training step, {name} {preset_name}, {precision}, {patch}, {filters} filters"
            rows.append({"name": title, "unit": "s", "value": round(seconds, 4)})
    rows.append(
        {"name": "score one case of 194x142x88 voxels", "unit": "s", "value": score_seconds()}
    )
    device = default_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    automatic = resolve_precision("auto", device.type)
    where = {"device": name, "threads": arguments.threads, "precision auto means": automatic}
    print(json.dumps({**where, "commit": commit(), "rows": rows}, indent=2))


def step_seconds(
    name: str, preset_name: str, patch: tuple, filters: int, precision: str, repeats: int
) -> float:
    """Median seconds of an optimizer step."""
    cls, values = method_class(name), preset(name, preset_name)
    text = torch.nn.functional.normalize(torch.randn(2, 512), dim=1)
    settings = TrainSettings.model_validate(
        {**values["train"], "patch": patch, "steps": repeats + 2, "precision": precision}
    )
    method = cls(
        cls.Settings(**{**values["method"], "filters": filters}),
        Task(1, ("background", "organ"), settings.steps, text),
    )
    fabric = make_fabric(settings)
    labeled, unlabeled = cls.patches
    labels = torch.randint(2, (labeled, *patch))
    batch = Batch(torch.randn(labeled + unlabeled, 1, *patch), labels)
    times = [time.perf_counter()]

    def tick(*_: object) -> None:
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    train(start(method, settings, fabric), lambda step: batch, settings, fabric, tick)
    return statistics.median(np.diff(times)[2:])


def score_seconds() -> float:
    """Seconds to score a ball against a shifted ball."""
    grid = np.indices((194, 142, 88)) - np.array([97, 71, 44]).reshape(3, 1, 1, 1)
    ball = np.square(grid).sum(0) < 32**2
    began = time.perf_counter()
    score(ball, np.roll(ball, 3, axis=0), (0.625, 0.625, 0.625), 2.0)
    return round(time.perf_counter() - began, 4)


if __name__ == "__main__":
    main()
