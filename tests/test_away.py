"""What runs on a GPU's machine needs torch, numpy and pydantic alone, and does what a run here does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from toy import TINY
from vclipseg.checkpoint import load_model
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.experiment import evaluate_run, new_run, train_run
from vclipseg.runs import Run

ROOT = Path(__file__).parents[1]
AWAY, GPU = ROOT / "benchmarks" / "away.py", ROOT / "benchmarks" / "gpu.py"
THERE = {"torch", "numpy", "pydantic"}
IMPORTED_AS = {"pillow": "PIL", "scikit-image": "skimage", "python-multipart": "multipart"}

pytestmark = pytest.mark.slow


def absent():
    """All that this package may import, but for what is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=\[ ]", line)[0] for line in wanted} - THERE
    return sorted(IMPORTED_AS.get(name, name.replace("-", "_")) for name in names)


def run_there(script, *arguments):
    """A script where nothing of that is installed."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent()}))\n"
        f"sys.argv = {[str(a) for a in (script, *arguments)]}\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part_mib", [None, 0.01])
def test_a_run_that_was_trained_away_is_the_same_run(part_mib, tiny_data, tmp_path):
    """In small parts too, in which weights are of half precision."""
    parts = [] if part_mib is None else ["--part-mib", str(part_mib)]
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('name = "tiny"\n')
    away, overrides = tmp_path / "away", [part for o in TINY for part in ("--set", o)]
    command = [sys.executable, str(AWAY), "pack", str(recipe), "--data", str(tiny_data)]
    subprocess.run(
        [*command, "--out", str(away), *overrides, *parts], check=True, capture_output=True
    )
    assert (len(list(away.glob("cases-*"))) > 1) == bool(parts)
    home = away / "run"
    stored = home.rename(tmp_path / "home")  # what is read there lies beside it
    assert "1 of 4 steps" in run_there(AWAY, "train", away, "--minutes", 0)
    run_there(AWAY, "train", away, *parts)
    if parts:
        assert len(list(away.glob("model-*.pt"))) > 1
        (away / "state.pt").unlink()
    stored.rename(home)
    subprocess.run([sys.executable, str(AWAY), "finish", str(away)], check=True)
    here, prepared = new_run(
        load_experiment(recipe, TINY), tiny_data, tmp_path / "here", Console(quiet=True)
    )
    train_run(here, prepared.cases, Console(quiet=True))
    there = Run.open(home)
    (weights, said), (expected, expected_said) = map(
        load_model, (there.model_path, here.model_path)
    )
    assert said == expected_said
    assert weights.keys() == expected.keys()
    if parts:
        expected = {
            n: v.half().float() if v.is_floating_point() else v for n, v in expected.items()
        }
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert there.train_seconds > 0
    assert "dice" in json.dumps(evaluate_run(there, Console(quiet=True)))


def test_the_benchmark_of_a_gpu_runs_there(tmp_path):
    record = tmp_path / "speed.json"
    variants = ("fp32", "bf16", "bf16, saving memory")
    chosen = [part for name in variants for part in ("--variant", name)]
    small = ("--small", "--device", "cpu", "--steps", 2)
    out = run_there(GPU, *small, *chosen, "--record", record)
    rows = json.loads(record.read_text(encoding="utf-8"))
    assert [row["unit"] for row in rows] == ["s", "ms", "ms", "GiB"]
    assert len(out.splitlines()) == len(rows)
    assert all(row["value"] > 0 for row in rows)
    assert all(name in rows[1]["note"] for name in variants)
