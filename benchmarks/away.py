"""Train on a machine that has torch, numpy and pydantic alone: one with a GPU and nothing else, say.

    python benchmarks/away.py pack recipes/paper/la-4-vclipseg.toml --data LA --out away    # at home
    python benchmarks/away.py train away --minutes 9                                        # there
    python benchmarks/away.py finish away                                                   # at home
    vclipseg evaluate away/run

`pack` makes the run folder away/run and, beside it, what the training reads. `train` needs the rest of `away`
and this repository, installed or not (PYTHONPATH=src); when its minutes are over, it has saved what it needs
to go on.
`finish` puts the model into the run folder, which is then one like any other.

Where only small files can be sent, `pack --part-mib 40` makes folders cases-1, cases-2, ... of that size, and
`train --part-mib 15` leaves the weights in float16 as model-1.pt, model-2.pt, ...
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vclipseg.checkpoint import load_state, save_state
from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import PatchSampler, made_ahead
from vclipseg.data.resident import Resident
from vclipseg.device import available_memory
from vclipseg.environment import environment
from vclipseg.errors import UsageError
from vclipseg.files import write_text
from vclipseg.methods import method_class
from vclipseg.methods.base import Loss, Method, Task
from vclipseg.runlog import RunLog
from vclipseg.training import TrainSettings, TrainState, make_machine, start, train


class TimeIsUp(Exception):
    """A checkpoint is saved."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("recipe", type=Path)
    packing.add_argument("--data", type=Path, required=True)
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    packing.add_argument("--part-mib", type=float, default=float("inf"))
    training = verbs.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--minutes", type=float, default=float("inf"))
    training.add_argument("--part-mib", type=float)
    verbs.add_parser("finish").add_argument("folder", type=Path)
    a = parser.parse_args()
    if a.verb == "pack":
        pack(a.recipe, a.data, a.out, a.set, a.part_mib)
    elif a.verb == "train":
        train_away(a.folder, a.minutes, a.part_mib)
    else:
        finish(a.folder)


def pack(recipe: Path, root: Path, out: Path, overrides: list[str], part_mib: float) -> None:
    """Write a new run folder, and what training reads: `job.json` and a file a case, in folders."""
    from vclipseg.config import load_experiment
    from vclipseg.console import Console
    from vclipseg.experiment import new_run

    experiment = load_experiment(recipe, overrides)
    if experiment.train.init_from:
        raise UsageError(
            "train.init_from: a second stage cannot be packed; train it where the first one is"
        )
    run, data = new_run(experiment, root, out / "run", Console())
    part, size = 1, 0.0
    for case_id in data.cases.case_ids:
        arrays = coded(data.cases.image(case_id))
        if case_id in data.split.labeled:
            arrays["labels"] = data.cases.labels(case_id)
        file = out / "cases" / f"{case_id}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez_compressed(file, **arrays)
        mib = file.stat().st_size / 2**20
        if size and size + mib > part_mib:
            part, size = part + 1, 0.0
        size += mib
        (out / f"cases-{part}").mkdir(exist_ok=True)
        file.rename(out / f"cases-{part}" / file.name)
    (out / "cases").rmdir()
    job = {
        **{key: run.description["settings"][key] for key in ("train", "augment", "method")},
        "channels": len(run.description["channel_names"]),
        "class_names": run.description["class_names"],
        "text": run.text.vectors.tolist() if run.text else None,
        "labeled": data.split.labeled,
        "unlabeled": data.split.unlabeled,
        "spacing": data.plan.spacing,
    }
    write_text(out / "job.json", json.dumps(job) + "\n")


def coded(image: np.ndarray) -> dict[str, np.ndarray]:
    """An image without loss, and small where it has few values, as one of 8 bits that was normalized."""
    values, codes = np.unique(image, return_inverse=True)
    kind = np.uint8 if len(values) <= 2**8 else np.uint16
    if len(values) > 2**16:
        return {"image": image}
    return {"values": values, "codes": codes.reshape(image.shape).astype(kind)}


