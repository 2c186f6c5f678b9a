"""The main job end to end on made-up anatomy: what `vclipseg demo` runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from vclipseg.commands import describe, run_check, summary_lines
from vclipseg.compare import compare_runs
from vclipseg.config import Experiment, build_experiment
from vclipseg.console import Console
from vclipseg.data.phantom import make_phantom
from vclipseg.errors import DataError, UsageError
from vclipseg.experiment import evaluate_run, new_run, train_run
from vclipseg.inference import load
from vclipseg.report import write_report
from vclipseg.runs import Run
from vclipseg.scans import predict_scans

CASES: dict[str, Any] = {"labeled": 4, "unlabeled": 30, "test": 10}
REDUCED_CASES: dict[str, Any] = {"labeled": 2, "unlabeled": 3, "test": 2}
SETTINGS: dict[str, Any] = {
    "name": "demo",
    "text": {"source": "orthogonal"},
    "prepare": {"spacing": [2.0, 2.0, 2.0]},
    "augment": {"intensity": 0.2},
    "train": {"steps": 600, "patch": [48, 48, 32], "checkpoint_every": 50},
    "evaluate": {"nsd_tolerance_mm": 2.0},
}
REDUCED: dict[str, Any] = {"steps": 4, "patch": [32, 32, 32], "tensorboard": False}


def run_demo(out: Path, console: Console, *, reduced: bool = False, seed: int = 0) -> str:
    """Phantom, check, supervised and VCLIPSeg with equal budget, evaluation, a mask, the report.

    Returns:
        The comparison and the next command to try, for a terminal.

    Raises:
        UsageError: `out` holds something that is not an earlier demo.
    """
    clear(out)
    phantom = make_phantom(out / "phantom", **(REDUCED_CASES if reduced else CASES))
    console.note(
        f"made {phantom}: anatomy that nobody has; the text vectors are a control, not CLIP"
    )
    supervised = demo_run("supervised", phantom, out, console, reduced, seed)
    ours = demo_run("vclipseg", phantom, out, console, reduced, seed)
    scan = sorted((phantom / "imagesTs").iterdir())[0]
    mask = out / "mask.nii.gz"
    predict_scans(load(ours.folder), [scan], mask, console)
    report = write_report([ours.folder, supervised.folder], out / "report.html")
    return "\n".join([
        "",
        compare_runs(ours.folder, supervised.folder).text(),
        "",
        f"mask:   {mask}",
        f"report: {report}",
        "next:   vclipseg check YOUR_SCANS, then vclipseg train YOUR_SCANS",
        f"        vclipseg predict {ours.folder} {scan} -o mask.nii.gz",
    ])  # fmt: skip


def demo_run(
    method: str, phantom: Path, out: Path, console: Console, reduced: bool, seed: int
) -> Run:
    """Train and evaluate one method; both have the same data, patches, steps and schedule."""
    experiment = demo_experiment(method, reduced, seed)
    findings = run_check(phantom, experiment.data, console)
    if not findings.trustworthy:
        raise DataError("\n".join(findings.lines()))
    run, prepared = new_run(experiment, phantom, out / method, console, ["vclipseg", "demo"])
    console.note(describe(run))
    train_run(run, prepared.cases, console)
    summary = evaluate_run(run, console, workers=os.cpu_count() or 1)
    console.note("\n".join(f"  {line}" for line in summary_lines(summary)))
    return run


def demo_experiment(method: str, reduced: bool = False, seed: int = 0) -> Experiment:
    """The settings of the demo."""
    filters = 2 if reduced else 8
    values = {**SETTINGS, "method": {"name": method, "preset": "robust", "filters": filters}}
    values["train"] = {**SETTINGS["train"], **(REDUCED if reduced else {}), "seed": seed}
    return build_experiment(values, {}, source="demo")


def clear(out: Path) -> None:
    """Remove what an earlier demo left; anything else is left alone and refused."""
    if not out.exists():
        return
    known = {"phantom", "supervised", "vclipseg", "mask.nii.gz", "report.html"}
    others = [path.name for path in out.iterdir() if path.name not in known]
    if others:
        raise UsageError(
            f"{out}: holds other files ({others[0]}); choose another folder with --out"
        )
    for name in known - {"phantom"}:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
