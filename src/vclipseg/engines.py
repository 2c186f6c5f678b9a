"""What runs an exported network on the CPU: ONNX Runtime, or OpenVINO where it is installed; no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.errors import DataError, UsageError

ENGINES = ("auto", "onnxruntime", "openvino")
Network = Callable[[np.ndarray], np.ndarray]
"""Images (B, C, x, y, z) float32 to probabilities (B, K, x, y, z); axes as the file wants them."""


def open_network(path: Path, threads: int, engine: str) -> tuple[dict[str, str], Network]:
    """The metadata of an .onnx file, and its network.

    Args:
        path: of the file.
        threads: of the CPU; 0: as many as cores.
        engine: one of `ENGINES`; "auto" is OpenVINO where it is installed, which takes about half as long.

    Raises:
        UsageError: there is no such file or engine, or the engine is not installed.
        DataError: the file cannot be read.
    """
    if engine not in ENGINES:
        raise UsageError(f"{engine}: no such engine; there are {', '.join(ENGINES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    session = _session(path, threads)
    metadata = session.get_modelmeta().custom_metadata_map
    if engine != "onnxruntime":
        try:
            return metadata, _openvino(path, threads)
        except UsageError:
            if engine == "openvino":
                raise
    return metadata, lambda images: session.run(["probs"], {"images": images})[0]


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is needed ({error}): pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"{path}: not a readable ONNX model ({error}); export it again") from error


def _openvino(path: Path, threads: int) -> Network:
    try:
        import openvino
    except ImportError as error:
        raise UsageError(
            f"OpenVINO cannot be had ({error}): pip install openvino, or --engine onnxruntime"
        ) from error
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = openvino.Core().compile_model(path, "CPU", hints)
    return lambda images: network({"images": images})["probs"]
