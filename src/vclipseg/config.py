"""Recipes: TOML files that say only what differs from the defaults, checked into an `Experiment`.

Values are laid over each other in this order: defaults, the method's preset, the recipe that a recipe
extends, the recipe, overrides from the command line.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError

from vclipseg.data.augment import AugmentSettings
from vclipseg.data.plan import PlanSettings
from vclipseg.errors import UsageError
from vclipseg.evaluation import EvaluateSettings
from vclipseg.inference import PredictSettings
from vclipseg.methods import NEEDS_TEXT, method_class, preset
from vclipseg.methods.base import MethodSettings
from vclipseg.networks.text import TextSettings
from vclipseg.settings import Settings
from vclipseg.training import TrainSettings

S = TypeVar("S", bound=Settings)

DEFAULT_METHOD, DEFAULT_PRESET = "vclipseg", "robust"


class DataSettings(Settings):
    """Which cases are labeled, and what the classes are."""

    labeled: Annotated[int, Field(ge=1)] | tuple[str, ...] | None = None
    """Number of labeled cases (the first of the list), or their ids; all when left out."""
    draw: int | None = None
    """Seed to draw the labeled cases at random instead of taking the first."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Cross-validation: test this part, counted from 0, of the training cases with labels, instead of
    the data set's own test cases."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the cross-validation."""
    transductive: bool = False
    """Train on the test images as unlabeled ones; every report says so."""
    reviews: bool = True
    """Train on what people decided in `vclipseg serve`: reviewed masks as labels besides those of
    `labeled`, without the cases marked to be ignored."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, background first, where the data set does not say."""
    label_values: tuple[int, ...] | None = None
    """Value stored in label files for each class, where they are not 0, 1, 2, ..."""


class Experiment(Settings):
    """Everything that a run is told."""

    name: str = "run"
    """Names the run folder and the dataset column of records."""
    preset: str = DEFAULT_PRESET
    """Filled from method.preset."""
    data: DataSettings = DataSettings()
    prepare: PlanSettings = PlanSettings()
    augment: AugmentSettings = AugmentSettings()
    text: TextSettings = TextSettings()
    method: SerializeAsAny[MethodSettings]
    train: TrainSettings = TrainSettings()
    predict: PredictSettings = PredictSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def needs_text(self) -> bool:
        """Whether the method reads text vectors."""
        return self.method_name in NEEDS_TEXT

    @property
    def method_name(self) -> str:
        """The name of the method, as in `vclipseg info`."""
        return self.method.name  # type: ignore[attr-defined]

    def to_json(self) -> dict[str, Any]:
        """All values, defaults too, as JSON can hold them."""
        return self.model_dump(mode="json")


def load_experiment(
    recipe: Path | None = None, overrides: Iterable[str] = (), defaults: dict | None = None
) -> Experiment:
    """Check a recipe and `key=value` overrides into an `Experiment`.

    Args:
        recipe: TOML file; the defaults alone when left out.
        overrides: such as `train.steps=500`; values are TOML, and text where they are not.
        defaults: laid under the recipe, over the preset.

    Raises:
        UsageError: a file, key or value is wrong; the message has a line for each mistake.
    """
    values = read_recipe(recipe) if recipe else {}
    if "grid" in values:
        raise UsageError(
            f"{recipe}: a grid of experiments; run it with `vclipseg benchmark {recipe}`"
        )
    for override in overrides:
        merge(values, parse_override(override))
    return build_experiment(values, defaults or {}, source=str(recipe) if recipe else "settings")


def build_experiment(
    values: dict[str, Any], defaults: dict[str, Any], source: str = "settings"
) -> Experiment:
    """Preset, defaults and values to an `Experiment`."""
    if "preset" in values:
        raise UsageError(f"{source}: preset: unknown setting; did you mean method.preset?")
    method = values.get("method", {})
    if not isinstance(method, dict):
        raise UsageError(f"{source}: method: expected method.name = {method!r}")
    method = dict(method)
    name = method.pop("name", DEFAULT_METHOD)
    preset_name = method.pop("preset", DEFAULT_PRESET)
    cls = method_class(name)
    merged: dict[str, Any] = {}
    for layer in (preset(name, preset_name), defaults, {**values, "method": method}):
        merge(merged, layer)
    try:
        merged["method"] = cls.Settings.model_validate({**merged["method"], "name": name})
    except ValidationError as error:
        raise UsageError(explain(error, cls.Settings, source, "method.")) from error
    try:
        return Experiment.model_validate({**merged, "preset": preset_name})
    except ValidationError as error:
        raise UsageError(explain(error, Experiment, source)) from error


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with what it `extends` (a path relative to it) underneath; `above` are those it is for."""
    if path.resolve() in above:
        raise UsageError(f"{path}: extends itself")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: no such recipe ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    base = values.pop("extends", None)
    if base is None:
        return values
    below = read_recipe(path.parent / str(base), (*above, path.resolve()))
    merge(below, values)
    return below


def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Lay `above` over `below`, table by table, in place."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = dict(value) if isinstance(value, dict) else value


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` to `{"a": {"b": value}}`.

    Raises:
        UsageError: it has another form.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text}: expected key=value, such as train.steps=500")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def overridden(settings: S, overrides: Iterable[str], section: str) -> S:
    """A run's own settings of a section, such as "predict", with overrides laid over them."""
    values = settings.model_dump()
    for override in overrides:
        merge(values, parse_override(override).get(section, {}))
    try:
        return type(settings).model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, type(settings), "--set", f"{section}.")) from error


def explain(error: ValidationError, model: type, source: str, prefix: str = "") -> str:
    """One line a mistake, with the nearest name where a key is unknown."""
    lines = []
    for problem in error.errors():
        where = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), known_keys(model), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{where}: unknown setting{hint}")
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})")
    return "\n".join(f"{source}: {line}" for line in lines)


def known_keys(model: Any) -> list[str]:
    """Names of the fields of a settings class and of those in it."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            keys += known_keys(info.annotation)
    return keys
