"""Runs of four steps on tiny made-up data: what is in the folder, stopping, going on."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy import TINY
from vclipseg import commands, experiment, training
from vclipseg.checkpoint import load_model, load_state
from vclipseg.config import load_experiment
from vclipseg.console import Console
from vclipseg.data.datasets import open_dataset
from vclipseg.data.volume import read_labels, write
from vclipseg.errors import DataError, OutOfMemory, Stopped, UsageError
from vclipseg.experiment import evaluate_run, held_in_memory, new_run, stop_signals, train_run
from vclipseg.inference import load
from vclipseg.methods import METHODS
from vclipseg.methods.base import Loss, Term
from vclipseg.networks.text import TextVectors
from vclipseg.runlog import read_log
from vclipseg.runs import Run, identity
from vclipseg.training import NonFiniteLossError

QUIET = Console(quiet=True)


def settings(name="vclipseg", *overrides):
    return load_experiment(None, [*TINY, f"method.name={name}", "data.labeled=1", *overrides])


def train_tiny(data, folder, name="vclipseg", *overrides):
    run, prepared = new_run(settings(name, *overrides), data, folder, QUIET, ["vclipseg", "train"])
    train_run(run, prepared.cases, QUIET)
    return run


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """A run that was trained and evaluated; only to be read."""
    run = train_tiny(tiny_data, tmp_path_factory.mktemp("runs") / "finished")
    evaluate_run(run, QUIET)
    return run


@pytest.fixture
def copied(finished, tmp_path):
    """The same, to be changed."""
    return Run.open(shutil.copytree(finished.folder, tmp_path / "run"))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# The run folder


def test_experiment_json_says_what_was_run(finished, tiny_data):
    content = read_json(finished.folder / "experiment.json")
    assert content["version"] == 1
    assert content["command"] == ["vclipseg", "train"]
    assert content["data"]["root"] == str(tiny_data.resolve())
    assert content["data"]["layout"] == "nnunet"
    assert content["class_names"] == ["background", "left atrium"]
    assert content["channel_names"] == ["MRI"]
    assert content["settings"] == finished.experiment.to_json()
    assert content["settings"]["method"]["name"] == "vclipseg"
    assert content["text"]["source"] == "orthogonal"
    assert content["plan"]["spacing"] == [4.0, 4.0, 4.0]
    assert content["transductive"] is False
    assert len(content["settings_hash"]) == 12


def test_environment_json_says_with_what(finished):
    content = read_json(finished.folder / "environment.json")
    assert content["torch"] == torch.__version__.split("+")[0] or content["torch"]
    assert {"vclipseg", "python", "device", "threads", "platform", "commit"} <= set(content)
    assert content["threads"] == 1
    assert finished.environment == content


def test_splits_json_says_who(finished, tiny_data):
    split = finished.split
    dataset = open_dataset(tiny_data)
    assert split.labeled == (dataset.labeled[0].case_id,)
    assert set(split.unlabeled) == {c.case_id for c in dataset.train} - set(split.labeled)
    assert set(split.test) == {c.case_id for c in dataset.test}
    content = read_json(finished.folder / "experiment.json")
    assert split.hash == content["data"]["hash"]


def test_log_has_each_term_and_its_weight(finished):
    rows = read_log(finished.folder / "log.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    terms = {"supervised", "dlb", "alignment"}
    facts = {"pseudo_share", "prototype background", "prototype left atrium"}
    wanted = {"seconds", "lr", "total", *terms, *(f"{t}_weight" for t in terms), *facts}
    assert wanted <= set(rows[0])
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert finished.train_seconds == round(float(rows[-1]["seconds"]), 1)


def test_model_holds_the_weights_that_count(finished):
    weights, description = load_model(finished.model_path)
    state = load_state(finished.state_path)
    assert state["step"] == 4
    left_out = set(state["method"]) - set(weights)
    assert {name.split(".")[0] for name in left_out} == {"teacher", "network"}
    assert all("projections" in n for n in left_out if n.startswith("network"))
    average = state["average"]
    assert all(torch.equal(weights[key], average[key]) for key in set(weights) & set(average))
    assert len(set(weights) & set(average)) > 50
    assert description["method"] == finished.experiment.method.model_dump(mode="json")
    assert description["text"]["source"] == "orthogonal"
    assert description["weights"] == "ema"
    assert torch.equal(weights["text"], torch.from_numpy(finished.text.vectors))


def test_evaluation_is_of_the_model_on_test_cases(finished, tiny_data):
    dataset = open_dataset(tiny_data)
    predictor = load(finished.folder)
    for case in dataset.test:
        saved = read_labels(finished.folder / "predictions" / f"{case.case_id}.nii.gz")
        expected = predictor.predict(dataset.image(case))
        assert np.array_equal(saved.array, expected.array)
        np.testing.assert_allclose(saved.affine, dataset.image(case).affine, atol=1e-4)
    with (finished.folder / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case_id"] for row in rows} == set(finished.split.test)
    metrics = read_json(finished.folder / "metrics.json")
    assert (metrics["num_cases"], metrics["protocol"], metrics["weights"]) == (2, "strict", "ema")


def test_a_run_keeps_its_classes_whatever_the_data_say_since(copied, tiny_data, tmp_path):
    """A name that was corrected, or an order that a new case turned round."""
    before = evaluate_run(copied, QUIET)
    data = shutil.copytree(tiny_data, tmp_path / "data")
    described = read_json(data / "dataset.json")
    described["labels"] = {"background": 0, "something": 1, "else": 2}
    (data / "dataset.json").write_text(json.dumps(described))
    after = evaluate_run(copied, QUIET, data)
    assert after["classes"] == before["classes"]
    assert "something" not in after["classes"]


def test_a_run_opens_as_it_was(finished):
    run = Run.open(finished.folder)
    assert run.experiment == finished.experiment
    assert run.plan == finished.plan
    assert run.split == finished.split
    assert np.array_equal(run.text.vectors, finished.text.vectors)
    assert run.text.origin == finished.text.origin


def test_other_settings_of_evaluation(copied):
    scoring = copied.experiment.evaluate.model_copy(update={"nsd_tolerance_mm": 9.0})
    assert evaluate_run(copied, QUIET, scoring=scoring)["nsd_tolerance_mm"] == 9.0


def test_identity_is_of_all_that_decides_a_result(finished):
    def named(*overrides, name="vclipseg", text=finished.text):
        return identity(settings(name, *overrides), finished.split, finished.plan, text)

    assert named() == finished.description["settings_hash"]
    assert len(named()) == 12
    assert named("train.threads=2", "train.log_every=7", "train.checkpoint_every=1") == named()
    other_text = TextVectors(finished.text.vectors + 1, finished.text.origin)
    other_split = replace(finished.split, hash="sha256:other")
    other_plan = finished.plan.model_copy(update={"spacing": (1.0, 1.0, 1.0)})
    others = {
        named("train.seed=1"),
        named("predict.blend=uniform"),
        named(name="supervised", text=None),
        named(text=other_text),
        identity(settings(), other_split, finished.plan, finished.text),
        identity(settings(), finished.split, other_plan, finished.text),
    }
    assert len(others | {named()}) == 7


# What is refused


def test_a_folder_with_a_run_is_left_alone(copied, tiny_data):
    before = {p: p.read_bytes() for p in copied.folder.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"holds a run already.*--resume"):
        new_run(settings(), tiny_data, copied.folder, QUIET)
    with pytest.raises(UsageError, match="holds a run already"):
        Run.create(copied.folder, settings(), None, None, [])
    assert {p: p.read_bytes() for p in copied.folder.rglob("*") if p.is_file()} == before


def test_what_is_not_a_run(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        Run.open(tmp_path)
    for damage in ("{", '{"version": 1}', ""):
        (tmp_path / "experiment.json").write_text(damage)
        with pytest.raises(DataError, match=r"experiment\.json: damaged"):
            Run.open(tmp_path)
    (tmp_path / "experiment.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="of version 99"):
        Run.open(tmp_path)


@pytest.fixture
def _nothing_is_prepared(monkeypatch):
    def prepare(*args, **kwargs):
        raise AssertionError("the data were prepared first")

    monkeypatch.setattr(experiment, "prepare", prepare)


@pytest.mark.usefixtures("_nothing_is_prepared")
def test_without_unlabeled_cases_the_ways_out_are_named(tiny_data, tmp_path):
    all_labeled = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(all_labeled / "imagesUn")
    with pytest.raises(UsageError, match=r"imagesUn.*--labeled N.*--method supervised"):
        new_run(settings("vclipseg", "data.labeled=2"), all_labeled, tmp_path / "run", QUIET)
    with pytest.raises(AssertionError, match="prepared"):  # so this one went on
        new_run(settings("supervised", "data.labeled=2"), all_labeled, tmp_path / "run", QUIET)


@pytest.mark.usefixtures("_nothing_is_prepared")
def test_without_clip_the_ways_out_are_named(tiny_data, tmp_path):
    asked = settings("vclipseg", "text.source=clip", f"text.model={tmp_path / 'none'}")
    with pytest.raises(UsageError, match="orthogonal"):
        new_run(asked, tiny_data, tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_labels_and_a_model(copied, tiny_data, tmp_path):
    unlabeled = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(unlabeled / "labelsTs")
    with pytest.raises(UsageError, match="no test case has a label file"):
        evaluate_run(copied, QUIET, unlabeled)
    copied.model_path.unlink()
    with pytest.raises(UsageError, match="no finished model"):
        evaluate_run(copied, QUIET)


def change_a_label(root):
    """One voxel, in the first labeled case."""
    file = sorted((root / "labelsTr").iterdir())[0]
    labels = read_labels(file)
    labels.array[0, 0, 0] = 1
    write(labels, file)


@pytest.mark.usefixtures("_nothing_is_prepared")
def test_other_data_are_refused_on_resume(copied, tiny_data, tmp_path):
    other = shutil.copytree(tiny_data, tmp_path / "data")
    change_a_label(other)
    with pytest.raises(DataError, match=r"not those that .* was started with.*start a new run"):
        commands.resume(copied.folder, QUIET, other)


# What training may see


def test_labels_of_unlabeled_cases_cannot_be_read(tiny_data, tmp_path):
    _, prepared = new_run(settings(), tiny_data, tmp_path / "run", QUIET)
    hidden = [c.case_id for c in open_dataset(tiny_data).labeled[1:]]
    assert set(hidden) <= set(prepared.split.unlabeled)
    with pytest.raises(DataError, match="without labels"):
        prepared.cases.labels(hidden[0])
    assert not set(prepared.split.test) & set(prepared.cases.case_ids)


def test_test_images_are_trained_on_only_when_asked(tiny_data, tmp_path):
    asked = settings("vclipseg", "data.transductive=true")
    run, prepared = new_run(asked, tiny_data, tmp_path / "run", QUIET)
    assert set(prepared.split.test) <= set(prepared.split.unlabeled)
    assert read_json(run.folder / "experiment.json")["transductive"] is True
    assert "TRANSDUCTIVE" in commands.describe(run)
    with pytest.raises(DataError, match="without labels"):
        prepared.cases.labels(prepared.split.test[0])


# Stopping and going on


@pytest.fixture
def stop_at(monkeypatch):
    """Have this process sent a signal at a step."""
    real = experiment.train

    def arrange(step, number):
        def train(state, batch_at, settings, machine, on_step):
            def stopping(state, loss):
                if state.step == step:
                    os.kill(os.getpid(), number)
                on_step(state, loss)

            real(state, batch_at, settings, machine, stopping)

        monkeypatch.setattr(experiment, "train", train)

    yield arrange
    monkeypatch.setattr(experiment, "train", real)


def content_of(run):
    """All that two runs of the same settings must share."""
    weights, description = load_model(run.model_path)
    rows = [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_log(run.folder / "log.csv")
    ]
    return weights, load_state(run.state_path), description, rows


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("name", "number", "exit_code"),
    [
        ("supervised", signal.SIGINT, 130),
        ("vclipseg", signal.SIGTERM, 75),
        *(
            pytest.param(name, signal.SIGTERM, 75, marks=pytest.mark.slow)
            for name in METHODS
            if name != "vclipseg"
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    tiny_data, tmp_path, stop_at, monkeypatch, name, number, exit_code
):
    whole = train_tiny(tiny_data, tmp_path / "whole", name)
    stop_at(1, number)
    with pytest.raises(Stopped, match=r"stopped at step 1 of 4.*--resume") as stopped:
        train_tiny(tiny_data, tmp_path / "broken", name)
    assert stopped.value.exit_code == exit_code
    broken = Run.open(tmp_path / "broken")
    assert load_state(broken.state_path)["step"] == 1
    assert not broken.model_path.exists()
    stop_at(None, number)
    cases = experiment.prepare_data(broken.experiment, tiny_data, QUIET, broken.plan).cases
    train_run(broken, cases, QUIET)
    assert same(content_of(broken), content_of(whole))


def test_a_stop_saves_nothing_that_is_not_finite(tiny_data, tmp_path, stop_at, monkeypatch):
    """Where losses are read only now and then, as on a GPU, one may have broken since."""
    broken = Loss(supervised=Term(1.0, torch.tensor(math.nan)))
    monkeypatch.setattr(training, "follow", lambda state, _: state.unseen.append((0, broken)))
    stop_at(1, signal.SIGTERM)
    with pytest.raises(NonFiniteLossError, match=r"step 0.*supervised=nan"):
        train_tiny(tiny_data, tmp_path / "run", "supervised")
    assert not Run.open(tmp_path / "run").state_path.exists()


def test_a_signal_at_the_last_step_stops_nothing(tiny_data, tmp_path, stop_at):
    stop_at(4, signal.SIGTERM)
    run = train_tiny(tiny_data, tmp_path / "run", "supervised")
    assert run.model_path.is_file()


def test_a_finished_run_may_be_resumed(copied):
    before = content_of(copied)
    commands.resume(copied.folder, QUIET)
    assert same(content_of(copied), before)


def test_a_damaged_checkpoint_is_named(copied):
    copied.state_path.write_bytes(b"half")
    with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint"):
        commands.resume(copied.folder, QUIET)


def test_seed_decides_the_run(tiny_data, tmp_path):
    a, b, c = (
        train_tiny(tiny_data, tmp_path / str(i), "supervised", f"train.seed={seed}")
        for i, seed in enumerate((1, 1, 2))
    )
    assert same(content_of(a), content_of(b))
    assert not same(content_of(a)[0], content_of(c)[0])


def test_signals_are_given_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # the second one is meant
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# A run that starts from another


def test_a_run_starts_from_the_weights_of_another(finished, tiny_data, tmp_path):
    """With a rate of nothing to speak of, it ends where the other ended."""
    first = f"train.init_from={finished.folder}"
    run = train_tiny(tiny_data, tmp_path / "run", "vclipseg", first, "train.lr=1e-12")
    before, after = load_model(finished.model_path)[0], load_model(run.model_path)[0]
    trained = [name for name in before if name.endswith("weight")]
    assert len(trained) > 40
    for name in trained:
        torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=1e-5)


def test_identity_holds_the_run_that_it_starts_from(finished, copied):
    def started(folder):
        asked = settings("vclipseg", f"train.init_from={folder}")
        return identity(asked, finished.split, finished.plan, finished.text)

    assert started(finished.folder) == started(copied.folder) != finished.settings_hash
    description = read_json(copied.folder / "experiment.json") | {"settings_hash": "other"}
    (copied.folder / "experiment.json").write_text(json.dumps(description))
    assert started(copied.folder) != started(finished.folder)


def test_identity_does_not_change_with_a_new_setting_at_its_default(finished):
    spelled_out = settings("vclipseg", "train.momentum=0.9", "method.warmup=0.4")
    of = identity(spelled_out, finished.split, finished.plan, finished.text)
    assert of == finished.settings_hash


def test_only_a_finished_run_that_fits_can_be_started_from(finished, copied, tiny_data, tmp_path):
    wider = (f"train.init_from={finished.folder}", "method.filters=3")
    with pytest.raises(UsageError, match=r"no weight of .* has a name and shape"):
        train_tiny(tiny_data, tmp_path / "wider", "supervised", *wider)
    copied.model_path.unlink()
    with pytest.raises(UsageError, match="is not finished; resume it first"):
        train_tiny(tiny_data, tmp_path / "next", "vclipseg", f"train.init_from={copied.folder}")
    assert not (tmp_path / "next").exists()


# Memory


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_step_that_does_not_fit_says_what_to_shrink(tiny_data, tmp_path, monkeypatch, error):
    def train(*args):
        raise error

    monkeypatch.setattr(experiment, "train", train)
    with pytest.raises(
        OutOfMemory, match=r"\(16, 16, 16\) with 2 filters; set train\.patch"
    ) as raised:
        train_tiny(tiny_data, tmp_path / "run", "supervised")
    assert raised.value.exit_code == 5


def test_other_errors_of_a_step_stay_what_they_are(tiny_data, tmp_path, monkeypatch):
    def train(*args):
        raise RuntimeError("unsupported memory format option")

    monkeypatch.setattr(experiment, "train", train)
    with pytest.raises(RuntimeError, match="memory format"):
        train_tiny(tiny_data, tmp_path / "run", "supervised")


def test_cases_are_read_once_while_there_is_room(monkeypatch):
    monkeypatch.setattr(experiment, "IN_MEMORY", 250)
    asked = []

    def read(case_id):
        asked.append(case_id)
        return np.full(100, ord(case_id), dtype=np.uint8)

    array = held_in_memory(read, "abc")
    for case_id in "abcabc":
        assert array(case_id)[0] == ord(case_id)
    assert asked == ["a", "b", "c", "c"]
