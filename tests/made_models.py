"""Model files made without training, for the tests of export and of what runs exported models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from toy import NAMES, build
from vclipseg.checkpoint import save_model
from vclipseg.data.plan import Plan
from vclipseg.inference import Predictor
from vclipseg.lite import KEYS, VERSION
from vclipseg.methods.base import Method, MethodSettings, Task


def describe(num_classes: int = 2, channels: int = 1, **changes: Any) -> dict[str, Any]:
    """What a model file says of itself."""
    plan = Plan(spacing=(1.0, 1.0, 1.0), intensity=("zscore",) * channels)
    return {
        "name": "toy",
        "class_names": list(NAMES[:num_classes]),
        "label_values": [0, 7, 300, 2][:num_classes],
        "channel_names": [f"MR{c}" for c in range(channels)],
        "plan": plan.model_dump(mode="json"),
        "predict": {"precision": "fp32"},
        "patch": [16, 16, 16],
        "steps": 9,
        "text": {"source": "orthogonal", "dim": 8, "sha256": "sha256:0"},
        "data": {"root": "/home/somebody/scans", "name": "toy", "layout": "plain", "hash": "h"},
        "preset": "robust",
        "weights": "last",
        "settings_hash": "0123456789ab",
        "vclipseg": "0.1.0",
        **changes,
    }


def randomized(method: Method) -> Method:
    """In evaluation, with running statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    for module in method.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return method.eval()


def saved_model(
    path: Path,
    name: str = "vclipseg",
    preset: str = "robust",
    *,
    num_classes: int = 2,
    channels: int = 1,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A model file as a run leaves it: without what only training needs."""
    method = build(
        name, preset, num_classes=num_classes, channels=channels, filters=2, steps=9, **settings
    )
    description = describe(num_classes, channels, **(changes or {}))
    description["method"] = {"name": name, **method.settings.model_dump(mode="json")}
    kept = {
        key: value
        for key, value in randomized(method).state_dict().items()
        if not key.startswith(method.training_only)
    }
    save_model(path, kept, description)
    return path


# A network of one step, in torch and as an .onnx file


class Soft(Method):
    """Class 1 where the channels' mean is above 0, softly; every voxel by itself, near a window's
    border less sure."""

    def __init__(self) -> None:
        super().__init__(MethodSettings(), Task(1, NAMES[:2], 1))

    def loss(self, batch, step):
        raise NotImplementedError

    def predict(self, images):
        foreground = images.mean(1, keepdim=True).sigmoid()
        return torch.cat([1 - foreground, foreground], 1)


def soft_predictor(**changes: Any) -> Predictor:
    """`Soft` in torch."""
    description = describe(**changes)
    return Predictor(Soft(), {**description, "method": {"name": "soft", "filters": 16}})


def soft_onnx(path: Path, predictor: Predictor, multiple: int = 4) -> Path:
    """`Soft` as an exported file that says the same of itself."""
    shape = ["batch", len(predictor.description["channel_names"]), "x", "y", "z"]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
            helper.make_node("Sigmoid", ["mean"], ["foreground"]),
            helper.make_node("Sub", ["one", "foreground"], ["background"]),
            helper.make_node("Concat", ["background", "foreground"], ["probs"], axis=1),
        ],
        "soft",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(np.array([1], np.int64), "axes"),
            onnx.numpy_helper.from_array(np.array(1, np.float32), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    values = {
        **predictor.description,
        "version": VERSION,
        "predict": predictor.settings.model_dump(mode="json"),
        "window": list(predictor.window),
        "filters": 16,
        "multiple": multiple,
        "licence": {},
        "provenance": {},
    }
    props = {f"vclipseg.{key}": json.dumps(values[key]) for key in KEYS}
    helper.set_model_props(model, props)
    onnx.save(model, path)
    return path
