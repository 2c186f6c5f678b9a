"""The literature's protocol: when it looks, what it keeps, and that everything made of it is marked."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from toy import TINY
from vclipseg import commands
from vclipseg.checkpoint import load_model, save_model
from vclipseg.compare import compare_runs
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.errors import Stopped
from vclipseg.experiment import new_run, train_run
from vclipseg.inference import load
from vclipseg.methods import METHODS
from vclipseg.paper_protocol import TestLooks, evaluate_best, look_steps, read_looks
from vclipseg.report import write_report
from vclipseg.scores import read_scores

QUIET = Console(quiet=True)


def test_looks_are_those_of_the_literature():
    steps = look_steps(15_000)
    assert steps[:3] == (800, 1000, 1200)
    assert (len(steps), steps[-1]) == (72, 15_000)


def test_looks_scale_with_the_length_of_a_run():
    steps = look_steps(1500)
    assert (len(steps), steps[0], steps[1], steps[-1]) == (72, 80, 100, 1500)
    assert look_steps(4) == (1, 2, 3, 4)


def begin(data, folder, method="supervised", *overrides):
    experiment = load_experiment(
        None, [*TINY, f"method.name={method}", "data.labeled=1", *overrides]
    )
    return new_run(experiment, data, folder, QUIET)


@pytest.fixture(scope="module")
def looked(tiny_data, tmp_path_factory):
    """A run that was looked at after each of its four steps."""
    run, prepared = begin(tiny_data, tmp_path_factory.mktemp("paper") / "run")
    looks = TestLooks(run, tiny_data)
    kept = {}

    def look(state):
        before = {name: value.clone() for name, value in state.weights().items()}
        random, training = torch.get_rng_state(), state.method.training
        looks(state)
        assert torch.equal(torch.get_rng_state(), random)
        assert state.method.training == training
        after = state.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        kept[state.step] = before

    train_run(run, prepared.cases, QUIET, look)
    return run, kept, evaluate_best(run, QUIET, tiny_data)


def test_the_best_weights_are_kept(looked):
    run, kept, best = looked
    rows = read_looks(run.folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    weights, description = load_model(best.model_path)
    chosen = max(rows, key=lambda row: row["dice"])
    assert (description["step"], description["protocol"]) == (chosen["step"], "paper")
    assert all(torch.equal(weights[name], kept[chosen["step"]][name]) for name in weights)


def test_a_look_scores_what_the_evaluation_scores(looked):
    run, _, best = looked
    scores = [score.dice for score in read_scores(best.folder) if not score.lcc]
    highest = max(row["dice"] for row in read_looks(run.folder))
    assert np.mean(scores) == pytest.approx(highest, abs=2e-6)


def test_what_is_made_of_it_is_marked(looked, tiny_data):
    run, _, best = looked
    metrics = json.loads((best.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["protocol"] == "paper"
    assert (metrics["looks"], metrics["chosen_step"]) == (4, load(best.folder).description["step"])
    page = write_report([best.folder], data_root=tiny_data).read_text(encoding="utf-8")
    assert "The checkpoint was chosen on the test list" in page
    assert not (run.folder / "metrics.json").exists()  # the run itself is scored by others


def test_it_stays_marked_when_it_is_evaluated_again(looked, tiny_data, tmp_path):
    run, _, best = looked
    copy = Path(shutil.copytree(best.folder, tmp_path / "paper"))
    before = json.loads((copy / "metrics.json").read_text())
    commands.evaluate(copy, tiny_data, None, [], QUIET, 1)
    after = json.loads((copy / "metrics.json").read_text())
    marks = ("protocol", "looks", "chosen_step", "mean")
    assert [after[name] for name in marks] == [before[name] for name in marks]
    assert best.settings_hash != run.settings_hash  # so that what starts from it is another run too


def test_comparing_with_it_says_so(looked):
    _, _, best = looked
    notes = compare_runs(best.folder, best.folder).notes
    assert any("chosen on the test set" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_looked_at(tiny_data, tmp_path, name):
    """Its weights after looks are those without, and the best of them predict."""
    runs = [begin(tiny_data, tmp_path / folder, name) for folder in ("looked", "plain")]
    train_run(runs[0][0], runs[0][1].cases, QUIET, TestLooks(runs[0][0], tiny_data))
    train_run(runs[1][0], runs[1][1].cases, QUIET)
    looked, plain = (load_model(run.model_path)[0] for run, _ in runs)
    assert looked.keys() == plain.keys()
    assert all(torch.equal(looked[key], plain[key]) for key in plain)
    best = evaluate_best(runs[0][0], QUIET, tiny_data)
    assert load_model(best.model_path)[0].keys() == plain.keys()


def test_an_empty_prediction_has_no_distance_but_here(tiny_data, tmp_path):
    """Weights that call everything background: distances of 0, and failures all the same."""
    run, prepared = begin(tiny_data, tmp_path / "run")
    looks = TestLooks(run, tiny_data)
    train_run(run, prepared.cases, QUIET, looks)
    weights, description = load_model(looks.folder / "checkpoints" / "model.safetensors")
    bias = next(name for name in weights if name.endswith("head.bias"))
    weights[bias] += torch.tensor([100.0, -100.0])
    save_model(looks.folder / "checkpoints" / "model.safetensors", weights, description)
    best = evaluate_best(run, QUIET, tiny_data)
    metrics = json.loads((best.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["failures"] == 2
    assert metrics["mean"]["hd95_voxel"]["mean"] == 0
    assert metrics["mean"]["dice"]["mean"] == 0


def test_looks_go_on_where_they_were(tiny_data, tmp_path, looked):
    """Stopped in between and resumed, the looks and their choice are those of an unbroken run."""
    run, prepared = begin(tiny_data, tmp_path / "run")
    looks = TestLooks(run, tiny_data)

    def stop(state):
        looks(state)
        if state.step == 2:
            raise Stopped("here", 130)

    with pytest.raises(Stopped):
        train_run(run, prepared.cases, QUIET, stop)
    assert [row["step"] for row in read_looks(run.folder)] == [1, 2]
    again = TestLooks(run, tiny_data)
    train_run(run, prepared.cases, QUIET, again)
    assert read_looks(run.folder) == read_looks(looked[0].folder)
    description = load_model(again.folder / "checkpoints" / "model.safetensors")[1]
    assert description["step"] == load(looked[2].folder).description["step"]


def test_the_time_of_looks_is_not_the_trainings(tiny_data, tmp_path, monkeypatch):
    run, prepared = begin(tiny_data, tmp_path / "run")
    clock = {"hours": 0.0}
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600 * clock["hours"])

    def look(state):
        clock["hours"] += 1

    train_run(run, prepared.cases, QUIET, look)
    assert clock["hours"] == run.experiment.train.steps
    assert run.train_seconds < 3600
