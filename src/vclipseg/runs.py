"""A run folder: what was asked for, on what, with what, and where its results are.

Its files are the interface to everything that reads a run (`docs/reference/run-folder.md`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vclipseg import __version__
from vclipseg.config import Experiment, build_experiment
from vclipseg.data.cache import PreparedCases
from vclipseg.data.datasets import Dataset, Split
from vclipseg.data.plan import Plan, save_plan
from vclipseg.environment import environment
from vclipseg.errors import DataError, UsageError
from vclipseg.files import write_text
from vclipseg.methods import method_class
from vclipseg.methods.base import Method, Task
from vclipseg.networks.text import TextVectors
from vclipseg.ranks import count
from vclipseg.records import settings_hash
from vclipseg.runlog import read_log

VERSION = 1
NO_EFFECT = {"train": ("save_memory", "threads", "log_every", "checkpoint_every", "tensorboard")}
"""Settings that change nothing in a result."""


@dataclass(frozen=True)
class Prepared:
    """A data set with its split, its plan, and the training cases prepared by it."""

    dataset: Dataset
    split: Split
    plan: Plan
    cases: PreparedCases


class Run:
    """A run folder and the experiment in it."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.description = description
        settings = description["settings"]
        method = {**settings["method"], "preset": settings["preset"]}
        values = {k: v for k, v in settings.items() if k != "preset"} | {"method": method}
        self.experiment = build_experiment(values, {}, source=str(folder / "experiment.json"))

    @classmethod
    def create(
        cls,
        folder: Path,
        experiment: Experiment,
        data: Prepared,
        text: TextVectors | None,
        command: Sequence[str],
    ) -> Run:
        """Write the description of a new run.

        Raises:
            UsageError: there is a run in the folder.
        """
        refuse_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "version": VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "name": experiment.name,
            "data": {
                "root": str(data.dataset.root.resolve()),
                "name": data.dataset.name,
                "layout": data.dataset.layout,
                "hash": data.split.hash,
                "remarks": list(data.dataset.remarks),
            },
            "class_names": list(data.dataset.class_names),
            "label_values": list(data.dataset.label_values),
            "channel_names": list(data.dataset.channel_names),
            "settings": experiment.to_json(),
            "settings_hash": identity(experiment, data.split, data.plan, text, ranks=count()),
            "plan": data.plan.model_dump(mode="json"),
            "text": text.origin if text else None,
            "transductive": data.split.transductive,
            "seed": experiment.train.seed,
            "ranks": count(),
        }
        save_plan(data.plan, folder / "plan.json")
        write_json(folder / "splits.json", data.split.to_json())
        train = experiment.train
        write_json(folder / "environment.json", environment(train.precision, train.threads))
        if text:
            text.save(folder / "text.safetensors")
        write_json(folder / "experiment.json", description)  # last: now it is a run
        return cls(folder, description)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            UsageError: it is none.
            DataError: its description is damaged.
        """
        path = folder / "experiment.json"
        if not path.is_file():
            raise UsageError(f"{folder}: not a run folder (it has no experiment.json)")
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if description["version"] != VERSION:
                raise DataError(
                    f"{path}: of version {description['version']}, this vclipseg reads {VERSION}; "
                    "open it with the version that made it"
                )
            return cls(folder, description)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: damaged ({error})") from error

    @property
    def model_path(self) -> Path:
        """The finished model."""
        return self.folder / "checkpoints" / "model.safetensors"

    @property
    def state_path(self) -> Path:
        """All that the training needs to go on."""
        return self.folder / "checkpoints" / "last.pt"

    @cached_property
    def split(self) -> Split:
        """The cases of this run, by role."""
        content = json.loads((self.folder / "splits.json").read_text(encoding="utf-8"))
        return Split.from_json(content)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and commit that it was started with."""
        return json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))

    @property
    def ranks(self) -> int:
        """Processes that train it together."""
        return self.description.get("ranks", 1)

    @property
    def plan(self) -> Plan:
        """The plan of this run."""
        return Plan.model_validate(self.description["plan"])

    @cached_property
    def text(self) -> TextVectors | None:
        """The text vectors of this run, with the origin that they had when it began."""
        origin = self.description["text"]
        if not origin:
            return None
        stored = TextVectors.load(self.folder / "text.safetensors", self.description["class_names"])
        return TextVectors(stored.vectors, origin)

    @property
    def settings_hash(self) -> str:
        """The run's identity."""
        return self.description["settings_hash"]

    @property
    def marks(self) -> dict[str, Any]:
        """What every result has to say of a model that was chosen on the test cases; else nothing."""
        names = ("protocol", "looks", "chosen_step")
        return {name: self.description[name] for name in names if name in self.description}

    @property
    def train_seconds(self) -> float:
        """Seconds of training, from the log."""
        rows = read_log(self.folder / "log.csv")
        return round(float(rows[-1]["seconds"]), 1) if rows else 0.0

    @property
    def classes(self) -> dict[str, int]:
        """Class name -> stored value, as when the run began: the data may order them anew since."""
        d = self.description
        return dict(zip(d["class_names"], d["label_values"], strict=True))

    def data_root(self, given: Path | None = None) -> Path:
        """Where the data are: `given`, else where they were when the run began."""
        return given or Path(self.description["data"]["root"])

    def make_method(self) -> Method:
        """The method with the initial weights that the seed gives."""
        experiment = self.experiment
        torch.manual_seed(experiment.train.seed)
        task = Task(
            in_channels=len(self.description["channel_names"]),
            class_names=tuple(self.description["class_names"]),
            total_steps=experiment.train.steps,
            text_vectors=torch.from_numpy(self.text.vectors) if self.text else None,
        )
        return method_class(experiment.method_name)(experiment.method, task)

    def model_description(self) -> dict[str, Any]:
        """What the model file says of itself; enough to predict with it anywhere."""
        d, s = self.description, self.description["settings"]
        keep = ("name", "class_names", "label_values", "channel_names", "plan", "text", "data")
        return {
            **{key: d[key] for key in keep},
            "method": s["method"],
            "preset": s["preset"],
            "predict": s["predict"],
            "patch": s["train"]["patch"],
            "steps": s["train"]["steps"],
            "weights": s["train"]["weights"],
            "settings_hash": d["settings_hash"],
            "vclipseg": __version__,
        }