def decoded(path: Path) -> dict[str, np.ndarray]:
    """`image` float32 (C, X, Y, Z) and, of a labeled case, `labels` uint8 (X, Y, Z)."""
    with np.load(path) as file:
        arrays = dict(file)
    if "codes" in arrays:
        arrays["image"] = arrays.pop("values")[arrays.pop("codes")]
    return arrays


def make_method(job: dict[str, Any], settings: TrainSettings) -> Method:
    """As `Run.make_method` does."""
    torch.manual_seed(settings.seed)
    cls = method_class(job["method"]["name"])
    text = None if job["text"] is None else torch.tensor(job["text"], dtype=torch.float32)
    task = Task(job["channels"], tuple(job["class_names"]), settings.steps, text)
    return cls(cls.Settings.model_validate(job["method"]), task)


def train_away(folder: Path, minutes: float, part_mib: float | None = None) -> None:
    """Go on from the last checkpoint; at the end `model.pt` holds the weights, or its parts do."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    settings = TrainSettings.model_validate({**job["train"], "tensorboard": False})
    end = time.monotonic() + 60 * minutes
    machine, checkpoint = make_machine(settings), folder / "state.pt"
    state = start(make_method(job, settings), settings, machine)
    saved = load_state(checkpoint) if checkpoint.is_file() else {}
    if saved:
        state.load_state_dict(saved)
    log = RunLog(folder, state.step)
    log.load_state_dict(saved.get("log", {}))

    def on_step(state: TrainState, loss: Loss) -> None:
        log.add(loss)
        last, late = state.step == settings.steps, time.monotonic() > end
        if state.step % settings.log_every == 0 or last:
            row = log.row(state.step, state.optimizer.param_groups[0]["lr"])
            print(state.step, {name: round(row[name], 4) for name in ("total", *loss)}, flush=True)
        if state.step % settings.checkpoint_every == 0 or last or late:
            state.require_finite()
            log.write()
            save_state(checkpoint, {**state.state_dict(), "log": log.state_dict()})
        if late and not last:
            raise TimeIsUp

    write_text(
        folder / "environment.json", json.dumps(environment(settings.precision, settings.threads))
    )
    cases = {path.stem: decoded(path) for path in folder.glob("cases-*/*.npz")}
    sampler = PatchSampler(
        image=lambda case_id: cases[case_id]["image"],
        labels=lambda case_id: cases[case_id]["labels"],
        labeled=job["labeled"],
        unlabeled=job["unlabeled"],
        patch=settings.patch,
        patches=state.method.patches_at,
        augment=AugmentSettings.model_validate(job["augment"]),
        seed=settings.seed,
        resident=Resident(machine.device, available_memory(machine.device) // 2)
        if machine.device.type == "cuda"
        else None,
        spacing=tuple(job["spacing"]),
    )
    try:
        with made_ahead(sampler.batch, settings.batches) as batch_at:
            train(state, batch_at, settings, machine, on_step)
    except TimeIsUp:
        print(f"{state.step} of {settings.steps} steps; run it again to go on")
        return
    if part_mib is None:
        save_state(folder / "model.pt", {"weights": state.model()})
        return
    for number, part in enumerate(in_parts(state.model(), part_mib), start=1):
        save_state(folder / f"model-{number}.pt", {"weights": part})


def in_parts(weights: dict[str, Tensor], part_mib: float) -> list[dict[str, Tensor]]:
    """Weights in float16, in parts of at most so many MiB; one that is larger is a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    left = part_mib * 2**20
    for name, value in weights.items():
        small = value.half() if value.is_floating_point() else value
        if parts[-1] and small.nbytes > left:
            parts.append({})
            left = part_mib * 2**20
        parts[-1][name] = small.cpu().contiguous()
        left -= small.nbytes
    return parts


def finish(folder: Path) -> None:
    """Complete the run folder."""
    from vclipseg.checkpoint import save_model
    from vclipseg.runs import Run

    run = Run.open(folder / "run")
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.pt")):
        weights |= load_state(file)["weights"]
    whole = {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    save_model(run.model_path, whole, run.model_description())
    for name in ("log.csv", "environment.json"):
        shutil.copyfile(folder / name, run.folder / name)
    if (folder / "state.pt").is_file():
        shutil.copyfile(folder / "state.pt", run.state_path)


if __name__ == "__main__":
    main()
