"""The command line: exit codes, what goes where, and the whole way from data to report."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from toy import TINY
from vclipseg import __version__, about, cli
from vclipseg.checkpoint import load_model, load_state
from vclipseg.data.volume import read_image, read_labels
from vclipseg.runlog import read_log

VERBS = [
    "demo",
    "check",
    "prepare",
    "train",
    "evaluate",
    "predict",
    "benchmark",
    "compare",
    "report",
    "export",
    "serve",
    "prompts",
    "info",
]
IMPORTERS = ["pancreas-ct"]
SET = [part for override in TINY for part in ("--set", override)]


@pytest.fixture
def damaged_data(tiny_data, tmp_path):
    """A label file that ends too early."""
    root = shutil.copytree(tiny_data, tmp_path / "damaged")
    file = sorted((root / "labelsTr").iterdir())[0]
    file.write_bytes(file.read_bytes()[:200])
    return root


# Starting


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from vclipseg.cli import main; sys.argv = ['vclipseg', {}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'numpy', 'monai', 'transformers', 'SimpleITK', 'matplotlib'}}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    for arguments in (
        "'--help'",
        "'train', '--help'",
        "'import', 'pancreas-ct', '--help'",
        "'info'",
        "'info', '--json'",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        assert "HEAVY []" in done.stdout, done.stdout


def test_help_names_every_verb(run_cli):
    code, out, _ = run_cli("--help")
    assert code == 0
    assert all(f"\n  {verb} " in out for verb in [*VERBS, "import"])
    assert {command.callback.__name__ for command in cli.app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", [*VERBS, "import", *(f"import {name}" for name in IMPORTERS)])
def test_every_verb_has_help(run_cli, verb):
    code, out, _ = run_cli(*verb.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: vclipseg {verb}")


def test_version(run_cli):
    code, out, _ = run_cli("--version")
    assert code == 0
    assert f"vclipseg {__version__}" in out
    assert "torch" in out


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["predict", "run"], "Missing argument"),
        (["train"], "no data: give the folder of the data set with --data"),
        (["train", "recipe.toml", "--data", "."], "recipe.toml: no such recipe"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "DATA", "--method", "unet"], "there is no method 'unet'"),
        (["train", "--data", "DATA", "--preset", "best"], "no preset 'best'"),
        (["train", "--data", "DATA", "--set", "train.stpes=1"], "did you mean steps?"),
        (["train", "--data", "DATA", "--set", "steps"], "expected key=value"),
        (
            ["train", "--data", "DATA", "--labeled", "99", "--text", "orthogonal"],
            "99 labeled cases",
        ),
        (["train", "--resume", "DATA"], "not a run folder"),
        (["train", "--resume", "DATA", "--labeled", "2"], "it takes only --data"),
        (["train", "--resume", "DATA", "--set", "train.steps=9"], "it takes only --data"),
        (["train", "DATA", "--plan", "plan.json"], "plan.json"),
        (["predict", "DATA", "scan.nii.gz"], "no finished model"),
        (["predict", "model.safetensors", "scan.nii.gz"], "no such model"),
        (["evaluate", "DATA"], "not a run folder"),
        (["evaluate", "DATA", "--references", "DATA"], "--references needs the class names"),
        (["compare", "DATA", "DATA"], ""),
        (["prompts", "a", "b", "--text", "bert"], "none of clip, orthogonal, random"),
        (["check", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_asked_wrongly_is_exit_code_2(
    run_cli, tiny_data, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*(tiny_data if a == "DATA" else a for a in arguments))
    assert code == 2, err
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_without_clip_the_ways_out_are_named(run_cli, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--set", "text.source=clip", "--set", f"text.model={tmp_path / 'no-clip'}"]
    code, _, err = run_cli("train", tiny_data, "--no-check", *SET, *settings)
    assert code == 2
    assert "orthogonal" in err
    assert ".safetensors" in err
    assert not (tmp_path / "runs").exists()


def test_data_not_to_be_trusted_is_exit_code_3(run_cli, damaged_data, tmp_path):
    code, out, err = run_cli("check", damaged_data, "--workers", 1, "-q")
    assert code == 3
    assert "labelsTr" in out
    assert err == ""
    code, out, err = run_cli("train", damaged_data, "--out", tmp_path / "run", *SET, "-q")
    assert code == 3
    assert "labelsTr" in err
    assert "--no-check" in err
    assert not (tmp_path / "run").exists()


def test_data_to_be_trusted_is_exit_code_0(run_cli, tiny_data):
    code, out, err = run_cli("check", tiny_data, "--workers", 1, "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out)


def test_ctrl_c_is_exit_code_130(run_cli, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(about, "info", interrupted)
    code, out, err = run_cli("info")
    assert (code, out) == (130, "")
    assert "interrupted" in err


def test_what_the_system_refuses_is_one_message(run_cli, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/mask.nii.gz")

    monkeypatch.setattr(about, "info", full)
    code, out, err = run_cli("info")
    assert (code, out) == (2, "")
    assert (
        "error: /data/mask.nii.gz: No space left on device; see to it, or give another place" in err
    )


def test_what_nobody_foresaw_is_not_hidden(run_cli, monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(about, "info", broken)
    monkeypatch.setattr(sys, "argv", ["vclipseg", "info"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# Small verbs


def test_info(run_cli):
    code, out, err = run_cli("info")
    assert (code, err) == (0, "")
    assert "vclipseg: " in out
    code, out, _ = run_cli("info", "--json")
    content = json.loads(out)
    assert content["version"] == __version__
    assert {"robust", "faithful", "code", "paper"} <= set(content["methods"]["vclipseg"])


def test_prompts(run_cli, tmp_path, tiny_data):
    file = tmp_path / "vectors.safetensors"
    code, out, _ = run_cli("prompts", "background", "liver", "--text", "orthogonal", "--out", file)
    assert code == 0
    assert "cosines" in out
    assert file.is_file()
    before = file.read_bytes()
    code, _, err = run_cli("prompts", "background", "spleen", "--text", "random", "--out", file)
    assert code == 2
    assert "--overwrite" in err
    assert file.read_bytes() == before
    code, out, _ = run_cli(
        "prompts", "background", "liver", "--text", "random", "--out", file, "--overwrite"
    )
    assert code == 0
    assert file.read_bytes() != before
    code, out, _ = run_cli("prompts", tiny_data, "--text", "orthogonal", "--json")
    content = json.loads(out)
    assert content["classes"] == ["background", "left atrium"]
    np.testing.assert_allclose(content["cosines"], np.eye(2), atol=1e-6)


def test_prepare_writes_a_plan_that_may_be_edited(run_cli, tiny_data, tmp_path):
    plan = tmp_path / "plan.json"
    code, out, _ = run_cli("prepare", tiny_data, "--plan", plan, "--workers", 1, "--json", "-q")
    assert code == 0
    assert json.loads(out)["spacing"] == [4.0, 4.0, 4.0]
    content = json.loads(plan.read_text(encoding="utf-8"))
    plan.write_text(json.dumps({**content, "spacing": [6.0, 6.0, 6.0]}))
    code, out, _ = run_cli("prepare", tiny_data, "--plan", plan, "--workers", 1, "-q")
    assert code == 0
    assert "6.0" in out
    assert json.loads(plan.read_text(encoding="utf-8"))["spacing"] == [6.0, 6.0, 6.0]


# The whole way


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """Two runs by the command line: our method on the folder alone, and the baseline by a recipe."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "baseline.toml"
    recipe.write_text('name = "baseline"\n[method]\nname = "supervised"\n')
    ours = command("train", tiny_data, "--out", folder / "ours", *SET)
    baseline = command("train", recipe, "--data", tiny_data, "--out", folder / "baseline", *SET)
    for done in (ours, baseline):
        assert done.returncode == 0, done.stderr
    return folder


