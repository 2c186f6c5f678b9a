"""What the literature reports for a method, from published.toml: to stand beside what was measured."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

METRICS = ("dice", "jaccard", "hd95_voxel", "asd_voxel")


@dataclass(frozen=True)
class Figure:
    """Published scores of a method with some number of labeled cases.

    Dice and Jaccard are in [0, 1] here, as everywhere in this project; distances in voxels; NaN where
    none is given. `selection` is how the checkpoint was chosen: "best on test", "last", "not said".
    """

    name: str
    dice: float
    jaccard: float
    hd95_voxel: float
    asd_voxel: float
    source: str
    selection: str
    components: bool

    @property
    def origin(self) -> str:
        """Source, choice of the checkpoint and post-processing, as a footnote."""
        kept = "; only the largest component" if self.components else ""
        return f"{self.source}; checkpoint: {self.selection}{kept}"


def published(
    dataset: str | None, labeled: int, method: str, preset: str, name: str | None = None
) -> Figure | None:
    """The published figure of a row of a table, None where there is none.

    Args:
        dataset: "la" or "pancreas"; None has no figures.
        labeled: number of labeled cases.
        method: as in `vclipseg info`.
        preset: as in the records' column; one with a label has a figure only by `name`.
        name: of the figure, instead of method and preset.
    """
    for row in _tables()["figures"]:
        if row["dataset"] != dataset or str(labeled) not in row["values"]:
            continue
        named = row["name"] == name if name else preset in row["presets"]
        if named and (name or row["method"] == method):
            return _figure(row, row["values"][str(labeled)])
    return None


def datasets() -> dict[str, dict[str, Any]]:
    """Data set -> its title and the `filters` and `patch` of the published runs."""
    return _tables()["datasets"]


def names(dataset: str) -> list[str]:
    """The published methods of a data set."""
    return [row["name"] for row in _tables()["figures"] if row["dataset"] == dataset]


def is_full_size(dataset: str, filters: int, patch: Sequence[int]) -> bool:
    """Whether runs of this width and patch are of the size of the published ones."""
    told = datasets()[dataset]
    return filters == told["filters"] and list(patch) == told["patch"]


def _figure(row: dict[str, Any], values: list[float]) -> Figure:
    dice, jaccard, hd95, asd = values
    return Figure(
        name=row["name"],
        dice=round(dice / 100, 6),
        jaccard=round(jaccard / 100, 6),
        hd95_voxel=hd95,
        asd_voxel=asd,
        source=row["source"],
        selection=row["selection"],
        components=row.get("components", False),
    )


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("vclipseg.tables").joinpath("published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
