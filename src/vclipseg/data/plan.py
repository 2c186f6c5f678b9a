"""The plan: what preprocessing does, in a file that a person can read and edit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from vclipseg.data.cases import Case
from vclipseg.data.intensity import WINDOWED, Intensity
from vclipseg.data.volume import (
    affine_spacing,
    axes_and_flips,
    read_header,
    turn_affine,
)
from vclipseg.errors import DataError, UsageError
from vclipseg.files import write_text
from vclipseg.settings import Settings

if TYPE_CHECKING:
    from vclipseg.data.datasets import Dataset

Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spacing = tuple[Millimetres, Millimetres, Millimetres]


def _three_axes(codes: str) -> str:
    pairs = [next((i for i, pair in enumerate(("RL", "AP", "SI")) if c in pair), -1) for c in codes]
    if sorted(pairs) != [0, 1, 2]:
        raise ValueError('one letter each of R or L, A or P, S or I, such as "RAS"')
    return codes


Orientation = Annotated[str, AfterValidator(_three_axes)]
Crop = Literal["none", "nonzero"]

_BY_CHANNEL_NAME: dict[str, Intensity] = {
    "ct": "percentile",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale",
    "rgb_to_0_1": "rescale",
}


class _Steps(Settings):
    orientation: Orientation = "RAS"
    """World directions of the axes X, Y and Z that volumes are turned to."""
    window: tuple[float, float] | None = None
    """Lowest and highest intensity kept by "window" and "window_zscore"."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """The percentiles that "percentile" clips to."""
    crop: Crop = "none"
    """nonzero: cut away the border in which the image is 0 everywhere."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window and not self.window[0] < self.window[1]:
            raise ValueError("window: the first number must be below the second")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles: two rising numbers from 0 to 100")
        return self


class PlanSettings(_Steps):
    """What a person may fix of the plan; the rest is decided from the data."""

    spacing: Spacing | None = None
    """Voxel size in mm along X, Y and Z after turning; default: the median of the train images."""
    intensity: Intensity | tuple[Intensity, ...] | None = None
    """zscore, window, window_zscore, percentile, rescale or none, one for all channels or one a channel;
    default: by the channel's name."""


class Plan(_Steps):
    """What preprocessing does to every image of a data set."""

    spacing: Spacing
    """Voxel size in mm along X, Y and Z after turning."""
    intensity: tuple[Intensity, ...]
    """One a channel: zscore, window, window_zscore, percentile, rescale or none."""
    notes: dict[str, str] = Field(default_factory=dict)
    """How each value was decided; read by people only."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        for intensity in WINDOWED:
            if intensity in self.intensity and self.window is None:
                raise ValueError(f'intensity "{intensity}" needs window = [low, high]')
        return self

    def intensity_of(self, channel: int) -> Intensity:
        """The normalization of a channel.

        Raises:
            DataError: The plan knows fewer channels.
        """
        if channel >= len(self.intensity):
            raise DataError(
                f"The image has more channels than the plan ({len(self.intensity)}). "
                "Give it the channels that the model was trained on."
            )
        return self.intensity[channel]


def make_plan(dataset: Dataset, cases: Iterable[Case | str], settings: PlanSettings) -> Plan:
    """Decide what the settings leave open, from the train images and channel names alone.

    Args:
        dataset: Where the cases are.
        cases: The train cases, or their ids; only headers are read.
        settings: What a person decided already.

    Raises:
        UsageError: The settings do not fit the data set.
    """
    notes = {key: "set by you" for key in sorted(settings.model_fields_set)}
    spacing = settings.spacing
    if spacing is None:
        spacing = _median_spacing(dataset, cases, settings.orientation)
        notes["spacing"] = "median of the train images, in mm"
    intensity = _intensities(dataset, settings, notes)
    if dataset.remarks:
        notes["data"] = " ".join(dataset.remarks)
    values = settings.model_dump() | {
        "spacing": spacing,
        "intensity": intensity,
        "notes": notes,
    }
    try:
        return Plan(**values)
    except ValidationError as error:
        raise UsageError(f"prepare: {_first_message(error)}") from error


def _median_spacing(dataset: Dataset, cases: Iterable[Case | str], orientation: str) -> Spacing:
    spacings = []
    for case in cases:
        files = (case if isinstance(case, Case) else dataset.case(case)).images
        header = read_header(files[0])
        turned = turn_affine(
            header.affine, header.shape, *axes_and_flips(header.affine, orientation)
        )
        spacings.append(affine_spacing(turned))
    if not spacings:
        raise UsageError("prepare: no train image to take the spacing from; set spacing.")
    x, y, z = (round(float(v), 6) for v in np.median(spacings, axis=0))
    return x, y, z


def _intensities(
    dataset: Dataset, settings: PlanSettings, notes: dict[str, str]
) -> tuple[Intensity, ...]:
    count = len(dataset.channel_names)
    asked = settings.intensity
    if isinstance(asked, str):
        return (asked,) * count
    if asked is not None:
        if len(asked) != count:
            raise UsageError(
                f"prepare: intensity has {len(asked)} entries for {count} channels "
                f"({', '.join(dataset.channel_names)}). Give one for each, or one for all."
            )
        return asked
    decided: list[Intensity]
    if settings.window is not None:
        notes["intensity"] = "a window is set"
        decided = ["window"] * count
    elif dataset.layout == "la_h5":
        notes["intensity"] = "these files are normalized already"
        decided = ["none"] * count
    else:
        notes["intensity"] = f"by the channel names: {', '.join(dataset.channel_names)}"
        decided = [_BY_CHANNEL_NAME.get(n.casefold(), "zscore") for n in dataset.channel_names]
    return tuple(decided)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write plan.json, whole or not at all."""
    write_text(Path(path), json.dumps(plan.model_dump(), indent=2) + "\n")


def load_plan(path: str | Path) -> Plan:
    """Read a plan.json.

    Raises:
        UsageError: It is missing or a value in it is wrong; the message names it.
    """
    path = Path(path)
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_message(error)}. Correct it.") from error


def _first_message(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]
