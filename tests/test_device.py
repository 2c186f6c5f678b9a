from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vclipseg import device
from vclipseg.device import (
    autocast,
    available_memory,
    default_device,
    has_fast_bf16,
    require_compiler,
    resolve_precision,
)
from vclipseg.errors import UsageError


@pytest.fixture(autouse=True)
def _forget():
    has_fast_bf16.cache_clear()
    yield
    has_fast_bf16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("fpu avx2", False), ("fpu avx512_bf16", True), ("amx_bf16 amx_tile", True), (None, False)],
)
def test_bf16_is_fast_where_the_processor_says_so(monkeypatch, flags, fast):
    def read(self, **kwargs):
        if flags is None:
            raise FileNotFoundError
        return f"flags : {flags}\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert has_fast_bf16("cpu") == fast


@pytest.mark.parametrize("fast", [True, False])
def test_resolve_precision(monkeypatch, fast):
    monkeypatch.setattr(device, "has_fast_bf16", lambda kind: fast)
    assert resolve_precision("auto", "cpu") == ("bf16" if fast else "fp32")
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp32", "cpu") == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_autocast(precision):
    with autocast(torch.device("cpu"), precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_this_machine():
    found = default_device()
    assert found.type == ("cuda" if torch.cuda.is_available() else found.type)
    assert available_memory(torch.device("cpu")) > 0


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(UsageError, match=r"C\+\+ compiler .a-compiler.*train.compile to off"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="nor the package triton"):
        require_compiler(torch.device("cuda"))


def test_a_compiler_that_is_there_will_do(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: "g++")
    monkeypatch.setattr(device.locale, "getpreferredencoding", lambda set_it: "UTF-8")
    require_compiler(torch.device("cpu"))
    monkeypatch.setattr(device.locale, "getpreferredencoding", lambda set_it: "ANSI_X3.4-1968")
    with pytest.raises(UsageError, match="PYTHONUTF8=1"):
        require_compiler(torch.device("cpu"))
