"""What a GRID.toml says: a recipe with a `[grid]` table of methods, label budgets, seeds, draws, folds.

A cell is one run of it. All cells share the recipe; a method's preset and the `set` of its entry are
all that may differ, and `differences` says what does, for the footnotes of the tables.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from vclipseg.config import (
    Experiment,
    build_experiment,
    explain,
    merge,
    parse_override,
    read_recipe,
)
from vclipseg.errors import UsageError
from vclipseg.settings import Settings

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]

COMMON = ("prepare", "augment", "train", "predict", "evaluate")
"""Sections that a fair comparison keeps alike."""
OF_A_CELL = ("seed", "init_from")


class Pretrain(Settings):
    """The run that a method of two stages starts from: the same data and seed, another preset."""

    name: str | None = None
    """Method of the first stage; that of the entry when left out."""
    preset: str
    """Its preset."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that it changes, such as `train.steps`."""


class Entry(Settings):
    """A method of a grid."""

    name: str
    """Method."""
    preset: str = "robust"
    """Preset of the method."""
    label: str = ""
    """What `set` changes, in a few words; records and tables show it after the preset."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings over those of the recipe, such as `method.dlb_weighting`."""
    labeled: tuple[Count, ...] | None = None
    """Label budgets of this method, if not those of the grid."""
    pretrain: Pretrain | None = None
    """A first stage to start from."""
    published: str | None = None
    """Name of the published figure to stand beside, if not the one of the method and preset."""
    optional: bool = False
    """Leave it out where its text vectors cannot be had, instead of counting it as failed."""

    @property
    def shown(self) -> str:
        """The preset column of records: the preset, and the label where there is one."""
        return f"{self.preset}, {self.label}" if self.label else self.preset

    @property
    def title(self) -> str:
        """Method and preset, for people."""
        return f"{self.name} ({self.shown})"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.set and not self.label:
            raise ValueError("an entry with `set` needs a `label` that says what it changes")
        return self


class GridSettings(Settings):
    """Which runs a grid has: every method, label budget, draw, fold and seed."""

    title: str = ""
    """Heading of the tables; the grid's name when left out."""
    published: str | None = None
    """Data set of the published figures to stand beside: "la" or "pancreas"."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of weights, patches, augmentation and dropout."""
    labeled: tuple[Count, ...] = ()
    """Label budgets; the recipe's own when left out."""
    draws: tuple[int, ...] = ()
    """Seeds that draw the labeled cases; the first of the list when left out."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Parts of a cross-validation over the training cases; 0: the data set's own test cases."""
    methods: Annotated[tuple[Entry, ...], Field(min_length=1)]
    """What is compared, in the order of the tables."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen: set[tuple[str, str]] = set()
        for entry in self.methods:
            if (entry.name, entry.shown) in seen:
                raise ValueError(f"{entry.title} is there twice; tell them apart by their labels")
            seen.add((entry.name, entry.shown))
        if self.folds == 1:
            raise ValueError("folds: 0, or 2 and more")
        return self


@dataclass(frozen=True)
class Cell:
    """One run: a method with one label budget, draw, fold and seed."""

    entry: Entry
    labeled: int | None
    draw: int | None
    fold: int | None
    seed: int

    @property
    def replicate(self) -> tuple[int | None, int | None, int | None, int]:
        """What methods share that are compared on one run each."""
        return self.labeled, self.draw, self.fold, self.seed

    def __str__(self) -> str:
        parts = [self.entry.title]
        parts += [] if self.labeled is None else [f"{self.labeled} labeled"]
        parts += [] if self.draw is None else [f"draw {self.draw}"]
        parts += [] if self.fold is None else [f"fold {self.fold}"]
        return ", ".join([*parts, f"seed {self.seed}"])


@dataclass(frozen=True)
class Grid:
    """A grid and the recipe that all its cells share."""

    path: Path
    settings: GridSettings
    recipe: dict[str, Any]
    written: GridSettings
    """As the file has it, without what a call overrides of `[grid]`."""

    @property
    def name(self) -> str:
        """The file's name, which names the folder of the record too."""
        return self.path.stem

    def cells(self) -> Iterator[Cell]:
        """Every cell, one seed after the other, so that each is soon compared."""
        s = self.settings
        folds = range(s.folds) if s.folds else (None,)
        for seed, draw, fold in product(s.seeds, s.draws or (None,), folds):
            budgets = {budget for entry in s.methods for budget in self.budgets(entry)}
            for budget in sorted(budgets, key=lambda n: n or 0):
                for entry in s.methods:
                    if budget in self.budgets(entry):
                        yield Cell(entry, budget, draw, fold, seed)

    def whole(self) -> Grid:
        """With all cells that the file has."""
        return replace(self, settings=self.written)

    def budgets(self, entry: Entry) -> tuple[int | None, ...]:
        """The label budgets of a method; None is the recipe's own choice."""
        return entry.labeled or self.settings.labeled or (None,)

    def values(self, cell: Cell, *, first_stage: bool = False) -> dict[str, Any]:
        """The settings of a cell, as a recipe has them; or those of its first stage."""
        entry, chosen = cell.entry, {"name": cell.entry.name, "preset": cell.entry.preset}
        changed = entry.set
        if first_stage:
            if entry.pretrain is None:
                raise ValueError(f"{entry.title} has no first stage")
            chosen = {"name": entry.pretrain.name or entry.name, "preset": entry.pretrain.preset}
            changed = entry.pretrain.set
        values = copy.deepcopy(self.recipe)
        data = {"labeled": cell.labeled, "draw": cell.draw, "fold": cell.fold}
        if cell.fold is not None:
            data["folds"] = self.settings.folds
        known = {key: value for key, value in data.items() if value is not None}
        for layer in ({"method": chosen}, changed, {"data": known, "train": {"seed": cell.seed}}):
            merge(values, copy.deepcopy(layer))
        return values

    def experiment(
        self, cell: Cell, *, first_stage: bool = False, init_from: str | None = None
    ) -> Experiment:
        """The same, checked; `init_from` is the folder of the first stage.

        Raises:
            UsageError: a method, preset or setting of it is wrong.
        """
        values = self.values(cell, first_stage=first_stage)
        if init_from:
            merge(values, {"train": {"init_from": init_from}})
        stage = f"{self.path}: {cell.entry.title}" + (", pretrain" if first_stage else "")
        return build_experiment(values, {}, source=stage)

    def common(self) -> Experiment:
        """What all cells share: the recipe, with the supervised baseline for a method."""
        values = copy.deepcopy(self.recipe)
        own = values.get("method", {})
        filters = {"filters": own["filters"]} if "filters" in own else {}
        values["method"] = {"name": "supervised", "preset": "robust", **filters}
        return build_experiment(values, {}, source=str(self.path))


