"""Time an exported model against eager torch, float32, on one window of the paper's size.

    python benchmarks/export_speed.py --threads 2
    python benchmarks/export_speed.py --method supervised --window 64 64 48 --filters 8

Prints JSON. The two take turns in one process, so that what else the machine does falls on both; the
figures are medians and minima. torch runs the method as it is, in its usual (contiguous) layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from vclipseg.environment import commit, cpu_name
from vclipseg.export import onnx_program, plain
from vclipseg.methods import method_class, preset
from vclipseg.methods.base import Method, Task


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
    torch_s, onnx_s = seconds(method, images, arguments.threads, arguments.repeats)
    rows = {
        name: {"median": round(statistics.median(s), 4), "min": round(min(s), 4)}
        for name, s in (("torch", torch_s), ("onnx", onnx_s))
    }
    ratio = statistics.median(torch_s) / statistics.median(onnx_s)
    print(
        json.dumps(
            {
                **vars(arguments),
                "seconds": rows,
                "times as fast": round(ratio, 2),
                "device": cpu_name(),
                "commit": commit(),
            },
            indent=2,
        )
    )


def make_method(name: str, preset_name: str, filters: int) -> Method:
    """A method of two classes with weights of chance, in evaluation."""
    cls, values = method_class(name), preset(name, preset_name)
    settings = cls.Settings(**{**values["method"], "filters": filters})
    text = torch.nn.functional.normalize(torch.randn(2, 512), dim=1)
    return cls(settings, Task(1, ("background", "organ"), 100, text)).eval()


def seconds(
    method: Method, images: torch.Tensor, threads: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each run of torch and of the exported model, in turn; the first is left out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_program(plain(method), images.shape[1]).save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    took: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for times, run in zip(
                took,
                (lambda: method.predict(images), lambda: session.run(["probs"], inputs)),
                strict=True,
            ):
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
    return took[0][1:], took[1][1:]


if __name__ == "__main__":
    main()
