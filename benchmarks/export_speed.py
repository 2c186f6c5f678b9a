"""Time an exported model against eager torch, float32, on one window of the paper's size.

    python benchmarks/export_speed.py --threads 2
    python benchmarks/export_speed.py --method supervised --window 64 64 48 --filters 8

Prints JSON. All take turns in one process, so that what else the machine does falls on both; the
figures are medians and minima. torch runs the method as it is, in its usual (contiguous) layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vclipseg.engines import ENGINES, open_network
from vclipseg.environment import commit, cpu_name
from vclipseg.export import onnx_program, plain
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Method, Task

Run = Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", default="vclipseg")
    parser.add_argument("--preset", default="robust")
    parser.add_argument("--window", type=int, nargs=3, default=(112, 112, 80))
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    method = make_method(arguments.method, arguments.preset, arguments.filters)
    images = torch.randn(1, 1, *arguments.window)
    took = seconds(runs_of(method, images, arguments.threads), arguments.repeats)
    medians = {name: statistics.median(s) for name, s in took.items()}
    found = {
        name: {
            "median s": round(medians[name], 4),
            "min s": round(min(s), 4),
            "times as fast as torch": round(medians["torch"] / medians[name], 2),
        }
        for name, s in took.items()
    }
    print(
        json.dumps({**vars(arguments), **found, "device": cpu_name(), "commit": commit()}, indent=2)
    )


def make_method(name: str, preset_name: str, filters: int) -> Method:
    """A method of two classes with weights of chance, in evaluation."""
    cls, values = method_class(name), preset(name, preset_name)
    settings = cls.Settings(**{**values["method"], "filters": filters})
    text = torch.nn.functional.normalize(torch.randn(2, 512), dim=1)
    return cls(settings, Task(1, ("background", "organ"), 100, text)).eval()


def runs_of(method: Method, images: torch.Tensor, threads: int) -> dict[str, Run]:
    """How torch and each engine predict the images (B, C, x, y, z)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_program(plain(method), images.shape[1]).save(path, external_data=False)
        engines = {name: open_network(path, threads, name)[1] for name in ENGINES if name != "auto"}
    array = images.numpy()
    return {
        "torch": lambda: method.predict(images).numpy(),
        **{name: partial(network, array) for name, network in engines.items()},
    }


@torch.inference_mode()
def seconds(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` rounds, all in turn; a round before them is left out."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in took.items()}


if __name__ == "__main__":
    main()
