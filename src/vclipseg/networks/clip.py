"""CLIP's text tower: prompts -> projected vectors (K, E), not normalized.

Loaded with transformers (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", ICML 2021) from a folder, the Hugging Face cache or the hub; imported on use.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vclipseg.errors import UsageError

HUB_TIMEOUT_S = 5.0
DEVICE, DTYPE = "cpu", "float32"  # half precision on a GPU would give other numbers


def encode(
    model: str, revision: str | None, prompts: Sequence[str]
) -> tuple[np.ndarray, str | None]:
    """Run the text tower on the CPU.

    Args:
        model: name on the hub, or a folder.
        revision: branch, tag or commit on the hub; None is the main branch.
        prompts: K texts.

    Returns:
        Vectors (K, E) float32, and the revision they were made with (see `known_revision`).

    Raises:
        UsageError: the model cannot be had (the text names the ways out) or a prompt is too long.
    """
    try:
        with _quiet():
            tokenizer, tower = _load(model, revision)
    except Exception as error:  # whatever it is, the ways out are the same
        raise UsageError(_ways_out(model, error)) from error
    import torch

    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt")
    longest, limit = tokens["input_ids"].shape[1], tower.config.max_position_embeddings
    if longest > limit:
        raise UsageError(f"a prompt has {longest} tokens, {model} reads {limit}: {list(prompts)}")
    with torch.inference_mode():
        vectors = tower(**tokens).text_embeds.numpy()  # (K, E)
    return vectors, known_revision(model, revision)


def known_revision(model: str, revision: str | None) -> str | None:
    """What the model is right now: a folder's content hash, or the commit in the hub's cache.

    None where neither is on this machine.
    """
    if Path(model).is_dir():
        return _content_hash(Path(model))
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except (ImportError, ValueError):  # not installed, or no valid name: loading will say so
        return None
    return Path(config).parent.name if isinstance(config, str) else None  # snapshots/<commit>/


def transformers_version() -> str | None:
    """Read without importing transformers, which takes seconds."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(model: str, revision: str | None) -> tuple[Any, Any]:
    """Tokenizer and text tower; from a folder or the hub's cache, else from the hub.

    The hub is asked once with a short timeout before transformers may load from it, because
    transformers itself would retry for most of a minute where there is no network.
    """
    try:
        return _from_pretrained(model, revision, local=True)
    except OSError:
        if Path(model).is_dir():
            raise
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S)
        except Exception as error:
            why = str(error).split("\n")[0]
            raise OSError(f"not on this machine, and not to be had from the hub ({why})") from error
        return _from_pretrained(model, revision, local=False)


def _from_pretrained(model: str, revision: str | None, *, local: bool) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    where: dict[str, Any] = {"revision": revision or "main", "local_files_only": local}
    loaded: Any = CLIPTextModelWithProjection.from_pretrained(
        model, dtype=torch.float32, output_loading_info=True, **where
    )
    tower, info = loaded
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"it is no CLIP text model, {min(info['missing_keys'])} is not in it")
    return AutoTokenizer.from_pretrained(model, **where), tower.eval()


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".txt", ".safetensors", ".bin"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def _ways_out(model: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"""CLIP's text model {model!r} cannot be loaded: {reason}
Ways out:
- Load it once on a machine with internet and copy that machine's Hugging Face cache
  (~/.cache/huggingface/hub) here, or copy the model's folder: --set text.model=FOLDER
- Make the vectors on another machine with `vclipseg prompts --out file.safetensors`
  and use that file here: --text file.safetensors
- Run the control that knows nothing of the words: --text orthogonal"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of transformers and the hub, and no bars without a terminal: errors raise."""
    from transformers.utils import logging as bars

    before, showing = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if showing:
            bars.enable_progress_bar()