def load_grid(path: Path, overrides: Iterable[str] = ()) -> Grid:
    """Read a GRID.toml; methods and presets are looked up only when a cell is built.

    Args:
        path: a recipe with a `[grid]` table.
        overrides: such as `train.steps=500` or `grid.seeds=[0]`.

    Raises:
        UsageError: it is none, or a key or value of `[grid]` is wrong.
    """
    values = read_recipe(path)
    written = copy.deepcopy(values.get("grid"))
    for override in overrides:
        merge(values, parse_override(override))
    if not isinstance(written, dict) or not isinstance(values["grid"], dict):
        raise UsageError(f"{path}: no grid: it needs a [grid] table with [[grid.methods]]")
    for key in ("name", "preset"):
        values.get("method", {}).pop(key, None)
    settings = _grid_settings(path, values.pop("grid"))
    return Grid(path, settings, values, _grid_settings(path, written))


def _grid_settings(path: Path, values: dict[str, Any]) -> GridSettings:
    try:
        return GridSettings.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, GridSettings, str(path), "grid.")) from error


def differences(grid: Grid, entry: Entry) -> list[str]:
    """What a method does otherwise than the grid's common settings, in words for a footnote."""
    cell = next(cell for cell in grid.cells() if cell.entry == entry)
    own, common = grid.experiment(cell), grid.common()
    found = [
        f"{section}.{key} = {_spell(value)}"
        for section in COMMON
        for key, value in getattr(own, section).model_dump(mode="json").items()
        if key not in OF_A_CELL and value != getattr(common, section).model_dump(mode="json")[key]
    ]
    if own.method.filters != common.method.filters:
        found.append(f"method.filters = {own.method.filters}")
    if sum(own.method.patches) != sum(common.method.patches):
        labeled, unlabeled = own.method.patches
        found.append(f"{labeled} labeled and {unlabeled} unlabeled patches a step")
    notes = ["; ".join(found)] if found else []
    if entry.pretrain:
        first = grid.experiment(cell, first_stage=True)
        notes.append(
            f"starts from {first.train.steps} steps of {first.method_name} ({first.preset}), "
            "whose time is counted in"
        )
    return notes


def _spell(value: Any) -> str:
    """A value as a recipe writes it, shortly."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
