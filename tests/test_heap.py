from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vclipseg.heap import keep_freed_memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")

STEPS = """
import resource, sys
from toy import build, make_batch
import vclipseg.training as training

if sys.argv[1] == "off":
    training.keep_freed_memory = lambda: None
settings = training.TrainSettings(steps=6, patch=(48, 48, 32), statistics_batches=0)
machine, batch = training.make_machine(settings), make_batch(0, settings.patch)
faults = []
training.train(
    training.start(build("supervised", "robust", filters=8), settings, machine),
    lambda step: batch,
    settings,
    machine,
    lambda *_: faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt),
)
print(faults[-1] - faults[2])
"""

LARGE = """
import torch
from vclipseg.heap import keep_freed_memory

def held():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**10

keep_freed_memory(128 * 2**20)
torch.ones(2**20)
before = held()
tensor = torch.ones(2**27)  # 512 MiB
print(held() - before)
del tensor
print(held() - before)
"""


def run(program: str, *arguments: str, **environment: str) -> list[float]:
    """The numbers that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
    )
    return [float(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_steps_need_no_new_pages():
    # left alone, glibc raises the size above which it gives memory back, and may keep these tensors too
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    (without,), (kept,) = run(STEPS, "off", **gives_back), run(STEPS, "on", **gives_back)
    assert kept < without / 10


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_what_exceeds_the_heap_is_given_back():
    held, after = run(LARGE)
    assert held > 500
    assert after < 50


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    keep_freed_memory.cache_clear()
    keep_freed_memory()
    keep_freed_memory.cache_clear()


def test_a_c_library_without_the_switches_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory.cache_clear()
    keep_freed_memory()
    keep_freed_memory.cache_clear()
