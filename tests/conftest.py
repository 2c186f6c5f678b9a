"""For all tests: the CPU, one thread, and a cache folder of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
if os.environ.get("VCLIPSEG_TEST_DEVICE", "cpu") == "cpu":  # else the tests of test_gpu.py alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is promised bit for bit is promised on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import torch

from vclipseg import cli
from vclipseg.data.phantom import make_phantom

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared cases and text vectors go here, never into the cache of the person who tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VCLIPSEG_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up atria, small: 2 labeled, 2 unlabeled and 2 test cases. Not to be changed."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    return make_phantom(root, labeled=2, unlabeled=2, test=2, shape=(24, 24, 18), spacing=4.0)


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run the command line in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vclipseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run
