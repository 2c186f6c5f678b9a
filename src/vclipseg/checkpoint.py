"""Checkpoints: atomic, versioned, and loaded without running anybody's pickled code.

The format of models is imported where one is read or written: training needs torch alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vclipseg.errors import DataError, UsageError
from vclipseg.files import replacing

VERSION = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write all that a run needs to go on (a `TrainState.state_dict()`)."""
    with replacing(path) as unfinished:
        torch.save({"version": VERSION, **state}, unfinished)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        DataError: the file is damaged or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{path}: not a readable checkpoint ({error}); start the run anew"
        ) from error
    if not isinstance(state, dict) or state.pop("version", None) != VERSION:
        raise DataError(
            f"{path}: checkpoint of another version; train with the version that wrote it"
        )
    return state


def save_model(path: Path, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write weights and, in the same file, the JSON that says how to use them."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {
        "format": "vclipseg",
        "version": str(VERSION),
        "description": json.dumps(description),
    }
    with replacing(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata))


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_model` wrote: weights and description.

    Raises:
        UsageError: there is no such file.
        DataError: it is damaged or not a model of this project.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such model")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable model ({error})") from error
    if metadata.get("format") != "vclipseg" or metadata.get("version") != str(VERSION):
        raise DataError(f"{path}: not a model of this version of vclipseg")
    try:
        return weights, json.loads(metadata["description"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: does not say what model it is ({error})") from error
