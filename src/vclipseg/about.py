"""What is installed and what there is to use, told without importing torch."""

from __future__ import annotations

from typing import Any

from vclipseg import __version__
from vclipseg.methods import PRESETS


def info() -> dict[str, Any]:
    """Version, methods and their presets."""
    methods = {name: sorted(presets) for name, presets in PRESETS.items()}
    return {"version": __version__, "methods": methods}


def versions() -> str:
    """For a bug report."""
    from importlib import metadata

    names = ("torch", "monai", "numpy")
    return " ".join([f"vclipseg {__version__}", *(f"{n} {metadata.version(n)}" for n in names)])
