"""Class names -> text vectors (K, E), and where they came from.

The vectors are the projected text embeddings of CLIP (Radford et al., "Learning Transferable Visual
Models From Natural Language Supervision", ICML 2021), frozen and not normalized. Nothing ever
stands in for them silently: two controls ask whether the words matter and have to be asked for by
name, and the origin travels with the vectors into checkpoints and reports.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import Field, field_validator

from vclipseg.errors import DataError, UsageError
from vclipseg.files import replacing
from vclipseg.networks import clip
from vclipseg.settings import Settings

SOURCES = ("clip", "orthogonal", "random")
TEMPLATES = {
    "default": "A pixel of a {item}.",  # what the authors' code uses
    "paper": "A pixel of {item}",  # what the paper prints
}
CONTROL_NORM = 10.0  # a choice: CLIP's text vectors are about this long


class TextSettings(Settings):
    """Which vectors stand for the classes, and how they are made."""

    source: str = "clip"
    """`clip`, a control (`orthogonal`, `random`), or a `.safetensors` file of vectors."""
    model: str = "openai/clip-vit-base-patch32"
    """A model of the CLIP family: its name on the Hugging Face hub, or a folder that holds it."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub; empty means its main branch."""
    template: str = "default"
    """The prompt around the class's words, with `{item}`; or `default`, or `paper`."""
    words: dict[str, str] = Field(default_factory=dict)
    """Words for a class name in the prompt; without: the name itself, underscores as spaces."""
    seed: int = 0
    """Seed of the controls."""
    dim: int = 512
    """Length E of the controls' vectors."""

    @field_validator("source", "model")
    @classmethod
    def _expanded(cls, path: str) -> str:
        return os.path.expanduser(path)

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if source not in SOURCES and not source.endswith(".safetensors"):
            raise ValueError(f"{source!r} is none of {', '.join(SOURCES)}, FILE.safetensors")
        return source

    @field_validator("template")
    @classmethod
    def _text_of_template(cls, template: str) -> str:
        text = TEMPLATES.get(template, template)
        if text.count("{item}") != 1:
            raise ValueError(f"{template!r} is neither {', '.join(TEMPLATES)} nor has one {{item}}")
        return text

    def prompts(self, class_names: Sequence[str]) -> list[str]:
        """The prompt of each class, in order.

        Raises:
            UsageError: words for a class that does not exist, or one prompt for two classes.
        """
        unknown = set(self.words) - set(class_names)
        if unknown:
            raise UsageError(
                f"text.words names {sorted(unknown)}, but the classes are {list(class_names)}"
            )
        words = [self.words.get(name, name.replace("_", " ")) for name in class_names]
        prompts = [self.template.replace("{item}", item) for item in words]
        if len(set(prompts)) < len(prompts):
            raise UsageError(f"two classes have the same prompt: {prompts}; give text.words")
        return prompts


@dataclass(frozen=True, eq=False)
class TextVectors:
    """One vector a class.

    Attributes:
        vectors: (K, E) float32, background first.
        origin: source, model, revision, prompts ...; what a report prints. JSON values only.
    """

    vectors: np.ndarray
    origin: dict[str, Any]

    @property
    def hash(self) -> str:
        """`sha256:...` of the numbers."""
        numbers = np.ascontiguousarray(self.vectors, dtype="<f4").tobytes()
        return "sha256:" + hashlib.sha256(numbers).hexdigest()

    @property
    def label(self) -> str:
        """The short name in tables: `clip`, `orthogonal`, `random` or `file:NAME`."""
        source = self.origin["source"]
        return f"file:{self.origin['file']}" if source == "file" else source

    def save(self, path: Path) -> None:
        """Write `path` (.safetensors), whole or not at all; the origin is its metadata."""
        metadata = {key: json.dumps(value) for key, value in self.origin.items()}
        content = safetensors.numpy.save({"vectors": self.vectors}, metadata)
        try:
            with replacing(path) as unfinished:
                unfinished.write_bytes(content)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot write text vectors ({error}); choose a folder that can be "
                "written (for cached ones: set VCLIPSEG_HOME)"
            ) from error

    @classmethod
    def load(cls, path: Path, class_names: Sequence[str]) -> TextVectors:
        """Read a file that a person hands over: tensor "vectors" (K, E), optional metadata.

        Raises:
            UsageError: there is no such file.
            DataError: it is not for these classes, or holds no usable vectors.
        """
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file; make one with `vclipseg prompts --out {path.name}`"
            )
        vectors, stored = _read(path)
        if len(vectors) != len(class_names):
            raise DataError(
                f"{path}: {len(vectors)} vectors for {len(class_names)} classes "
                f"{list(class_names)}; it needs one a class, background first"
            )
        names = stored.get("class_names", list(class_names))
        if names != list(class_names):
            raise DataError(
                f"{path}: made for the classes {names}, but the data has {list(class_names)}"
            )
        made_as = {"made_as": stored["source"]} if "source" in stored else {}
        origin = {**stored, **made_as, "source": "file", "file": path.name, "class_names": names}
        return _sealed(vectors, origin)