def command(*arguments, **options):
    """The command line in a process of its own."""
    line = [sys.executable, "-m", "vclipseg.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.mark.slow
def test_train_on_a_folder_alone(runs):
    folder = runs / "ours"
    files = {path.name for path in folder.iterdir()}
    expected = "experiment.json environment.json splits.json plan.json log.csv checkpoints"
    expected += " predictions cases.csv metrics.json report.html nnunet_summary.json"
    assert set(expected.split()) <= files
    content = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    assert content["settings"]["preset"] == "robust"
    assert content["settings"]["method"]["name"] == "vclipseg"
    assert content["name"] == "Phantom"
    assert content["text"]["source"] == "orthogonal"
    assert content["command"][1] == "train"


@pytest.mark.slow
def test_results_on_stdout_progress_on_stderr(run_cli, tiny_data, tmp_path):
    arguments = ["train", tiny_data, "--out", tmp_path / "run", "--method", "supervised", *SET]
    code, out, err = run_cli(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["num_cases"] == 2
    assert "train supervised: 4/4" in err
    shutil.rmtree(tmp_path / "run")
    code, out, err = run_cli(*arguments, "--quiet")
    assert (code, err) == (0, "")
    assert "Dice" in out
    assert "vclipseg predict" in out


@pytest.mark.slow
def test_a_run_is_not_overwritten(run_cli, runs, tiny_data):
    before = (runs / "ours" / "experiment.json").read_bytes()
    code, _, err = run_cli("train", tiny_data, "--out", runs / "ours", *SET)
    assert code == 2
    assert "holds a run already" in err
    assert (runs / "ours" / "experiment.json").read_bytes() == before


@pytest.mark.slow
def test_predict(run_cli, runs, tiny_data, tmp_path):
    scans = tiny_data / "imagesTs"
    code, out, _ = run_cli("predict", runs / "ours", scans, "-o", tmp_path / "masks")
    assert code == 0
    written = [Path(line) for line in out.split()]
    assert len(written) == 2
    for file in written:
        saved = read_labels(runs / "ours" / "predictions" / file.name)
        mask, image = read_labels(file), read_image(scans / file.name.replace(".nii", "_0000.nii"))
        assert np.array_equal(mask.array, saved.array)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    code, _, err = run_cli("predict", runs / "ours", scans, "-o", tmp_path / "masks")
    assert code == 2
    assert "--overwrite" in err
    again = ["predict", runs / "ours", scans, "-o", tmp_path / "masks", "--overwrite", "--json"]
    code, out, _ = run_cli(*again, "--set", "predict.mode=whole", "--probabilities")
    assert code == 0
    assert len(json.loads(out)) == 4


@pytest.mark.slow
def test_a_model_file_is_enough(run_cli, runs, tiny_data, tmp_path):
    model = shutil.copy(
        runs / "ours" / "checkpoints" / "model.safetensors", tmp_path / "m.safetensors"
    )
    scan = sorted((tiny_data / "imagesTs").iterdir())[0]
    code, _, _ = run_cli("predict", model, scan, "-o", tmp_path / "mask.nrrd")
    assert code == 0
    saved = sorted((runs / "ours" / "predictions").iterdir())[0]
    assert np.array_equal(read_labels(tmp_path / "mask.nrrd").array, read_labels(saved).array)


@pytest.mark.slow
def test_evaluate_again(run_cli, runs, tiny_data, tmp_path):
    run = shutil.copytree(runs / "ours", tmp_path / "run")
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    code, out, _ = run_cli("evaluate", run, "--json", "-q")
    assert code == 0
    assert json.loads(out)["mean"] == before["mean"]
    code, out, _ = run_cli("evaluate", run, "--set", "evaluate.nsd_tolerance_mm=50", "--json", "-q")
    assert json.loads(out)["nsd_tolerance_mm"] == 50
    assert code == 0
    masks = shutil.copytree(run / "predictions", tmp_path / "masks")
    code, out, _ = run_cli(
        "evaluate",
        masks,
        "--references",
        tiny_data / "labelsTs",
        "--set",
        'data.class_names=["background", "left atrium"]',
        "--json",
    )
    assert code == 0
    assert json.loads(out)["mean"]["dice"]["mean"] == pytest.approx(before["mean"]["dice"]["mean"])


@pytest.mark.slow
def test_compare_and_report(run_cli, runs, tmp_path):
    code, out, err = run_cli("compare", runs / "ours", runs / "baseline")
    assert (code, err) == (0, "")
    assert "2 cases" in out or "n = 2" in out or "2" in out
    code, out, _ = run_cli("compare", runs / "ours", runs / "baseline", "--json")
    assert json.loads(out)
    file = tmp_path / "report.html"
    code, out, _ = run_cli("report", runs / "ours", runs / "baseline", "--out", file)
    assert (code, out.strip()) == (0, str(file))
    assert "<html" in file.read_text(encoding="utf-8")[:500]


@pytest.mark.slow
def test_resume_on_other_data(run_cli, runs, tiny_data, tmp_path):
    other = shutil.copytree(tiny_data, tmp_path / "data")
    labels = sorted((other / "labelsTr").iterdir())
    shutil.copy(labels[1], labels[0])
    run = shutil.copytree(runs / "ours", tmp_path / "run")
    code, _, err = run_cli("train", "--resume", run, "--data", other)
    assert code == 3
    assert "not those that" in err


# Stopped by the machine, by the scheduler, by the person


@pytest.fixture
def long_run(tiny_data, tmp_path):
    """Start a run in a process of its own, and come back when it has saved a first checkpoint."""
    started = []

    def begin(*more):
        folder = tmp_path / "broken"
        arguments = ["train", tiny_data, "--out", folder, "--no-check", *LONG, *more]
        line = [sys.executable, "-m", "vclipseg.cli", *map(str, arguments)]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        end = time.monotonic() + 300
        while not (folder / "checkpoints" / "last.pt").is_file():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, "it does not begin"
            time.sleep(0.005)
        return process, folder

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


LONG = [*SET, "--set", "train.steps=80", "--set", "train.checkpoint_every=4"]


@pytest.fixture(scope="module")
def unbroken(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = command("train", tiny_data, "--out", folder, "--no-check", *LONG)
    assert done.returncode == 0, done.stderr
    return folder


def content_of(folder):
    weights, description = load_model(folder / "checkpoints" / "model.safetensors")
    rows = read_log(folder / "log.csv")
    return weights, description, [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def assert_same_run(a, b):
    (weights, description, rows), (others, other_description, other_rows) = map(content_of, (a, b))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert description == other_description
    assert rows == other_rows
    assert (a / "cases.csv").read_text(encoding="utf-8") == (b / "cases.csv").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)],
    ids=["kill -9", "TERM", "Ctrl-C"],
)
def test_a_run_goes_on_after(number, exit_code, long_run, unbroken, run_cli):
    process, folder = long_run()
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == exit_code, err
    assert not (folder / "checkpoints" / "model.safetensors").exists()
    assert load_state(folder / "checkpoints" / "last.pt")["step"] < 80
    if number != signal.SIGKILL:
        assert f"vclipseg train --resume {folder}" in err
        assert "Traceback" not in err
    code, _, err = run_cli("train", "--resume", folder)
    assert code == 0, err
    assert_same_run(folder, unbroken)
