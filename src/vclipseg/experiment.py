"""The composition root: data, text, method, training and evaluation of one run, in one folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vclipseg.checkpoint import load_model, load_state, save_model, save_state
from vclipseg.config import Experiment
from vclipseg.console import Console
from vclipseg.data.batch import PatchSampler, made_ahead
from vclipseg.data.cache import PreparedCases, prepare, training_cases
from vclipseg.data.datasets import Dataset, Split, open_dataset, split_cases
from vclipseg.data.dicom_cases import shown_label
from vclipseg.data.plan import Plan, make_plan
from vclipseg.data.resident import Resident
from vclipseg.device import Machine, available_memory, is_out_of_memory
from vclipseg.errors import OutOfMemory, Stopped, UsageError
from vclipseg.evaluation import EvaluateSettings, evaluate, summarize, write_scores
from vclipseg.inference import PredictSettings, load
from vclipseg.methods.base import Loss, Method
from vclipseg.networks.text import text_vectors
from vclipseg.ranks import count, highest, is_first, launched, local_count, rank, wait
from vclipseg.runlog import RunLog
from vclipseg.runs import Prepared, Run, refuse_run
from vclipseg.training import TrainSettings, TrainState, make_machine, start, train

SMALL = 100
"""Up to so many cases are prepared in this process: starting others takes longer."""
IN_MEMORY = 8 * 2**30
"""Prepared training cases are held in a machine's memory up to this many bytes."""


def cache_home() -> Path:
    """`$VCLIPSEG_HOME`, else the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VCLIPSEG_HOME") or Path(caches) / "vclipseg")


def open_split(experiment: Experiment, root: Path, run: Run | None = None) -> tuple[Dataset, Split]:
    """The data set, and which of its cases the experiment trains on and tests on.

    For a `run` that began earlier, classes and people's decisions are those of that time.
    """
    s = experiment.data
    dataset = open_dataset(
        root,
        class_names=s.class_names,
        label_values=s.label_values,
        classes=run.classes if run else None,
        reviews=run.split.reviews if run and s.reviews else s.reviews,
    )
    split = split_cases(
        dataset,
        labeled=s.labeled,
        draw=s.draw,
        transductive=s.transductive,
        fold=s.fold,
        folds=s.folds,
    )
    return dataset, split


def prepare_data(
    experiment: Experiment,
    root: Path,
    console: Console,
    plan: Plan | None = None,
    workers: int = 0,
    run: Run | None = None,
) -> Prepared:
    """Open the data, split it, decide the plan where none is given, and prepare the training cases."""
    dataset, split = open_split(experiment, root, run)
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
        UsageError: there is a run in the folder, the method finds no unlabeled case, the run to start
            from is not finished, or CLIP cannot be loaded; all of it before the data are prepared.
    """
    refuse_run(folder)
    dataset, split = open_split(experiment, root)
    if not split.unlabeled and experiment.method.patches[1]:
        raise UsageError(
            f"{root}: no train case is unlabeled, but {experiment.method_name} learns from unlabeled "
            "images too. Put some into imagesUn, use fewer labels (--labeled N), or train on labels "
            "alone with --method supervised."
        )
    if experiment.train.init_from:
        finished_model(Path(experiment.train.init_from))
    text = text_vectors(experiment.text, dataset.class_names) if experiment.needs_text else None
    data = prepare_data(experiment, root, console, plan, workers)
    return Run.create(folder, experiment, data, text, command), data


def train_run(
    run: Run,
    cases: PreparedCases,
    console: Console,
    look: Callable[[TrainState], None] | None = None,
) -> None:
    """Train from the last checkpoint, or from the start, to the finished model.

    All ranks do; the first one writes.

    Args:
        run: its folder says what to train.
        cases: the prepared training cases.
        console: for progress.
        look: sees the state after each step and may change nothing in it; its time is not counted.

    Raises:
        Stopped: Ctrl-C or SIGTERM, on any rank; a checkpoint is saved.
        OutOfMemory: a step does not fit.
        UsageError: the run was begun with another number of ranks.
    """
    settings = run.experiment.train
    require_ranks(run)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    machine = make_machine(settings)
    state, log = last_state(run, machine, console)
    title = f"train {run.experiment.method_name}"
    with stop_signals() as stopped, console.bar(title, settings.steps, state.step) as advance:

        def on_step(state: TrainState, loss: Loss) -> None:
            log.add(loss)
            stop = highest(stopped())
            if look:
                with log.paused():
                    look(state)
            last = state.step == settings.steps
            if state.step % settings.log_every == 0 or last:
                row = log.row(state.step, state.optimizer.param_groups[0]["lr"])
                advance(state.step, describe_row(row, loss))
            if state.step % settings.checkpoint_every == 0 or last or stop:
                state.require_finite()
                log.write()
                saved = {**state.state_dict(), "log": log.state_dict()}
                if is_first():
                    save_state(run.state_path, saved)
                wait()  # a rank that goes on at once must find it
            if stop and not last:
                raise Stopped(
                    f"stopped at step {state.step} of {settings.steps}; go on with "
                    f"`vclipseg train --resume {run.folder}`",
                    130 if stop == signal.SIGINT else 75,
                )

        sampler = make_sampler(run, state.method, cases, machine.device)
        with (
            memory_errors_explained(run.experiment),
            made_ahead(sampler.batch, settings.batches) as batch_at,
        ):
            train(state, batch_at, settings, machine, on_step)
    log.close()
    if is_first():
        save_model(run.model_path, state.model(), run.model_description())


