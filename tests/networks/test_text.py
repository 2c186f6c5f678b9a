"""Text vectors: the real CLIP loading code on a tiny CLIP made here, the cache, files, controls."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pydantic
import pytest
import safetensors.numpy
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from vclipseg.errors import DataError, UsageError
from vclipseg.networks import clip
from vclipseg.networks.text import (
    CONTROL_NORM,
    TextSettings,
    TextVectors,
    cosine_matrix,
    default_cache_dir,
    text_vectors,
)

NAMES = ["background", "left atrium"]
LETTERS = "abcdefghijklmnopqrstuvwxyz."
EDIM = 12
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _tokenizer(folder: Path) -> int:
    """A CLIP tokenizer of single letters; returns the size of its vocabulary."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(vocabulary), str(folder / "merges.txt")).save_pretrained(folder)
    return len(tokens)


def _text_config(vocab_size: int) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": EDIM,
        "max_position_embeddings": 48,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def _save_clip(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = CLIPTextConfig(**_text_config(_tokenizer(folder)))
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models the text tower was run for, so that a test sees whether the cache was used."""
    models: list[str] = []
    encode = clip.encode
    monkeypatch.setattr(clip, "encode", lambda *args: models.append(args[0]) or encode(*args))
    return models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that cannot be reached."""
    from huggingface_hub import HfApi, constants

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    return cache


# Prompts


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["A pixel of a background.", "A pixel of a left atrium."]),
        ({"template": "paper"}, ["A pixel of background", "A pixel of left atrium"]),
        (
            {"template": "an MRI of the {item}"},
            ["an MRI of the background", "an MRI of the left atrium"],
        ),
        (
            {"words": {"background": "Background", "left atrium": "Left Atrial"}},
            ["A pixel of a Background.", "A pixel of a Left Atrial."],
        ),
    ],
)
def test_prompts(settings: dict, expected: list[str]) -> None:
    assert TextSettings(**settings).prompts(NAMES) == expected


def test_underscores_are_spaces() -> None:
    assert TextSettings(template="{item}").prompts(["left_atrium"]) == ["left atrium"]


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "bert"},
        {"source": "vectors.npz"},
        {"template": "A pixel"},
        {"template": "{item} {item}"},
        {"model_name": "x"},
    ],
)
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        TextSettings(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"liver": "Liver"}, "liver"), ({"background": "left atrium"}, "same prompt")],
)
def test_words_must_fit_the_classes(words: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TextSettings(words=words).prompts(NAMES)


# CLIP


def test_clip_vectors_are_the_projected_text_embeddings(tiny_clip: Path, tmp_path: Path) -> None:
    found = text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)

    model = CLIPTextModelWithProjection.from_pretrained(tiny_clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip)
    for vector, name in zip(found.vectors, NAMES, strict=True):  # one by one: padding is harmless
        tokens = tokenizer([f"A pixel of a {name}."], return_tensors="pt")
        expected = model(**tokens).text_embeds[0].detach().numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert found.vectors.shape == (2, EDIM)
    assert found.vectors.dtype == np.float32
    assert not np.allclose(found.vectors[0], found.vectors[1], atol=1e-3)
    assert found.label == "clip"


def test_origin_says_where_they_came_from(tiny_clip: Path, tmp_path: Path) -> None:
    found = text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)
    assert found.origin["model"] == str(tiny_clip)
    assert found.origin["revision"].startswith("sha256:")
    assert found.origin["prompts"] == ["A pixel of a background.", "A pixel of a left atrium."]
    assert found.origin["class_names"] == NAMES
    assert (found.origin["device"], found.origin["dtype"]) == ("cpu", "float32")
    assert found.origin["sha256"] == found.hash
    assert json.loads(json.dumps(found.origin)) == found.origin


def test_whole_clip_model_gives_its_text_tower(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    text = CLIPTextConfig(**_text_config(_tokenizer(folder)))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
    )
    whole = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EDIM)
    )
    whole.save_pretrained(folder)
    found = text_vectors(TextSettings(model=str(folder)), NAMES, tmp_path / "cache")

    tokens = CLIPTokenizer.from_pretrained(folder)(
        TextSettings().prompts(NAMES), padding=True, return_tensors="pt"
    )
    hidden = whole.eval().text_model(**tokens).pooler_output
    expected = whole.text_projection(hidden).detach().numpy()
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)


def test_half_precision_weights_give_float32(tmp_path: Path) -> None:
    folder = _save_clip(tmp_path / "half")
    CLIPTextModelWithProjection.from_pretrained(folder).half().save_pretrained(folder)
    found = text_vectors(TextSettings(model=str(folder)), NAMES, tmp_path / "cache")
    assert found.vectors.dtype == np.float32
    assert not np.array_equal(found.vectors, found.vectors.astype(np.float16))


