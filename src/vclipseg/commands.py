"""The verbs as functions: what the command line does, callable from Python."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vclipseg.config import DataSettings, Experiment, load_experiment, overridden
from vclipseg.console import Console
from vclipseg.data.cases import named_labels
from vclipseg.data.check import check_dataset
from vclipseg.data.datasets import open_dataset
from vclipseg.data.findings import Findings
from vclipseg.data.fix import fix_copy
from vclipseg.data.plan import Plan, load_plan, make_plan, save_plan
from vclipseg.defaults import own_data_defaults
from vclipseg.errors import DataError, UsageError
from vclipseg.evaluation import evaluate_folder, summarize, write_scores
from vclipseg.experiment import evaluate_run, new_run, open_split, prepare_data, train_run
from vclipseg.inference import Predictor, load
from vclipseg.networks.text import cosine_matrix, text_vectors
from vclipseg.ranks import in_turns, is_first, joined
from vclipseg.report import write_report
from vclipseg.runs import Run
from vclipseg.scans import predict_scans


def resolve_train(
    recipe: Path | None, data: Path | None, overrides: Sequence[str], plan: Plan | None = None
) -> tuple[Experiment, Path]:
    """What `vclipseg train [RECIPE] --data FOLDER` means: the experiment and the data folder.

    Without a recipe, patch, width and length are decided from the data and the machine.
    """
    if recipe is not None and (recipe.is_dir() or recipe.suffix.lower() == ".csv"):
        recipe, data = None, data or recipe
    if data is None:
        raise UsageError("no data: give the folder of the data set with --data FOLDER")
    if recipe is not None:
        return load_experiment(recipe, overrides), data
    first = load_experiment(None, overrides)
    names, values = first.data.class_names, first.data.label_values
    dataset = open_dataset(data, class_names=names, label_values=values)
    plan = plan or make_plan(dataset, dataset.train, first.prepare)
    return load_experiment(None, overrides, own_data_defaults(dataset, plan)), data


def default_folder(experiment: Experiment) -> Path:
    """`runs/NAME-METHOD-PRESET-sSEED`."""
    parts = (experiment.name, experiment.method_name, experiment.preset)
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    return Path("runs") / f"{name}-s{experiment.train.seed}"


def train_new(
    experiment: Experiment,
    data: Path,
    folder: Path,
    console: Console,
    *,
    check: bool = True,
    plan: Plan | None = None,
    workers: int = 0,
    command: Sequence[str] = (),
) -> Run:
    """Check the data, prepare them, train, evaluate where test labels are, report.

    Of several ranks the first checks, writes the run folder, evaluates and reports; the others train with it.
    """
    with joined():
        with in_turns():
            if is_first():
                if check:
                    require_trustworthy(experiment, data, console)
                run, prepared = new_run(experiment, data, folder, console, command, plan, workers)
                console.note(describe(run))
            else:
                run = Run.open(folder)
                prepared = prepare_data(run.experiment, data, console, run.plan, workers)
        train_run(run, prepared.cases, console)
    return finish(run, console) if is_first() else run


def resume(folder: Path, console: Console, data: Path | None = None, workers: int = 0) -> Run:
    """Go on with a run that was stopped."""
    run = Run.open(folder)
    root = run.data_root(data)
    _, split = open_split(run.experiment, root, run)
    if split.hash != run.split.hash:
        raise DataError(
            f"{root}: the data are not those that {folder} was started with (hash "
            f"{split.hash[:19]}..., was {run.split.hash[:19]}...); start a new run"
        )
    with joined():
        with in_turns():
            prepared = prepare_data(run.experiment, root, console, run.plan, workers, run)
        train_run(run, prepared.cases, console)
    return finish(run, console, data) if is_first() else run


def finish(run: Run, console: Console, data: Path | None = None) -> Run:
    """Evaluate where test cases have labels, then write the report."""
    dataset = open_dataset(run.data_root(data), classes=run.classes)
    if any(case.label and case.case_id in run.split.test for case in dataset.cases):
        evaluate_run(run, console, data)
    write_report([run.folder], data_root=data)
    return run


def require_trustworthy(experiment: Experiment, data: Path, console: Console) -> None:
    """Stop where training could not trust the data.

    Raises:
        DataError: with the problems found.
    """
    findings = run_check(data, experiment.data, console)
    errors = [p for p in findings.problems if p.severity == "error"]
    if errors:
        shown = "\n".join(f"  {p.file or p.case_id}: {p.message}" for p in errors[:10])
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise DataError(
            f"{data}: {len(errors)} problem(s) that training could not trust:\n{shown}{more}\n"
            f"`vclipseg check {data}` shows all; --no-check trains all the same"
        )
    warnings = len(findings.problems)
    if warnings:
        console.note(f"check: {warnings} warning(s); `vclipseg check {data}` shows them")


def run_check(folder: Path, names: DataSettings, console: Console, workers: int = 0) -> Findings:
    """`check_dataset` with a progress bar."""
    with console.bar("check") as advance:
        return check_dataset(
            folder,
            class_names=names.class_names,
            label_values=names.label_values,
            workers=workers or None,
            on_progress=lambda done, total, word: advance(done, word, total),
        )


def check(
    folder: Path, fix: Path | None, overrides: Sequence[str], console: Console, workers: int
) -> tuple[Findings, list[str]]:
    """Check a data set and, with `fix`, write a mended copy and check that."""
    names = load_experiment(None, overrides).data
    findings = run_check(folder, names, console, workers)
    lines = findings.lines()
    if fix:
        mended = fix_copy(findings, fix)
        findings = run_check(fix, names, console, workers)
        lines += ["", f"{len(mended)} mended in the copy {fix}:", *findings.lines()]
    elif findings.trustworthy:
        lines.append(f"next: vclipseg train {folder}")
    return findings, lines


def prepare_only(
    data: Path, plan_path: Path, overrides: Sequence[str], console: Console, workers: int
) -> dict[str, Any]:
    """Decide the plan, or take an edited one, and fill the cache."""
    experiment = load_experiment(None, overrides)
    if plan_path.is_file():
        plan = load_plan(plan_path)
        console.note(f"{plan_path}: plan taken as it is")
    else:
        names, values = experiment.data.class_names, experiment.data.label_values
        dataset = open_dataset(data, class_names=names, label_values=values)
        plan = make_plan(dataset, dataset.train, experiment.prepare)
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan, plan_path)
    prepared = prepare_data(experiment, data, console, plan, workers)
    content = plan.model_dump(mode="json")
    return {"plan": str(plan_path), "cases": len(prepared.cases.case_ids), **content}


def evaluate(
    run: Path,
    data: Path | None,
    references: Path | None,
    overrides: Sequence[str],
    console: Console,
    workers: int,
) -> dict[str, Any]:
    """Score a run on its test cases, or a folder of masks against a folder of references."""
    settings = load_experiment(None, overrides)
    if references:
        names = settings.data.class_names
        if names is None:
            raise UsageError(
                "--references needs the class names: --set 'data.class_names=[\"background\", ...]'"
            )
        values = settings.data.label_values
        scores = evaluate_folder(run, references, names, settings.evaluate, label_values=values)
        summary = summarize(scores, settings.evaluate)
        reference_files, prediction_files = (dict(named_labels(f)) for f in (references, run))
        write_scores(
            run,
            scores,
            summary,
            reference_files=reference_files,
            prediction_files=prediction_files,
        )
        return summary
    opened = Run.open(run)
    own = opened.experiment
    predict = overridden(own.predict, overrides, "predict")
    scoring = overridden(own.evaluate, overrides, "evaluate")
    return evaluate_run(opened, console, data, predict, workers, scoring)


def predict(
    model: Path,
    scans: Sequence[Path],
    output: Path | None,
    console: Console,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    probabilities: bool = False,
    dicom: str | None = None,
    codes: Path | None = None,
) -> list[Path]:
    """Masks of scans and folders of scans."""
    return predict_scans(
        _predictor(model, overrides),
        scans,
        output,
        console,
        overwrite=overwrite,
        probabilities=probabilities,
        dicom=dicom,
        codes=codes,
    )


def export(
    run: Path,
    out: Path,
    kind: str | None = None,
    overrides: Sequence[str] = (),
    *,
    licence: str,
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """A model as one .onnx file or as a MONAI bundle; what it says of itself, and how to use it."""
    kind = kind or ("onnx" if out.suffix == ".onnx" else "monai")
    if kind not in ("onnx", "monai"):
        raise UsageError(f"--format {kind}: there are onnx and monai")
    predictor = _predictor(run, overrides)
    if kind == "onnx":
        from vclipseg.export import export_onnx

        result = export_onnx(predictor, run, out, licence=licence, overwrite=overwrite)
        return result, [str(out), f"next: python -m vclipseg.lite {out} SCAN.nii.gz -o mask.nii.gz"]
    from vclipseg.bundle import export_bundle

    result = export_bundle(predictor, run, out, licence=licence, overwrite=overwrite)
    return result, [str(out)]


def _predictor(model: Path, overrides: Sequence[str]) -> Predictor:
    """A model, with overrides of how it predicts."""
    load_experiment(None, overrides)  # refuses unknown keys
    predictor = load(model)
    settings = overridden(predictor.settings, overrides, "predict")
    return Predictor(predictor.method, predictor.description, settings)


def prompts(
    classes: Sequence[str], out: Path | None, overrides: Sequence[str], overwrite: bool
) -> tuple[dict[str, Any], list[str]]:
    """The text vectors of classes, their cosines, and a file of them if asked."""
    if len(classes) == 1 and Path(classes[0]).is_dir():
        classes = open_dataset(Path(classes[0])).class_names
    if out and out.exists() and not overwrite:
        raise UsageError(f"{out}: exists already; give --overwrite or another --out")
    settings = load_experiment(None, overrides).text
    text = text_vectors(settings, classes)
    cosines = cosine_matrix(text.vectors)
    if out:
        text.save(out)
    width = max(map(len, classes))
    lines = [f"{text.label}: {len(classes)} x {text.vectors.shape[1]}, {text.hash}"]
    lines += [f"  {prompt}" for prompt in text.origin.get("prompts", [])]
    lines += ["cosines"]
    lines += [
        f"  {name:{width}}  " + "  ".join(f"{value:6.3f}" for value in row)
        for name, row in zip(classes, cosines, strict=True)
    ]
    if out:
        lines.append(f"written: {out}")
    result = {"classes": list(classes), "origin": text.origin, "cosines": cosines.tolist()}
    return result, lines


def train_result(run: Run) -> tuple[dict[str, Any], list[str]]:
    """What a finished run says: scores if there are any, where things are, what to do next."""
    result: dict[str, Any] = {"run": str(run.folder), "model": str(run.model_path)}
    lines = []
    metrics = run.folder / "metrics.json"
    if metrics.is_file():
        result["metrics"] = json.loads(metrics.read_text(encoding="utf-8"))
        lines += summary_lines(result["metrics"])
    lines += [
        f"report: {run.folder / 'report.html'}",
        f"next: vclipseg predict {run.folder} SCAN.nii.gz -o mask.nii.gz",
    ]
    return result, lines


def describe(run: Run) -> str:
    """What is about to run, in two lines."""
    e, split = run.experiment, run.split
    text = f", text {run.text.label}" if run.text else ""
    reviewed = len(set(split.reviews) & set(split.labeled))
    reviews = f" ({reviewed} reviewed)" if reviewed else ""
    line = (
        f"{e.method_name} ({e.preset}{text}): {len(split.labeled)} labeled{reviews}, "
        f"{len(split.unlabeled)} unlabeled, {len(split.test)} test; {e.train.steps} steps of "
        f"{'x'.join(map(str, e.train.patch))} patches, {e.method.filters} filters -> {run.folder}"
    )
    if run.ranks > 1:
        line += (
            f"\n{run.ranks} processes with {sum(e.method.patches)} patches each step; train.lr is not "
            f"scaled to that, it stays {e.train.lr:g}"
        )
    if split.transductive:
        line = "TRANSDUCTIVE: the test images are trained on as unlabeled ones\n" + line
    return line


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The headline of metrics.json for a terminal."""
    lines = []
    for metric, label, scale in (
        ("dice", "Dice", 1),
        ("jaccard", "Jaccard", 1),
        ("hd95_mm", "95HD mm", 1),
        ("assd_mm", "ASSD mm", 1),
        ("nsd", "NSD", 1),
    ):
        value = summary["mean"][metric]
        if value["mean"] is None:
            continue
        interval = ""
        if value["low"] is not None:
            interval = f" [{value['low']:.3f}, {value['high']:.3f}]"
        lines.append(f"{label:8} {value['mean'] * scale:.3f}{interval}")
    lines.append(
        f"{'failures':8} {summary['failures']} empty predictions in {summary['num_cases']} cases"
    )
    return lines + [f"of the data: {remark}" for remark in summary.get("remarks", [])]
