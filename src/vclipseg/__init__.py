"""Accurate 3D segmentation from a handful of annotated scans and many that nobody annotated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vclipseg.data.volume import Volume, read_image, write
    from vclipseg.inference import Predictor, load

__version__ = "0.1.0"
__all__ = ["Predictor", "Volume", "__version__", "load", "read_image", "write"]

_HOMES = {
    "Predictor": "vclipseg.inference",
    "load": "vclipseg.inference",
    "Volume": "vclipseg.data.volume",
    "read_image": "vclipseg.data.volume",
    "write": "vclipseg.data.volume",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