def text_vectors(
    settings: TextSettings, class_names: Sequence[str], cache_dir: Path | None = None
) -> TextVectors:
    """The vectors of the classes, from where the settings say.

    Args:
        settings: source, prompt and model.
        class_names: K names, background first.
        cache_dir: where CLIP's vectors are kept; None is `default_cache_dir()`.

    Raises:
        UsageError: CLIP cannot be loaded, a file is missing, or the words fit no class.
        DataError: a file of vectors does not fit the classes.
    """
    if settings.source == "clip":
        return _clip_vectors(settings, class_names, cache_dir or default_cache_dir())
    if settings.source in SOURCES:
        return _control(settings, class_names)
    return TextVectors.load(Path(settings.source), class_names)


def default_cache_dir() -> Path:
    """`text` in $VCLIPSEG_HOME, else in the user's cache folder for vclipseg."""
    home = os.environ.get("VCLIPSEG_HOME")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(home) if home else Path(caches) / "vclipseg") / "text"


def cosine_matrix(vectors: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows: (K, E) -> (K, K). CLIP's organs are nearly parallel (0.9)."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def _control(settings: TextSettings, class_names: Sequence[str]) -> TextVectors:
    """Vectors that know nothing of the words: a Gaussian's rows, as drawn or made orthogonal."""
    num_classes = len(class_names)
    vectors = np.random.default_rng(settings.seed).standard_normal((num_classes, settings.dim))
    if settings.source == "orthogonal":
        if num_classes > settings.dim:
            raise UsageError(
                f"text.dim={settings.dim} has no room for {num_classes} orthogonal vectors"
            )
        vectors = np.linalg.qr(vectors.T)[0].T  # (K, E), row k depends on the first k draws only
    vectors *= CONTROL_NORM / np.linalg.norm(vectors, axis=1, keepdims=True)
    origin = {
        "source": settings.source,
        "seed": settings.seed,
        "norm": CONTROL_NORM,
        "class_names": list(class_names),
    }
    return _sealed(vectors, origin)


def _clip_vectors(
    settings: TextSettings, class_names: Sequence[str], cache_dir: Path
) -> TextVectors:
    """CLIP's vectors, from the cache if a file there was made in exactly this way."""
    prompts = settings.prompts(class_names)
    wanted = {
        "source": "clip",
        "model": settings.model,
        "device": clip.DEVICE,
        "dtype": clip.DTYPE,
        "template": settings.template,
        "prompts": prompts,
        "class_names": list(class_names),
        "transformers": clip.transformers_version(),
    }
    key = hashlib.sha256(json.dumps([wanted, settings.revision]).encode()).hexdigest()[:16]
    path = cache_dir / f"{Path(settings.model).name}-{key}.safetensors"
    cached = _from_cache(path, wanted, clip.known_revision(settings.model, settings.revision))
    if cached:
        return cached
    vectors, revision = clip.encode(settings.model, settings.revision, prompts)
    fresh = _sealed(vectors, {**wanted, "revision": revision})
    fresh.save(path)
    return fresh


def _from_cache(path: Path, wanted: dict[str, Any], revision: str | None) -> TextVectors | None:
    """The cached vectors if their origin is as wanted and they are what was written, else None."""
    try:
        vectors, stored = _read(path)
    except (DataError, FileNotFoundError):
        return None
    found = TextVectors(vectors, stored)
    as_wanted = all(stored.get(key) == value for key, value in wanted.items())
    same_model = revision is None or stored.get("revision") == revision
    return found if as_wanted and same_model and stored.get("sha256") == found.hash else None


def _sealed(vectors: np.ndarray, origin: dict[str, Any]) -> TextVectors:
    """Vectors as float32 with their hash in the origin."""
    found = TextVectors(np.ascontiguousarray(vectors, dtype=np.float32), origin)
    return TextVectors(found.vectors, {**origin, "dim": vectors.shape[1], "sha256": found.hash})


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors (K, E) float32 and origin of a file.

    Raises:
        FileNotFoundError: there is none.
        DataError: it holds no tensor "vectors" (K, E) of finite numbers.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            vectors = file.get_tensor("vectors")
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: no tensor named vectors can be read ({error})") from error
    if vectors.ndim != 2 or not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise DataError(f"{path}: vectors {vectors.shape} must be (K, E), finite, no row all 0")
    return vectors.astype(np.float32), {key: _parsed(text) for key, text in metadata.items()}


def _parsed(text: str) -> Any:
    """A value of the metadata; files made by others may hold plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