def test_model_without_text_projection_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "broken")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="no CLIP text model, text_projection"):
        text_vectors(TextSettings(model=str(folder)), NAMES, tmp_path)


def test_too_long_a_prompt_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    settings = TextSettings(model=str(tiny_clip), template="long " * 20 + "{item}")
    with pytest.raises(UsageError, match="reads 48"):
        text_vectors(settings, NAMES, tmp_path)


def test_loading_says_nothing(
    tiny_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0


# The hub


def test_without_hub_the_ways_out_are_named_at_once(hub: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(UsageError) as error:
        text_vectors(TextSettings(), NAMES, tmp_path / "cache")
    assert time.perf_counter() - start < 5
    for words in (
        "openai/clip-vit-base-patch32",
        "Name or service not known",
        "--set text.model=FOLDER",
        "vclipseg prompts --out",
        "--text file.safetensors",
        "--text orthogonal",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_hub_is_not_asked_for_what_its_cache_has(
    tiny_clip: Path, hub: Path, tmp_path: Path
) -> None:
    model = hub / "models--someone--clip"
    shutil.copytree(tiny_clip, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    found = text_vectors(TextSettings(model="someone/clip"), NAMES, tmp_path / "cache")
    assert found.origin["revision"] == COMMIT
    shutil.rmtree(hub)  # the vectors alone are enough from now on
    again = text_vectors(TextSettings(model="someone/clip"), NAMES, tmp_path / "cache")
    assert again.origin == found.origin


class _Hub(SimpleHTTPRequestHandler):
    """As much of the hub as a download needs: one model in one commit, served from a folder."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.folder / self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/someone/clip") and "/tree/" not in self.path:
            siblings = [{"rfilename": path.name} for path in self.folder.iterdir()]
            content = json.dumps(
                {"id": "someone/clip", "sha": COMMIT, "siblings": siblings}
            ).encode()
        elif file.is_file():
            content = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.slow
def test_download_from_the_hub(tiny_clip: Path, tmp_path: Path) -> None:
    """The whole way over HTTP, in a process of its own: the hub's address is read on import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": tiny_clip}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from pathlib import Path\n"
        "from vclipseg.networks.text import TextSettings, text_vectors\n"
        f"found = text_vectors(TextSettings(model='someone/clip'), {NAMES}, Path(sys.argv[1]))\n"
        "print(found.hash, found.origin['revision'])"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",  # this hub is on this machine
        "TRANSFORMERS_OFFLINE": "0",
    }
    local = text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path / "local")
    for cache in ("first", "second"):  # the second run is offline: the hub's cache is enough
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / cache)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.stdout.split() == [local.hash, COMMIT], run.stderr
        assert run.stderr == ""
        server.shutdown()
        server.server_close()


def test_missing_folder_is_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere/at/all"):
        text_vectors(TextSettings(model="/nowhere/at/all"), NAMES, tmp_path)


def test_missing_transformers_is_named(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(UsageError, match=r"transformers(.|\n)*--text orthogonal"):
        text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)


# The cache


def test_second_call_reads_the_cache(tiny_clip: Path, tmp_path: Path, loads: list[str]) -> None:
    settings = TextSettings(model=str(tiny_clip))
    first = text_vectors(settings, NAMES, tmp_path)
    second = text_vectors(settings, NAMES, tmp_path)
    assert len(loads) == 1
    assert first.origin == second.origin
    np.testing.assert_array_equal(first.vectors, second.vectors)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"template": "paper"}, NAMES),
        ({"words": {"background": "rest"}}, NAMES),
        ({"revision": "v2"}, NAMES),
        ({}, NAMES[::-1]),
    ],
)
def test_other_requests_miss_the_cache(
    tiny_clip: Path, tmp_path: Path, loads: list[str], changed: dict, names: list[str]
) -> None:
    text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)
    text_vectors(TextSettings(model=str(tiny_clip), **changed), names, tmp_path)
    assert len(loads) == 2


def test_changed_model_misses_the_cache(tmp_path: Path, loads: list[str]) -> None:
    settings = TextSettings(model=str(_save_clip(tmp_path / "clip")))
    first = text_vectors(settings, NAMES, tmp_path / "cache")
    _save_clip(tmp_path / "clip", seed=1)
    second = text_vectors(settings, NAMES, tmp_path / "cache")
    assert len(loads) == 2
    assert first.hash != second.hash