def identity(
    experiment: Experiment,
    split: Split,
    plan: Plan,
    text: TextVectors | None,
    init_from: str | None = None,
    ranks: int = 1,
) -> str:
    """Twelve hex digits over all that decides a result: settings, data, plan, text vectors, ranks.

    Settings at their default are left out, so that a new setting does not make every earlier run
    another one. An earlier run that this one starts from counts with its own identity, which is
    read in its folder unless `init_from` says it.
    """
    settings = experiment.model_dump(mode="json", exclude_defaults=True)
    for section, names in NO_EFFECT.items():
        changed = settings.get(section, {})
        settings[section] = {k: v for k, v in changed.items() if k not in names}
    settings["method"]["name"] = experiment.method_name
    if experiment.train.init_from:
        earlier = Path(experiment.train.init_from)
        settings["train"]["init_from"] = init_from or Run.open(earlier).settings_hash
    return settings_hash(
        {
            "settings": settings,
            "data": split.hash,
            "plan": plan.model_dump(mode="json", exclude={"notes"}),
            "text": text.hash if text else None,
            **({"ranks": ranks} if ranks > 1 else {}),
        }
    )


def refuse_run(folder: Path) -> None:
    """Nothing that is there is overwritten.

    Raises:
        UsageError: there is a run in the folder.
    """
    if (folder / "experiment.json").exists():
        raise UsageError(
            f"{folder}: holds a run already. Go on with `vclipseg train --resume {folder}`, or "
            "choose another folder with --out."
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
