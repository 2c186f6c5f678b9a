"""One paper a file. A method is a name here; its module is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

from vclipseg.errors import UsageError

METHODS = {
    "supervised": "supervised:Supervised",
    "mean_teacher": "mean_teacher:MeanTeacher",
    "ua_mt": "ua_mt:UAMT",
    "cps": "cps:CPS",
    "mcnet": "mcnet:MCNet",
    "caml": "caml:CAML",
    "arco": "arco:Arco",
    "caussl": "caussl:CauSSL",
    "vclipseg": "vclipseg:VCLIPSeg",
    "vclipseg_x": "vclipseg_x:VCLIPSegX",
    "bcp": "bcp:BCP",
    "ad_mt": "ad_mt:ADMT",
    "crossmatch": "crossmatch:CrossMatch",
}

PRESETS = {
    "supervised": ("robust", "faithful"),
    "mean_teacher": ("robust", "faithful"),
    "ua_mt": ("robust", "faithful"),
    "cps": ("robust", "faithful", "ssl4mis", "original", "cps_dlb", "cps_dlb_robust"),
    "mcnet": ("robust", "faithful", "plus", "plus_robust"),
    "caml": ("robust", "faithful"),
    "arco": ("pretrain", "faithful", "as_released", "robust"),
    "caussl": ("robust", "faithful", "mc", "cps"),
    "vclipseg": ("faithful", "code", "paper", "mcnet_dlb", "robust", "robust_without_unlabeled"),
    "vclipseg_x": ("robust", "faithful"),
    "bcp": ("robust", "faithful"),
    "ad_mt": ("robust", "faithful", "code"),
    "crossmatch": ("robust", "faithful", "code"),
}
"""The presets of each method by name, so that they can be listed without importing torch."""

NEEDS_TEXT = frozenset({"vclipseg", "vclipseg_x"})


def method_class(name: str) -> Any:
    """The `Method` of that name.

    Raises:
        UsageError: there is none.
    """
    module, cls = METHODS[_known(name)].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


def presets(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Preset name -> section ("method", "train", "text") -> values that differ from the defaults."""
    module = METHODS[_known(name)].split(":")[0]
    return importlib.import_module(f"{__name__}.{module}").PRESETS


def preset(name: str, preset_name: str) -> dict[str, dict[str, Any]]:
    """One preset of a method.

    Raises:
        UsageError: there is none of that name.
    """
    table = presets(name)
    if preset_name not in table:
        raise UsageError(f"{name} has no preset {preset_name!r}; it has {', '.join(sorted(table))}")
    return table[preset_name]


def _known(name: str) -> str:
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return name
