"""The composition root: data, text, method, training and evaluation of one run, in one folder.

What a run folder holds is its interface to everything that reads it (`docs/reference/run-folder.md`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vclipseg import __version__
from vclipseg.checkpoint import load_state, save_model, save_state
from vclipseg.config import Experiment, build_experiment
from vclipseg.console import Console
from vclipseg.data.batch import PatchSampler
from vclipseg.data.cache import PreparedCases, prepare, training_cases
from vclipseg.data.datasets import Dataset, Split, open_dataset, split_cases
from vclipseg.data.plan import Plan, make_plan, save_plan
from vclipseg.device import default_device, resolve_precision
from vclipseg.errors import DataError, Stopped, UsageError
from vclipseg.evaluation import EvaluateSettings, evaluate, summarize, write_scores
from vclipseg.inference import PredictSettings, load
from vclipseg.methods import method_class
from vclipseg.methods.base import Loss, Method, Task
from vclipseg.networks.text import TextVectors, text_vectors
from vclipseg.records import settings_hash
from vclipseg.runlog import RunLog, read_log
from vclipseg.scores import write_text
from vclipseg.training import TrainState, make_fabric, start, train

VERSION = 1
SMALL = 100
"""Up to so many cases are prepared in this process: starting others takes longer."""
IN_MEMORY = 8 * 2**30
"""Prepared training cases are held in memory up to this many bytes."""


@dataclass(frozen=True)
class Prepared:
    """A data set with its split, its plan, and the training cases prepared by it."""

    dataset: Dataset
    split: Split
    plan: Plan
    cases: PreparedCases


def cache_home() -> Path:
    """`$VCLIPSEG_HOME`, else the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VCLIPSEG_HOME") or Path(caches) / "vclipseg")


def open_split(experiment: Experiment, root: Path) -> tuple[Dataset, Split]:
    """The data set, and which of its cases the experiment trains on and tests on."""
    s = experiment.data
    dataset = open_dataset(root, class_names=s.class_names, label_values=s.label_values)
    split = split_cases(dataset, labeled=s.labeled, draw=s.draw, transductive=s.transductive)
    return dataset, split


def prepare_data(
    experiment: Experiment, root: Path, console: Console, plan: Plan | None = None, workers: int = 0
) -> Prepared:
    """Open the data, split it, decide the plan where none is given, and prepare the training cases."""
    dataset, split = open_split(experiment, root)
    plan = plan or make_plan(dataset, [*split.labeled, *split.unlabeled], experiment.prepare)
    wanted = training_cases(split)
    with console.bar("prepare", len(wanted)) as advance:
        cases = prepare(
            dataset,
            wanted,
            plan,
            cache_home() / "prepared",
            workers or (os.cpu_count() or 1 if len(wanted) > SMALL else 1),
            lambda done, total, case_id: advance(len(wanted) - total + done, case_id),
        )
        advance(len(wanted), "")
    return Prepared(dataset, split, plan, cases)


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
            },
            "class_names": list(data.dataset.class_names),
            "label_values": list(data.dataset.label_values),
            "channel_names": list(data.dataset.channel_names),
            "settings": experiment.to_json(),
            "settings_hash": settings_hash({**experiment.to_json(), "hash": data.split.hash}),
            "plan": data.plan.model_dump(mode="json"),
            "text": text.origin if text else None,
            "transductive": data.split.transductive,
            "seed": experiment.train.seed,
        }
        save_plan(data.plan, folder / "plan.json")
        write_json(folder / "splits.json", data.split.to_json())
        write_json(folder / "environment.json", environment(experiment))
        write_json(folder / "experiment.json", description)
        if text:
            text.save(folder / "text.safetensors")
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
            return cls(folder, json.loads(path.read_text(encoding="utf-8")))
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


def new_run(
    experiment: Experiment,
    root: Path,
    folder: Path,
    console: Console,
    command: Sequence[str] = (),
    plan: Plan | None = None,
    workers: int = 0,
) -> tuple[Run, Prepared]:
    """Make the text vectors, prepare the data and write the run folder; nothing is trained yet.

    Raises:
        UsageError: there is a run in the folder, the method finds no unlabeled case, or CLIP cannot
            be loaded; all of it before the data are prepared.
    """
    refuse_run(folder)
    dataset, split = open_split(experiment, root)
    if not split.unlabeled and method_class(experiment.method_name).patches[1]:
        raise UsageError(
            f"{root}: no train case is unlabeled, but {experiment.method_name} learns from unlabeled "
            "images too. Put some into imagesUn, use fewer labels (--labeled N), or train on labels "
            "alone with --method supervised."
        )
    text = text_vectors(experiment.text, dataset.class_names) if experiment.needs_text else None
    data = prepare_data(experiment, root, console, plan, workers)
    return Run.create(folder, experiment, data, text, command), data


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


