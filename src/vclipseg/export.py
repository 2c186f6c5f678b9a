"""A trained model as one .onnx file: network, preprocessing and provenance together.

`vclipseg.lite` runs it without torch. What the file says of itself stands in its `metadata_props`.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vclipseg import __version__
from vclipseg.environment import commit
from vclipseg.errors import DataError, UsageError
from vclipseg.files import replacing
from vclipseg.inference import Predictor
from vclipseg.lite import KEYS, VERSION
from vclipseg.methods.base import Method
from vclipseg.networks.vnet import STRIDE
from vclipseg.runs import Run

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra `export`
UNSTATED = "not stated"
TOLERANCE = 1e-4
"""Largest difference to torch, in probability, that an export may have."""


def export_onnx(
    predictor: Predictor,
    run: Path,
    path: Path,
    *,
    licence: str = UNSTATED,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as one .onnx file, and compare what it predicts with torch.

    Args:
        predictor: the model, and how it predicts.
        run: the run folder or model file that it was loaded from.
        path: of the new file.
        licence: of the model, as a name or a sentence.
        overwrite: whether a file that is there is replaced.

    Returns:
        What the file says of itself.

    Raises:
        UsageError: there is such a file, or the packages of the extra `export` are missing.
        DataError: the file predicts something else than the model; none is left then.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists already; give --overwrite, or another name")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f'{", ".join(missing)}: not installed; pip install "vclipseg[export]"')
    described = describe(predictor, run, licence)
    network = plain(predictor.method)
    program = onnx_program(network, len(described["channel_names"]))
    for key, value in described.items():
        program.model.metadata_props[f"vclipseg.{key}"] = json.dumps(value)
    with replacing(path) as unfinished:
        program.save(unfinished, external_data=False)
        require_equal(network, unfinished, len(described["channel_names"]))
    return described


def describe(predictor: Predictor, run: Path, licence: str) -> dict[str, Any]:
    """What an exported model says of itself, by `vclipseg.lite.KEYS`; holds no path of this machine."""
    d = predictor.description
    values = {
        "version": VERSION,
        "name": d["name"],
        "class_names": d["class_names"],
        "label_values": d["label_values"],
        "channel_names": d["channel_names"],
        "plan": d["plan"],
        "predict": predictor.settings.model_dump(mode="json"),
        "window": list(predictor.window),
        "filters": d["method"].get("filters", 16),
        "multiple": STRIDE,
        "text": without_folders(d["text"]),
        "licence": {"model": licence, **text_licence(d["text"])},
        "provenance": provenance(d, run),
    }
    return {key: values[key] for key in KEYS}


def text_licence(text: dict[str, Any] | None) -> dict[str, str]:
    """Under what licence the text vectors in the model are."""
    if not text or "clip" not in (text.get("source"), text.get("made_as")):
        return {}
    model = Path(str(text.get("model", "CLIP"))).name
    terms = "MIT" if str(text.get("model", "")).startswith("openai/clip-") else "see that model"
    return {"text_vectors": f"text vectors of CLIP ({model}): {terms}"}


def provenance(description: dict[str, Any], run: Path) -> dict[str, Any]:
    """The run's identity, settings, data, versions and commits."""
    settings = {key: description[key] for key in ("method", "preset", "steps", "patch", "weights")}
    trained_at = None
    if (run / "experiment.json").is_file():
        opened = Run.open(run)
        settings = opened.description["settings"]
        trained_at = opened.environment.get("commit")
    return {
        "settings_hash": description["settings_hash"],
        "data": {key: description["data"].get(key) for key in ("name", "layout", "hash")},
        "settings": without_folders(without_cases(settings)),
        "trained_with": {"vclipseg": description["vclipseg"], "commit": trained_at},
        "exported_with": {
            "vclipseg": __version__,
            "commit": commit(),
            "torch": torch.__version__.partition("+")[0],
        },
    }


def without_folders(value: Any) -> Any:
    """JSON in which a path is a file's or folder's name alone: where it lies is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_folders(v) for v in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Of this system or another; a model of a hub (`OWNER/NAME`) is none, nor is a prompt with a slash."""
    path = PureWindowsPath(text)  # both kinds of slash
    absolute = PurePosixPath(text).is_absolute() or path.is_absolute()
    return absolute or text.startswith("~") or ".." in path.parts or path.suffix == ".safetensors"


def without_cases(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which labeled cases are a number, not names: these may be a patient's."""
    data = settings.get("data", {})
    if not isinstance(data.get("labeled"), list):
        return settings
    return {**settings, "data": {**data, "labeled": len(data["labeled"])}}


class Probabilities(nn.Module):
    """`Method.predict` as the forward pass of a network that holds nothing else."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = without_training(method)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        return self.method.predict(images)


def without_training(method: Method) -> Method:
    """The method without the parts that only training needs; it cannot be trained any more."""
    for name, module in list(method.named_modules()):
        for own in (module._modules, module._parameters, module._buffers):
            for key in list(own):
                whole = f"{name}.{key}" if name else key
                if f"{whole}.".startswith(method.training_only):
                    del own[key]
    return method


def plain(method: Method) -> Probabilities:
    """A copy on the CPU, in torch's own layout and layers: ours choose by size, a graph cannot."""
    copied = copy.deepcopy(method).eval().cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d) and type(child) is not nn.Conv3d:
                setattr(module, name, _plain_convolution(child))
    return Probabilities(copied.requires_grad_(False)).eval()


def _plain_convolution(layer: nn.Conv3d) -> nn.Conv3d:
    with torch.device("meta"):
        new = nn.Conv3d(layer.in_channels, layer.out_channels, layer.kernel_size)  # type: ignore[arg-type]
    new.stride, new.padding = layer.stride, layer.padding
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def onnx_program(network: Probabilities, channels: int) -> Any:
    """The network as an ONNX program: any batch, and axes that are multiples of 16."""
    dim = torch.export.Dim
    axes = {0: dim("batch"), **{i: STRIDE * dim(n) for i, n in ((2, "x"), (3, "y"), (4, "z"))}}
    example = torch.zeros(2, channels, 2 * STRIDE, 3 * STRIDE, 4 * STRIDE)
    with _quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["probs"],
            dynamic_shapes={"images": axes},
            custom_translation_table={torch.ops.aten.softmax.int: _softmax},
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine among them
    return program


def _softmax(values: Any, dim: int, dtype: int = -1) -> Any:
    """Softmax step by step: onnxruntime's own is slow along the channels of a volume."""
    import onnxscript

    op: Any = onnxscript.opset20
    axis = op.Constant(value_ints=[dim])
    powers = op.Exp(op.Sub(values, op.ReduceMax(values, axis, keepdims=1)))
    return op.Div(powers, op.ReduceSum(powers, axis, keepdims=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that nobody needs."""
    remarks = logging.getLogger("torch.onnx")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)


def require_equal(network: Probabilities, path: Path, channels: int) -> None:
    """Compare file and network on noise of a size that the export has not seen.

    Raises:
        DataError: they differ by more than `TOLERANCE`.
    """
    import onnxruntime

    images = torch.randn(1, channels, 3 * STRIDE, STRIDE, 2 * STRIDE)
    with torch.inference_mode():
        expected = network(images).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["probs"], {"images": images.numpy()})
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise DataError(f"{path.name}: probabilities differ from torch's by {difference:.1e}")
