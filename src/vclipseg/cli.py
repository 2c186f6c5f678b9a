"""The command line: verbs and their options. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="vclipseg",
    help="Train a 3D segmentation model from a handful of annotated scans and many that nobody annotated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

importers = typer.Typer(
    help="Public data sets, from the files that their archives serve.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(importers, name="import")

DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the data set.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a setting: key=value, such as train.steps=500.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
WorkersOption = Annotated[int, typer.Option(help="Processes for reading; 0: one a core.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def main() -> None:
    """Run the command line; errors a person can act on become one message and an exit code."""
    from vclipseg.errors import Stopped, VclipsegError, refusal

    try:
        # what a verb gave typer.Exit, or 130 after Ctrl-C
        code = app(prog_name="vclipseg", standalone_mode=False)
    except Stopped as error:
        from vclipseg.ranks import is_first

        sys.exit(_fail(str(error), error.exit_code) if is_first() else error.exit_code)
    except VclipsegError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong options
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and (told := refusal(error)):
            sys.exit(_fail(str(told), told.exit_code))
        raise
    if code == 130:
        _fail("interrupted", code)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _print(value: Any, as_json: bool, lines: list[str]) -> None:
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        print("\n".join(lines))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for phantom, runs and report.")] = Path(
        "runs/demo"
    ),
    reduced: Annotated[
        bool, typer.Option(help="A few cases and steps, to try the machinery.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the trainings.")] = 0,
) -> None:
    """The main job end to end on made-up anatomy, in a few minutes on a CPU."""
    from vclipseg.console import Console
    from vclipseg.demo import run_demo

    print(run_demo(out, Console(), reduced=reduced, seed=seed))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of the data set, or a CSV file.")],
    fix: Annotated[
        Path | None, typer.Option(help="Write a mended copy here; the original is never changed.")
    ] = None,
    settings: SetOption = [],  # noqa: B006
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What is wrong with a data set, in mm, and what --fix can mend. Exit code 3: not to be trusted."""
    from vclipseg import commands
    from vclipseg.console import Console

    findings, lines = commands.check(folder, fix, settings, Console(quiet), workers)
    _print(findings.to_json(), as_json, lines)
    raise typer.Exit(0 if findings.trustworthy else 3)


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    plan: Annotated[
        Path, typer.Option(help="Plan to write, or to follow if it is there (edit it freely).")
    ] = Path("plan.json"),
    settings: SetOption = [],  # noqa: B006
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decide orientation, spacing, intensity and crop; prepare the training cases into the cache."""
    from vclipseg import commands
    from vclipseg.console import Console

    result = commands.prepare_only(data, plan, settings, Console(quiet), workers)
    lines = [f"{key}: {value}" for key, value in result.items()]
    _print(result, as_json, [*lines, f"next: vclipseg train {data} --plan {plan}"])


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (TOML), or the data folder itself.")
    ] = None,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/NAME-METHOD-... if left out.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Method, as `vclipseg info` lists them.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the method.")] = None,
    labeled: Annotated[int | None, typer.Option(help="Use the first N labeled cases only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    text: Annotated[
        str | None, typer.Option(help="clip, orthogonal, random, or a .safetensors of vectors.")
    ] = None,
    transductive: Annotated[
        bool, typer.Option(help="Train on the test images too, unlabeled.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="A plan.json from `vclipseg prepare`.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Train without checking the data.")
    ] = False,
    settings: SetOption = [],  # noqa: B006
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train, evaluate on the test cases if they have labels, and write the report. Ctrl-C is safe.

    Under torchrun, its processes train together.
    """
    from vclipseg import commands
    from vclipseg.console import Console
    from vclipseg.errors import UsageError
    from vclipseg.ranks import is_first

    console = Console(quiet or not is_first())
    options = {
        "method.name": method,
        "method.preset": preset,
        "data.labeled": labeled,
        "train.seed": seed,
        "text.source": text,
        "data.transductive": True if transductive else None,
    }
    given = [f"{key}={_toml(value)}" for key, value in options.items() if value is not None]
    if resume:
        if given or settings or recipe or out or plan:
            raise UsageError("--resume goes on with the run as it is; it takes only --data")
        run = commands.resume(resume, console, data, workers)
    else:
        followed = commands.load_plan(plan) if plan else None
        experiment, root = commands.resolve_train(recipe, data, [*given, *settings], followed)
        run = commands.train_new(
            experiment,
            root,
            out or commands.default_folder(experiment),
            console,
            check=not no_check,
            plan=followed,
            workers=workers,
            command=sys.argv,
        )
    if is_first():
        result, lines = commands.train_result(run)
        _print(result, as_json, lines)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Run folder; or a folder of predicted masks with --references.")
    ],
    data: DataOption = None,
    references: Annotated[
        Path | None, typer.Option(help="Folder of reference masks, to score a folder of masks.")
    ] = None,
    settings: SetOption = [],  # noqa: B006
    workers: WorkersOption = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Dice, Jaccard, 95HD, ASD and NSD of every test case and class, with intervals."""
    from vclipseg import commands
    from vclipseg.console import Console

    summary = commands.evaluate(run, data, references, settings, Console(quiet), workers)
    _print(summary, as_json, commands.summary_lines(summary))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    scans: Annotated[list[Path], typer.Argument(help="Scans or folders of scans.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File or folder; NAME_seg.nii.gz beside the scan."),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option(help="Also write class probabilities (4D).")
    ] = False,
    dicom: Annotated[
        str | None,
        typer.Option(
            help="Masks of DICOM series as DICOM: seg, seg-labelmap or rtstruct; seg if -o is NAME.dcm."
        ),
    ] = None,
    codes: Annotated[
        Path | None, typer.Option(help="JSON file of what classes are in SNOMED CT, for DICOM.")
    ] = None,
    settings: SetOption = [],  # noqa: B006
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Masks on the scans' own grids."""
    from vclipseg import commands
    from vclipseg.console import Console

    files = commands.predict(
        model,
        scans,
        output,
        Console(quiet),
        settings,
        overwrite=overwrite,
        probabilities=probabilities,
        dicom=dicom,
        codes=codes,
    )
    _print([str(file) for file in files], as_json, [str(file) for file in files])