def train_run(run: Run, cases: PreparedCases, console: Console) -> None:
    """Train from the last checkpoint, or from the start, to the finished model.

    Raises:
        Stopped: Ctrl-C or SIGTERM; a checkpoint is saved.
    """
    settings = run.experiment.train
    if settings.threads:
        torch.set_num_threads(settings.threads)
    fabric = make_fabric(settings)
    state = start(run.make_method(), settings, fabric)
    saved = load_state(run.state_path) if run.state_path.is_file() else None
    if saved:
        state.load_state_dict(saved)
    log = RunLog(run.folder, state.step, settings.tensorboard)
    if saved:
        log.load_state_dict(saved.get("log", {}))
    title = f"train {run.experiment.method_name}"
    with stop_signals() as stopped, console.bar(title, settings.steps, state.step) as advance:

        def on_step(state: TrainState, loss: Loss) -> None:
            log.add(loss)
            last = state.step == settings.steps
            if state.step % settings.log_every == 0 or last:
                row = log.row(state.step, state.optimizer.param_groups[0]["lr"])
                advance(state.step, describe_row(row, loss))
            if state.step % settings.checkpoint_every == 0 or last or stopped():
                log.write()
                save_state(run.state_path, {**state.state_dict(), "log": log.state_dict()})
            if stopped() and not last:
                raise Stopped(
                    f"stopped at step {state.step} of {settings.steps}; go on with "
                    f"`vclipseg train --resume {run.folder}`",
                    130 if stopped() == signal.SIGINT else 75,
                )

        sampler = make_sampler(run, state.method, cases)
        train(state, sampler.batch, settings, fabric, on_step)
    log.close()
    save_model(run.model_path, state.weights(), run.model_description())


def make_sampler(run: Run, method: Method, cases: PreparedCases) -> PatchSampler:
    """The patches of a run; they are a function of its seed."""
    experiment = run.experiment
    return PatchSampler(
        image=held_in_memory(cases.image, cases.case_ids),
        labels=held_in_memory(cases.labels, run.split.labeled),
        labeled=run.split.labeled,
        unlabeled=run.split.unlabeled,
        patch=experiment.train.patch,
        patches=method.patches_at,
        augment=experiment.augment,
        seed=experiment.train.seed,
    )


def held_in_memory(
    read: Callable[[str], np.ndarray], case_ids: Sequence[str]
) -> Callable[[str], np.ndarray]:
    """`read`, asked once for each case as long as all arrays fit into `IN_MEMORY`."""
    held: dict[str, np.ndarray] = {}
    room = IN_MEMORY

    def array(case_id: str) -> np.ndarray:
        nonlocal room
        if case_id in held:
            return held[case_id]
        value = read(case_id)
        if value.nbytes <= room:
            room -= value.nbytes
            held[case_id] = value
        return value

    return array


def evaluate_run(
    run: Run,
    console: Console,
    root: Path | None = None,
    settings: PredictSettings | None = None,
    workers: int = 1,
    scoring: EvaluateSettings | None = None,
) -> dict[str, Any]:
    """Score the finished model on the test cases that have labels; returns metrics.json's content.

    Raises:
        UsageError: no test case has labels, or there is no finished model.
    """
    experiment = run.experiment
    s = experiment.data
    scoring = scoring or experiment.evaluate
    root = run.data_root(root)
    dataset = open_dataset(root, class_names=s.class_names, label_values=s.label_values)
    case_ids = [c.case_id for c in dataset.test if c.label and c.case_id in set(run.split.test)]
    if not case_ids:
        raise UsageError(f"{root}: no test case has a label file, so there is nothing to score")
    predictor = load(run.folder, settings)
    began = time.monotonic()
    with console.bar("evaluate", len(case_ids)) as advance:
        scores = evaluate(
            predictor.predict,
            dataset,
            case_ids,
            scoring,
            lambda done, total, case_id: advance(done, case_id),
            save_to=run.folder / "predictions",
            workers=workers,
        )
    summary = summarize(
        scores,
        scoring,
        weights=experiment.train.weights,
        protocol="strict",
        seconds=round(time.monotonic() - began, 2),
    )
    summary["train_seconds"] = train_seconds(run)
    predictions = {i: run.folder / "predictions" / f"{i}.nii.gz" for i in case_ids}
    references = {i: dataset.case(i).label for i in case_ids}
    write_scores(
        run.folder,
        scores,
        summary,
        reference_files=references,  # type: ignore[arg-type]  # all have labels
        prediction_files=predictions,
    )
    return summary


def train_seconds(run: Run) -> float:
    """Seconds of training, from the log."""
    rows = read_log(run.folder / "log.csv")
    return round(float(rows[-1]["seconds"]), 1) if rows else 0.0


def describe_row(row: dict[str, float], loss: Loss) -> str:
    """The terms of a logged row in a few words."""
    return "  ".join(f"{name} {row[name]:.3f}" for name in ("total", *loss))


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within it, Ctrl-C and SIGTERM are remembered instead of ending the process at once.

    A second Ctrl-C ends it as usual.
    """
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
    except ValueError:  # not in the main thread: nothing to catch there
        pass
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(experiment: Experiment) -> dict[str, Any]:
    """Versions, device and commit: what a record needs to be believed."""
    import platform

    device = default_device()
    packages = ("torch", "numpy", "monai", "nibabel", "SimpleITK", "transformers")
    return {
        "vclipseg": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "precision": resolve_precision(experiment.train.precision, device.type),
        "threads": experiment.train.threads or torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": commit(),
    }


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
