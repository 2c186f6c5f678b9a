"""What the machine offers: device, memory, bfloat16."""

from __future__ import annotations

import codecs
import functools
import importlib.util
import locale
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from vclipseg.errors import UsageError
from vclipseg.windows import free_memory


def default_device() -> torch.device:
    """The GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def has_fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 convolutions run in hardware; emulated ones are slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(precision: str, device_type: str) -> str:
    """Turn "auto" into "bf16" where the device computes it in hardware, else into "fp32"."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device_type) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that runs convolutions in `precision`."""
    enabled = resolve_precision(precision, device.type) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and in which precision its convolutions do."""

    device: torch.device
    precision: str  # as `resolve_precision` gives it

    def autocast(self) -> torch.autocast:
        """The context of the forward pass."""
        return autocast(self.device, self.precision)


def require_compiler(device: torch.device) -> None:
    """What `torch.compile` needs on a device.

    Raises:
        UsageError: it is not there.
    """
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    missing = [] if any(map(shutil.which, names)) else [f"a C++ compiler ({' or '.join(names)})"]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("the package triton")
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        missing.append("UTF-8, in which torch's own files are (PYTHONUTF8=1 does)")
    if missing:
        raise UsageError(
            f"train.compile: this machine has not {' nor '.join(missing)}; install it, or set "
            "train.compile to off"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or off it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "allocate memory")
    return any(word in str(error).lower() for word in words)