def last_state(run: Run, machine: Machine, console: Console) -> tuple[TrainState, RunLog]:
    """State and log as the last checkpoint holds them, or those before the first step."""
    settings = run.experiment.train
    saved = load_state(run.state_path) if run.state_path.is_file() else None
    method = run.make_method()
    if settings.init_from and not saved:
        console.note(start_from_run(method, Path(settings.init_from)))
    state = start(method, settings, machine)
    if saved:
        state.load_state_dict(saved)
    log = RunLog(run.folder, state.step, settings.tensorboard)
    if saved:
        log.load_state_dict(saved.get("log", {}))
    return state, log


@contextmanager
def memory_errors_explained(experiment: Experiment) -> Iterator[None]:
    """Within it, what the machine says when memory runs out becomes an `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"not enough memory for patches of {experiment.train.patch} with "
            f"{experiment.method.filters} filters; set train.patch or method.filters smaller"
        ) from error


def require_ranks(run: Run) -> None:
    """A run goes on with as many processes as it was begun with: its batches are theirs together.

    Raises:
        UsageError: they are not as many, or were started together and have not joined.
    """
    if launched() != count():
        raise UsageError(
            f"{launched()} processes were started together (WORLD_SIZE), to do what one does alone; "
            "torchrun is for `vclipseg train`"
        )
    if run.ranks != count():
        raise UsageError(
            f"{run.folder}: begun by {run.ranks} process(es), and now there are {count()}; go on with "
            "as many (torchrun --nnodes, --nproc-per-node), or start a new run"
        )


def finished_model(folder: Path) -> Path:
    """The model file of a run to start from."""
    earlier = Run.open(folder)
    if not earlier.model_path.is_file():
        raise UsageError(f"train.init_from: {folder} is not finished; resume it first")
    return earlier.model_path


def start_from_run(method: Method, folder: Path) -> str:
    """Give a method the weights of a finished run; returns what was done, in a sentence.

    Raises:
        UsageError: that run is not finished, or none of its weights fits.
    """
    weights, _ = load_model(finished_model(folder))
    taken = method.start_from(weights)
    if not any(weights[name].ndim > 1 for name in taken):  # counters and single numbers always fit
        raise UsageError(
            f"train.init_from: no weight of {folder} has a name and shape of this method's; "
            "is method.filters the same?"
        )
    return f"starts from {folder}: {len(taken)} of {len(weights)} weights"


def make_sampler(
    run: Run, method: Method, cases: PreparedCases, device: torch.device
) -> PatchSampler:
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
        rank=rank(),
        ranks=count(),
        resident=make_resident(experiment.train, device),
        spacing=run.plan.spacing,
    )


def make_resident(settings: TrainSettings, device: torch.device) -> Resident | None:
    """Where patches are cut, if not in memory."""
    asked = {"auto": device.type == "cuda", "always": True, "never": False}
    return Resident(device, available_memory(device) // 2) if asked[settings.resident] else None


def held_in_memory(
    read: Callable[[str], np.ndarray], case_ids: Sequence[str]
) -> Callable[[str], np.ndarray]:
    """`read`, asked once for each case as long as all arrays fit into this rank's share of `IN_MEMORY`."""
    held: dict[str, np.ndarray] = {}
    room = IN_MEMORY // local_count()

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

    Args:
        run: with a finished model.
        console: for progress.
        root: where the data are, if not where the run found them.
        settings: how to predict, if not as the run says.
        workers: threads that score.
        scoring: how to score, if not as the run says.

    Raises:
        UsageError: no test case has labels, or there is no finished model.
    """
    experiment = run.experiment
    scoring = scoring or experiment.evaluate
    root = run.data_root(root)
    dataset = open_dataset(root, classes=run.classes)
    case_ids = [c.case_id for c in dataset.cases if c.label and c.case_id in set(run.split.test)]
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
        protocol=run.marks.get("protocol", "strict"),
        seconds=round(time.monotonic() - began, 2),
    )
    summary["train_seconds"] = run.train_seconds
    summary["remarks"] = list(dataset.remarks)
    summary |= run.marks
    if changed := _changed(experiment, settings, scoring):
        summary["changed"] = changed
    predictions = {i: run.folder / "predictions" / f"{i}.nii.gz" for i in case_ids}
    references = {i: shown_label(dataset.case(i)) for i in case_ids}
    write_scores(
        run.folder,
        scores,
        summary,
        reference_files=references,  # type: ignore[arg-type]  # all have labels
        prediction_files=predictions,
    )
    return summary


def _changed(
    experiment: Experiment, predict: PredictSettings | None, scoring: EvaluateSettings
) -> dict[str, Any]:
    """Settings of an evaluation that are not those of the run, as `section.name`."""
    used = {"predict": predict or experiment.predict, "evaluate": scoring}
    own = {"predict": experiment.predict, "evaluate": experiment.evaluate}
    return {
        f"{section}.{name}": value
        for section, settings in used.items()
        for name, value in settings.model_dump(mode="json").items()
        if value != own[section].model_dump(mode="json")[name]
    }


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
