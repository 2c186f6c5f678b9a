from __future__ import annotations

import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file

from toy import build, fast, fit
from vclipseg.checkpoint import load_model, load_state, save_model, save_state
from vclipseg.errors import DataError, UsageError


class Villain:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


DESCRIPTION = {"name": "Herz für alle", "class_names": ["background", "atrium"], "steps": 5}


def state():
    weights = {
        "w": torch.arange(6.0).view(2, 3),
        "n": torch.tensor(3),
        "b": torch.ones(2).bfloat16(),
    }
    return {
        "step": 7,
        "method": weights,
        "optimizer": {"state": {0: {"lr": 0.1}}, "param_groups": []},
    }


# The state of a run


def test_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path / "new" / "last.pt", state())
    found = load_state(tmp_path / "new" / "last.pt")
    assert found.keys() == state().keys()
    assert found["step"] == 7
    assert found["optimizer"] == state()["optimizer"]
    for key, value in state()["method"].items():
        assert torch.equal(found["method"][key], value)
        assert found["method"][key].dtype == value.dtype


def test_a_trained_state_comes_back(tmp_path):
    trained = fit(build(), fast(steps=2)).state_dict()
    save_state(tmp_path / "last.pt", trained)
    found = load_state(tmp_path / "last.pt")
    assert found["optimizer"]["param_groups"] == trained["optimizer"]["param_groups"]
    assert all(torch.equal(found["average"][k], v) for k, v in trained["average"].items())


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "flipped"])
def test_a_damaged_state_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_state(path, state())
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(bytes(255 - b for b in content))
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-200], "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint"):
        load_state(path)


@pytest.mark.parametrize("content", [{"step": 1}, {"version": 99}, [1, 2], torch.zeros(2)])
def test_a_state_of_another_version_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(DataError, match="another version"):
        load_state(tmp_path / "last.pt")


def test_no_pickled_code_is_run(tmp_path):
    path, marker = tmp_path / "last.pt", tmp_path / "marker"
    torch.save({"version": 1, "step": Villain(marker)}, path)
    with pytest.raises(DataError, match=r"last\.pt"):
        load_state(path)
    path.write_bytes(pickle.dumps(Villain(marker)))
    with pytest.raises(DataError, match=r"last\.pt"):
        load_state(path)
    with pytest.raises(DataError, match=r"last\.pt"):
        load_model(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # so the file was one that does harm
    assert marker.exists()


# The model


def test_model_comes_back_as_it_was(tmp_path):
    weights = build().state_dict()
    save_model(tmp_path / "model.safetensors", weights, DESCRIPTION)
    found, description = load_model(tmp_path / "model.safetensors")
    assert description == DESCRIPTION
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_model_in_another_memory_format_comes_back(tmp_path):
    weight = torch.randn(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d)
    save_model(tmp_path / "m.safetensors", {"w": weight.requires_grad_()}, {})
    assert torch.equal(load_model(tmp_path / "m.safetensors")[0]["w"], weight)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_model_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_model(path, {"w": torch.zeros(100)}, DESCRIPTION)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[:-50], "text": b"hello" * 9}[damage])
    with pytest.raises(DataError, match=r"model\.safetensors: not a readable model"):
        load_model(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not a model of this version"),
        ({"format": "pt"}, "not a model of this version"),
        ({"format": "vclipseg", "version": "99"}, "not a model of this version"),
        ({"format": "vclipseg", "version": "1"}, "does not say what model it is"),
        ({"format": "vclipseg", "version": "1", "description": "{"}, "does not say"),
    ],
)
def test_another_safetensors_file_is_refused(tmp_path, metadata, message):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(DataError, match=message):
        load_model(tmp_path / "other.safetensors")


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.safetensors: no such model"):
        load_model(tmp_path / "nowhere.safetensors")


# Whole or not at all


@pytest.mark.parametrize("write", ["state", "model"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, write):
    path = tmp_path / "file"

    def save(value):
        if write == "state":
            save_state(path, {"step": value})
        else:
            save_model(path, {"w": torch.tensor([value])}, {})

    def replaced(source, target):
        raise OSError("no space left")

    save(1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        with pytest.raises(OSError, match="no space"):
            save(2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    save(2)
    assert path.read_bytes() != before


def test_a_writer_that_dies_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_state(path, {"step": 1})

    def half(content, file):
        with open(file, "wb") as opened:
            opened.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_files_are_as_readable_as_others(tmp_path):
    """A model is for others to use; the person's umask says who they are."""
    save_model(tmp_path / "model", {"w": torch.zeros(1)}, {})
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "plain")}
    assert len(modes) == 1