@app.command()
def benchmark(
    grid: Annotated[Path, typer.Argument(help="Recipe (TOML) with a [grid] table.")],
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the record; results/NAME of the grid if left out."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    workers: Annotated[int, typer.Option(min=1, help="Cells at once.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a cell.")] = 1,
    redo: Annotated[
        list[str], typer.Option(help="Run this method's cells again, after a fix.")
    ] = [],  # noqa: B006
    reuse: Annotated[
        list[Path], typer.Option(help="Take runs that this other record has, if they are the same.")
    ] = [],  # noqa: B006
    paper_protocol: Annotated[
        bool,
        typer.Option(
            "--paper-protocol",
            help="Also keep the checkpoint that is best on the test set, as the literature does; "
            "in rows and sections of its own, marked.",
        ),
    ] = False,
    figure: Annotated[
        str | None,
        typer.Option(help="Draw the methods on this test case; `median`: that of the baseline."),
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Only make tables and figures anew; needs no data.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the cells and their state.")
    ] = False,
    cluster: Annotated[
        str | None, typer.Option(help="Run the cells by submitit: slurm, local or debug.")
    ] = None,
    cluster_set: Annotated[
        list[str], typer.Option(help="A parameter of submitit: key=value, as slurm_partition=gpu.")
    ] = [],  # noqa: B006
    settings: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Methods x label budgets x draws x folds x seeds to a record with tables and figures. Resumable."""
    from vclipseg.benchmark.command import run_verb
    from vclipseg.console import Console

    result, lines, complete = run_verb(
        grid,
        data,
        out,
        runs,
        Console(quiet),
        settings,
        workers=workers,
        threads=threads,
        redo=redo,
        reuse=reuse,
        paper_protocol=paper_protocol,
        figure=figure,
        tables=tables,
        dry_run=dry_run,
        cluster=cluster,
        cluster_set=cluster_set,
    )
    _print(result, as_json, lines)
    raise typer.Exit(0 if complete else 1)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Run folder.")],
    run_b: Annotated[Path, typer.Argument(help="Run folder on the same test cases.")],
    metric: Annotated[str, typer.Option(help="dice, jaccard, hd95_mm, assd_mm, nsd, ...")] = "dice",
    lcc: Annotated[bool, typer.Option(help="Of the largest component of each class.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Paired differences case by case, with a confidence interval and the Wilcoxon test."""
    from vclipseg.compare import compare_runs

    result = compare_runs(run_a, run_b, metric, lcc=lcc)
    _print(result.to_json(), as_json, [result.text()])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first is the one reported.")],
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(help="File; report.html in the first run folder.")
    ] = None,
) -> None:
    """One HTML file that opens offline: curves, tables, cases as slices and in 3D, provenance."""
    from vclipseg.report import write_report

    print(write_report(runs, out, data))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    out: Annotated[
        Path, typer.Argument(help="MODEL.onnx; for a MONAI bundle a folder, or BUNDLE.zip.")
    ],
    kind: Annotated[
        str | None, typer.Option("--format", help="onnx or monai; by the name if left out.")
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence of the model, written into it.")
    ] = "not stated",
    settings: SetOption = [],  # noqa: B006
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """One file that `python -m vclipseg.lite` runs without torch, or a MONAI bundle."""
    from vclipseg import commands

    result, lines = commands.export(run, out, kind, settings, licence=licence, overwrite=overwrite)
    _print(result, as_json, lines)


