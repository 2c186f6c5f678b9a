"""From a scan to a mask on the scan's own grid.

A network knows tensors, a `Predictor` knows volumes: it prepares the scan as the training cases were,
runs the network over the whole volume or over windows, and puts the result back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from vclipseg.checkpoint import load_model
from vclipseg.data.preprocess import Plan, Trace, prepare_image, restore, restore_mask
from vclipseg.data.volume import Volume
from vclipseg.device import autocast, available_memory, default_device, is_out_of_memory
from vclipseg.errors import DataError, OutOfMemory, UsageError
from vclipseg.heap import keep_freed_memory
from vclipseg.methods import method_class
from vclipseg.methods.base import Method, Task
from vclipseg.networks.folding import fold_batchnorm
from vclipseg.settings import Settings
from vclipseg.windows import fitted, slabs, whole_bytes

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]


class PredictSettings(Settings):
    """How a volume is covered."""

    mode: Literal["window", "auto", "whole"] = "window"
    """Windows of the training patch, as the network was trained; or, faster and less accurate on small
    patches, the whole volume at once: "auto" does so where memory allows."""
    window: Size | None = None
    """Size of a window in prepared voxels; the training patch when left out."""
    stride: Size | None = None
    """Steps between windows; half a window when left out. The literature: 18, 18, 4 on LA."""
    blend: Literal["gaussian", "uniform"] = "gaussian"
    """Weight of a window's voxels in the average; "uniform" as in the literature."""
    batch: Annotated[int, Field(gt=0)] = 2
    """Windows run at once. On a CPU more take longer each: their maps leave the caches."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """As in training."""


HEAP = 2 * 2**30
"""Bytes that a predicting process keeps on a CPU: those of windows. Volumes are given back."""


class Predictor:
    """A trained model: `Volume` in, `Volume` out.

    Attributes:
        class_names: Index 0 is the background.
        description: All that the model file says of itself: method, settings, plan, text vectors.
    """

    def __init__(
        self, method: Method, description: dict[str, Any], settings: PredictSettings | None = None
    ) -> None:
        self.description = description
        self.class_names: tuple[str, ...] = tuple(description["class_names"])
        self.label_values: tuple[int, ...] = tuple(description["label_values"])
        self.plan = Plan.model_validate(description["plan"])
        self.settings = settings or PredictSettings.model_validate(description["predict"])
        self.window = self.settings.window or tuple(description["patch"])
        self.device = default_device()
        if self.device.type == "cpu":
            keep_freed_memory(HEAP)
        self.method = method.eval().to(
            device=self.device,
            memory_format=torch.channels_last_3d,  # type: ignore[call-overload]
        )

    def predict(self, volume: Volume) -> Volume:
        """Class indices (X, Y, Z) uint8 of an image (C, X, Y, Z), on the image's own grid.

        Where nothing was resampled, the probabilities of a large volume are never held as a whole.
        """
        image, trace = self._prepare(volume)
        if trace.prepared_shape != trace.cropped_shape:
            return restore_mask(self.prepared(image).numpy(), trace)
        with torch.inference_mode():
            labels = [probs.max(0).indices.to(torch.uint8) for probs in self._parts(image)]
        return Volume(trace.undo(torch.cat(labels).cpu().numpy()), volume.affine)

    def probabilities(self, volume: Volume) -> Volume:
        """Class probabilities (K, X, Y, Z) float32 on the image's own grid."""
        probs, trace = self.prepared_probs(volume)
        return Volume(restore(probs, trace), volume.affine)

    def prepared_probs(self, volume: Volume) -> tuple[np.ndarray, Trace]:
        """Probabilities (K, x, y, z) of an image (C, X, Y, Z) prepared, and how it was prepared."""
        image, trace = self._prepare(volume)
        return self.prepared(image).numpy(), trace

    def _prepare(self, volume: Volume) -> tuple[Tensor, Trace]:
        channels = len(self.description["channel_names"])
        if volume.array.ndim != 4 or len(volume.array) != channels:
            raise UsageError(
                f"this model reads images of {channels} channel(s) "
                f"({', '.join(self.description['channel_names'])}), array (C, X, Y, Z); "
                f"got an array of shape {volume.array.shape}"
            )
        prepared, trace = prepare_image(volume, self.plan)
        return torch.from_numpy(np.ascontiguousarray(prepared.array, dtype=np.float32)), trace

    @torch.inference_mode()
    def prepared(self, image: Tensor) -> Tensor:
        """Probabilities (K, x, y, z) of a prepared image (C, x, y, z)."""
        return torch.cat([part.cpu() for part in self._parts(image)], 1)

    def _parts(self, image: Tensor) -> Iterator[Tensor]:
        """Probabilities (K, n, y, z) on the device: the whole volume at once, or slab by slab."""
        if self._whole(image):
            try:
                yield self._run(image[None])[0]
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        yield from self._slabs(image)

    def _whole(self, image: Tensor) -> bool:
        if self.settings.mode != "auto":
            return self.settings.mode == "whole"
        filters = self.description["method"].get("filters", 16)
        return whole_bytes(image.shape[1:], filters) < 0.5 * available_memory(self.device)

    def _run(self, images: Tensor) -> Tensor:
        images = images.to(self.device, memory_format=torch.channels_last_3d)
        with autocast(self.device, self.settings.precision):
            return self.method.predict(images).float()

    def _slabs(self, image: Tensor) -> Iterator[Tensor]:
        """Probabilities (K, n, y, z) of one slab of x after the other, from windows."""
        window, stride = fitted(image.shape[1:], self.window, self.settings.stride)
        how = (window, stride, self.settings.blend, self.settings.batch)

        def run(windows: np.ndarray) -> np.ndarray:
            return self._run(torch.from_numpy(windows)).numpy()

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        try:
            if self.device.type == "cpu":
                found = slabs(image.numpy(), run, *how)
            else:
                found = slabs(image.to(self.device), self._run, *how, put, torch.stack)
            for probs in found:
                yield torch.as_tensor(probs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"not enough memory for a window of {self.window}; "
                    "set predict.window smaller, or predict.batch to 1"
                ) from error
            raise


def load(run: str | Path, settings: PredictSettings | None = None) -> Predictor:
    """The model of a run folder or of a model file.

    Raises:
        UsageError: the run has no finished model.
        DataError: the file is damaged.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoints" / "model.safetensors"
        if not path.is_file():
            raise UsageError(
                f"{run}: no finished model in this folder; if its training was stopped, go on with "
                f"`vclipseg train --resume {run}`"
            )
    weights, description = load_model(path)
    try:
        method = build_method(description, weights.get("text"))
    except ValidationError as error:
        raise DataError(
            f"{path}: made by vclipseg {description.get('vclipseg')}, whose settings this version "
            f"does not know ({error.errors()[0]['loc'][0]}); predict with the version that made it"
        ) from error
    missing, unknown = method.load_state_dict(weights, strict=False)
    if unknown or any(not name.startswith(method.training_only) for name in missing):
        raise DataError(f"{path}: its weights do not fit its description; copy or train it again")
    return Predictor(fold_batchnorm(method.eval()), description, settings)


def build_method(description: dict[str, Any], text_vectors: Tensor | None) -> Method:
    """The method that a model file describes, its weights still those of chance.

    Raises:
        ValidationError: this version does not know its settings.
    """
    cls = method_class(description["method"]["name"])
    task = Task(
        in_channels=len(description["channel_names"]),
        class_names=tuple(description["class_names"]),
        total_steps=description["steps"],
        text_vectors=text_vectors,
    )
    return cls(cls.Settings.model_validate(description["method"]), task)
