"""What a run was made with: versions, device, commit. A record needs it to be believed."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vclipseg import __version__
from vclipseg.device import default_device, resolve_precision

PACKAGES = ("torch", "numpy", "monai", "nibabel", "SimpleITK", "transformers")


def environment(precision: str, threads: int | None) -> dict[str, Any]:
    """Versions, device and commit.

    Args:
        precision: as asked for in `train.precision`.
        threads: as asked for in `train.threads`.
    """
    device = default_device()
    return {
        "vclipseg": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "precision": resolve_precision(precision, device.type),
        "threads": threads or torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def computed_on(found: Mapping[str, Any]) -> str:
    """An `environment` for records: processor, threads, and the precision of the convolutions."""
    return f"{found['device']}, {found['threads']} thread(s), {found['precision']}"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name for people."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def commit() -> str | None:
    """The commit of the source tree, with "+" where it has changes; None outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