@app.command()
def serve(
    folder: Annotated[
        Path,
        typer.Argument(help="Run folder, or a folder of run folders.", metavar="RUN_OR_FOLDER"),
    ],
    data: DataOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None, typer.Option(help="Token to ask for; made up where one is needed.")
    ] = None,
    largest_mb: Annotated[
        int, typer.Option("--largest-mb", min=1, help="Largest upload in MiB.")
    ] = 512,
    quiet: QuietOption = False,
) -> None:
    """Look at runs, predict scans and review pseudo-labels in a browser; also for 3D Slicer."""
    from vclipseg.console import Console
    from vclipseg.serve.command import run_verb

    run_verb(folder, data, host, port, token, largest_mb, Console(quiet))


@app.command()
def prompts(
    classes: Annotated[
        list[str], typer.Argument(help="Class names, background first; or a data folder.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the vectors here (.safetensors).")] = None,
    text: Annotated[str | None, typer.Option(help="clip, orthogonal, random, or a file.")] = None,
    settings: SetOption = [],  # noqa: B006
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build, show and export the text vectors of class names, with their cosine matrix."""
    from vclipseg import commands

    if text:
        settings = [f"text.source={text}", *settings]
    result, lines = commands.prompts(classes, out, settings, overwrite)
    _print(result, as_json, lines)


@importers.command("pancreas-ct")
def import_pancreas_ct(
    dicom: Annotated[Path, typer.Argument(help="Folder of the series, PANCREAS_0001 and so on.")],
    labels: Annotated[Path, typer.Argument(help="Folder of label0001.nii.gz and so on.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the data set; new, or of an earlier import.")
    ],
    crop: Annotated[
        str,
        typer.Option(
            help="label: cut around the reference labels, as the literature does, and every result "
            "says so; none: whole scans."
        ),
    ] = "label",
    without_duplicates: Annotated[
        bool,
        typer.Option(
            "--without-duplicates", help="Leave out 0025 and 0070, the scan of 0002 again."
        ),
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Processes, about 2 GB each; 0: one a core, 8 at most.")
    ] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pancreas-CT (NIH, TCIA) at 1 mm in the literature's split. Resumable."""
    import os

    from vclipseg.console import Console
    from vclipseg.data import pancreas_ct

    with Console(quiet).bar("import") as advance:
        imported = pancreas_ct.import_pancreas_ct(
            dicom,
            labels,
            out,
            crop=crop,
            without_duplicates=without_duplicates,
            workers=workers or min(os.cpu_count() or 1, 8),
            on_progress=lambda done, total, case_id: advance(done, case_id, total),
        )
    _print(imported.to_json(), as_json, imported.lines())


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Version, methods and their presets."""
    from vclipseg import about

    content = about.info()
    lines = [f"vclipseg {content['version']}"]
    lines += [f"{name}: {', '.join(names)}" for name, names in content["methods"].items()]
    _print(content, as_json, lines)


def _version(value: bool) -> None:
    if value:
        from vclipseg.about import versions

        print(versions())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Versions, and exit."),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