def test_other_transformers_misses_the_cache(
    tiny_clip: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)
    monkeypatch.setattr(clip, "transformers_version", lambda: "0.0")
    text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path)
    assert len(loads) == 2


@pytest.mark.parametrize("damage", ["numbers", "bytes"])
def test_damaged_cache_is_made_again(
    tiny_clip: Path, tmp_path: Path, loads: list[str], damage: str
) -> None:
    settings = TextSettings(model=str(tiny_clip))
    found = text_vectors(settings, NAMES, tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "numbers":
        TextVectors(found.vectors + 1, found.origin).save(path)
    else:
        path.write_bytes(b"not a file of vectors")
    assert text_vectors(settings, NAMES, tmp_path).hash == found.hash
    assert len(loads) == 2


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCLIPSEG_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/text")
    monkeypatch.delenv("VCLIPSEG_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/vclipseg/text")


def test_unwritable_cache_is_a_usage_error(tiny_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="VCLIPSEG_HOME"):
        text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path / "file")


# Files


def test_file_round_trip(tiny_clip: Path, tmp_path: Path) -> None:
    made = text_vectors(TextSettings(model=str(tiny_clip)), NAMES, tmp_path / "cache")
    made.save(tmp_path / "atrium.safetensors")
    settings = TextSettings(source=str(tmp_path / "atrium.safetensors"))
    found = text_vectors(settings, NAMES)
    np.testing.assert_array_equal(found.vectors, made.vectors)
    assert found.hash == made.hash
    assert found.label == "file:atrium.safetensors"
    assert found.origin["made_as"] == "clip"
    assert found.origin["prompts"] == made.origin["prompts"]


def test_file_of_vectors_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    vectors = np.arange(6, dtype=np.float16).reshape(2, 3)
    safetensors.numpy.save_file({"vectors": vectors}, path, {"author": "someone"})
    found = text_vectors(TextSettings(source=str(path)), NAMES)
    np.testing.assert_array_equal(found.vectors, vectors.astype(np.float32))
    assert found.vectors.dtype == np.float32
    assert found.origin["author"] == "someone"
    assert found.origin["class_names"] == NAMES


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"vectors": np.ones((3, 4), np.float32)}, {}, "3 vectors for 2 classes"),
        ({"vectors": np.ones((2, 4), np.float32)}, {"class_names": '["a", "b"]'}, "made for"),
        ({"vectors": np.ones((2, 4), np.float32)}, {"class_names": "a, b"}, "made for"),
        ({"embeddings": np.ones((2, 4), np.float32)}, {}, "no tensor named vectors"),
        ({"vectors": np.ones(4, np.float32)}, {}, "must be"),
        ({"vectors": np.full((2, 4), np.nan, np.float32)}, {}, "finite"),
        ({"vectors": np.zeros((2, 4), np.float32)}, {}, "no row all 0"),
    ],
)
def test_unfit_files_are_data_errors(
    tmp_path: Path, tensors: dict, metadata: dict, message: str
) -> None:
    path = tmp_path / "unfit.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(DataError, match=message) as error:
        text_vectors(TextSettings(source=str(path)), NAMES)
    assert str(path) in str(error.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match="vclipseg prompts"):
        text_vectors(TextSettings(source=str(path)), NAMES)
    path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.safetensors"):
        text_vectors(TextSettings(source=str(path)), NAMES)


# Controls


@pytest.mark.parametrize("source", ["orthogonal", "random"])
def test_controls(source: str) -> None:
    settings = TextSettings(source=source, dim=64)
    found = text_vectors(settings, ["background", "a", "b", "c"])
    assert found.vectors.shape == (4, 64)
    assert found.vectors.dtype == np.float32
    assert found.label == source
    assert found.origin["source"] == source
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), CONTROL_NORM, rtol=1e-5)
    off_diagonal = cosine_matrix(found.vectors)[~np.eye(4, dtype=bool)]
    assert (np.abs(off_diagonal).max() < 1e-6) == (source == "orthogonal")
    again = text_vectors(settings, ["background", "a", "b", "c"])
    assert again.hash == found.hash
    other = text_vectors(settings.model_copy(update={"seed": 1}), ["background", "a", "b", "c"])
    assert other.hash != found.hash


def test_more_classes_than_dimensions_cannot_be_orthogonal() -> None:
    with pytest.raises(UsageError, match=r"text\.dim=2"):
        text_vectors(TextSettings(source="orthogonal", dim=2), ["background", "a", "b"])


def test_cosine_matrix() -> None:
    vectors = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    root = np.sqrt(0.5)
    np.testing.assert_allclose(
        cosine_matrix(vectors), [[1, 0, root], [0, 1, root], [root, root, 1]], atol=1e-12
    )
