"""Grids from start to tables, on tiny made-up data: stopped, gone on with, failed, redone."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from made_records import add_run
from toy import TINY
from vclipseg import commands
from vclipseg.benchmark import view
from vclipseg.benchmark.cells import locked, run_cell
from vclipseg.benchmark.grids import load_grid
from vclipseg.benchmark.launch import Ended, own_environment
from vclipseg.benchmark.pace import Pace, spell_seconds
from vclipseg.benchmark.planning import Planner
from vclipseg.benchmark.run import Benchmark, only_tables, run_benchmark
from vclipseg.checkpoint import load_model
from vclipseg.console import Console
from vclipseg.environment import computed_on
from vclipseg.errors import UsageError, VclipsegError
from vclipseg.records import RUN_COLUMNS, read_runs
from vclipseg.runs import Run
from vclipseg.tables.facts import read_facts
from vclipseg.tables.sections import read_sections

QUIET = Console(quiet=True)
GRID = """
name = "tiny"
[data]
labeled = 1
[grid]
title = "Tiny"
published = "la"
seeds = [0, 1]
methods = [{ name = "supervised" }, { name = "vclipseg" }]
"""
FAILS = """
  { name = "supervised", label = "too large a stride", set = { predict = { stride = [99, 99, 99] } } },
  { name = "supervised", label = "too many labels", labeled = [7] },
"""
TWO_STAGES = """
[[grid.methods]]
name = "vclipseg"
pretrain = { name = "supervised", preset = "robust" }
"""


def here(limit=99):
    """A launcher in this process; stops as a person would after `limit` cells."""

    def launch(orders, stopped):
        for order in orders[:limit]:
            try:
                run_cell(order, QUIET)
                yield Ended(order, "done", "", 1.0)
            except VclipsegError as error:
                yield Ended(order, "failed", str(error), 1.0)

    return launch


def make(folder, data, text=GRID, *, paper=False, record="record"):
    path = folder / "grid.toml"
    path.write_text(text)
    planner = Planner(load_grid(path, TINY), data, folder / "runs", paper)
    return Benchmark(planner, folder / record, QUIET)


def states(jobs):
    return [job.state for job in jobs]


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a grid that was interrupted after three of four cells, then gone on with."""
    folder = tmp_path_factory.mktemp("grid")
    bench = make(folder, tiny_data)
    jobs, _ = run_benchmark(bench, here(3), 1)
    assert states(jobs) == ["done"] * 3 + ["stopped"]
    assert len(read_runs(bench.record)) == 3 * 2
    jobs, _ = run_benchmark(make(folder, tiny_data), here(), 1)
    assert states(jobs) == ["recorded"] * 3 + ["done"]
    return folder


@pytest.mark.slow
def test_a_grid_is_recorded_cell_by_cell(finished, tiny_data):
    rows = read_runs(finished / "record")
    assert len(rows) == 2 * 2 * 2  # methods, seeds, largest component
    assert {(row.method, row.preset, row.text, row.seed) for row in rows} == {
        (method, "robust", text, seed)
        for method, text in (("supervised", ""), ("vclipseg", "orthogonal"))
        for seed in (0, 1)
    }
    assert {(row.dataset, row.labeled, row.steps, row.protocol) for row in rows} == {
        ("tiny", 1, 4, "strict")
    }
    runs = [Run.open(path.parent) for path in finished.glob("runs/*/experiment.json")]
    assert {run.settings_hash for run in runs} == {row.settings_hash for row in rows}
    assert {computed_on(run.environment) for run in runs} == {row.device for row in rows}
    assert rows[0].device.endswith(("1 thread(s), bf16", "1 thread(s), fp32"))
    assert states(make(finished, tiny_data).jobs()) == ["recorded"] * 4


@pytest.mark.slow
def test_it_goes_on_from_a_committed_record_alone(finished, tiny_data, tmp_path):
    record = tmp_path / "record"
    record.mkdir()
    for name in ("runs.csv", "cases.csv"):
        (record / name).write_bytes((finished / "record" / name).read_bytes())
    jobs, _ = run_benchmark(make(tmp_path, tiny_data), here(0), 1)
    assert states(jobs) == ["recorded"] * 4


@pytest.mark.slow
def test_tables_come_in_three_forms(finished):
    text = (finished / "record" / "table.md").read_text(encoding="utf-8")
    assert text.startswith("# Tiny\n")
    assert "| vclipseg (robust, orthogonal) | 4 | ema | 2 |" in text
    assert r"\toprule" in (finished / "record" / "table.tex").read_text(encoding="utf-8")
    with (finished / "record" / "table.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["supervised", "vclipseg"] * 2
    (facts,) = json.loads((finished / "record" / "grid.json").read_text(encoding="utf-8"))
    assert (facts["full_size"], facts["failed"]) == (False, [])


def test_what_is_to_be_said_of_the_data_is_written_down(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    description = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    (data / "dataset.json").write_text(json.dumps({**description, "remarks": ["Cut."]}))
    bench = make(tmp_path, data)
    assert bench.planner.remarks == ()  # nothing was looked at yet
    bench.write(bench.jobs())
    (facts,) = read_facts(bench.record).values()
    assert facts.remarks == ("Cut.",)
    (bench.record / "runs.csv").write_text(",".join(RUN_COLUMNS) + "\n")
    only_tables(bench.planner.grid, bench.record)  # which needs no data, and forgets nothing
    (facts,) = read_facts(bench.record).values()
    assert facts.remarks == ("Cut.",)


@pytest.mark.slow
def test_runs_of_another_record_are_taken_over_where_they_are_the_same(
    finished, tiny_data, tmp_path
):
    text = GRID.replace('{ name = "vclipseg" }', '{ name = "vclipseg", label = "as it is" }')
    bench = make(tmp_path, tiny_data, text.replace("[0, 1]", "[1, 2]"))
    other = finished / "record"
    jobs, _ = run_benchmark(bench, here(0), 1, reuse=[other])
    assert states(jobs) == ["recorded"] * 2 + ["stopped"] * 2
    assert jobs[0].why == f"from {other}"
    assert {row.preset for row in read_runs(bench.record)} == {"robust", "robust, as it is"}


def test_a_failed_cell_is_told_and_tried_again(tiny_data, tmp_path):
    text = GRID.replace("[{ name", "[\n  { name").replace('{ name = "vclipseg" }]', FAILS + "]")
    text = text.replace("[0, 1]", "[0]").replace(
        'published = "la"\n', 'published = "la"\nlabeled = [1]\n'
    )
    bench = make(tmp_path, tiny_data, text)
    jobs, _ = run_benchmark(bench, here(), 1)
    good, stride, labels = jobs
    assert states([good, stride, labels]) == ["done", "failed", "failed"]
    assert "stride" in stride.why
    assert "7 labeled cases asked for" in labels.why
    table = (bench.record / "table.md").read_text(encoding="utf-8")
    assert f"- supervised (robust, too large a stride), 1 labeled, seed 0: {stride.why}" in table
    assert "| supervised (robust) |" in table
    lines = view.summary(bench.record, jobs, [])
    assert sum(line.startswith("FAILED: supervised") for line in lines) == 2
    assert states(bench.jobs()) == ["recorded", "begun", "failed"]
    assert [cell["state"] for cell in view.result(bench, jobs, [])["cells"]] == states(jobs)


def test_a_cell_that_cannot_have_its_text_may_be_left_out(tiny_data, tmp_path):
    entry = '{ name = "vclipseg", label = "words", set = { text = { source = "none.safetensors" } }'
    text = GRID.replace('{ name = "vclipseg" }', entry + ", optional = true }").replace(
        "[0, 1]", "[0]"
    )
    grid = load_grid(_write(tmp_path, text), [o for o in TINY if "text.source" not in o])
    bench = Benchmark(Planner(grid, tiny_data, tmp_path / "runs"), tmp_path / "record", QUIET)
    jobs = bench.jobs()
    assert states(jobs) == ["to do", "skipped"]
    assert "none.safetensors" in jobs[1].why


def _write(folder, text):
    path = folder / "grid.toml"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_method_is_run_again_after_a_fix(tiny_data, tmp_path):
    text = GRID.replace("[0, 1]", "[0]")
    bench = make(tmp_path, tiny_data, text)
    first, _ = run_benchmark(bench, here(), 1)
    with pytest.raises(UsageError, match="--redo mcnet"):
        run_benchmark(bench, here(), 1, redo=["mcnet"])
    jobs, _ = run_benchmark(bench, here(), 1, redo=["vclipseg"])
    assert states(jobs) == ["recorded", "done"]
    old = [path.name for path in (tmp_path / "runs").glob("*.redone-1")]
    assert old == [f"{first[1].folder.name}.redone-1"]
    assert jobs[1].dice == first[1].dice  # nothing was fixed: the same again, bit for bit


@pytest.mark.slow
def test_redoing_some_cells_keeps_the_others(finished, tiny_data, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    bench = make(tmp_path, tiny_data, GRID.replace("[0, 1]", "[1]"))
    jobs, _ = run_benchmark(
        bench, here(0), 1, redo=["supervised"], reuse=[finished / "record"]
    )  # what is redone is not taken from elsewhere
    assert states(jobs) == ["stopped", "recorded"]
    assert {row.seed for row in read_runs(bench.record) if row.method == "supervised"} == {0}


def test_runs_of_other_settings_are_not_averaged_with_those_of_the_grid(tiny_data, tmp_path):
    bench = make(tmp_path, tiny_data, GRID.replace("[0, 1]", "[0]"))
    (job, _) = bench.jobs()
    run_benchmark(bench, here(1), 1)
    changed = Planner(
        load_grid(bench.planner.grid.path, (*TINY, "train.lr=0.5")), tiny_data, tmp_path / "runs"
    )
    other = Benchmark(changed, bench.record, QUIET)
    with pytest.raises(UsageError, match=f"other settings or other data .run {job.settings_hash}"):
        run_benchmark(other, here(0), 1)
    assert len(read_runs(bench.record)) == 2  # and nothing is lost
    next_seed = (*TINY, "train.lr=0.5", "grid.seeds=[1]")
    later = Planner(load_grid(bench.planner.grid.path, next_seed), tiny_data, tmp_path / "runs")
    for redo in ([], ["supervised"]):
        with pytest.raises(UsageError, match="seed 0 is recorded with other settings"):
            run_benchmark(Benchmark(later, bench.record, QUIET), here(0), 1, redo=redo)
    assert len(read_runs(bench.record)) == 2
    jobs, _ = run_benchmark(other, here(0), 1, redo=["supervised"])
    assert states(jobs) == ["stopped"] * 2


def test_folds_are_not_averaged_with_the_own_test_cases(tiny_data, tmp_path):
    text = GRID.replace(', { name = "vclipseg" }', "").replace("[0, 1]", "[0]")
    run_benchmark(make(tmp_path, tiny_data, text), here(), 1)
    folds = make(tmp_path, tiny_data, text.replace("seeds =", "folds = 2\nseeds ="))
    run_benchmark(folds, here(), 1)
    own, of_folds = (s for s in read_sections(folds.record) if s.is_main)
    assert [len(s.rows[0].group.records) for s in (own, of_folds)] == [1, 2]
    assert not own.cases & of_folds.cases


def test_a_failure_is_told_until_something_becomes_of_the_cell(tiny_data, tmp_path):
    text = GRID.replace("[0, 1]", "[0]").replace('{ name = "vclipseg" }]', FAILS + "]")
    text = text.replace('published = "la"\n', 'published = "la"\nlabeled = [1]\n')
    bench = make(tmp_path, tiny_data, text)
    run_benchmark(bench, here(), 1)

    def told():
        return [cell for cell, _ in read_facts(bench.record)["tiny"].failed]

    both = told()
    assert len(both) == 2
    run_benchmark(bench, here(0), 1)  # stopped before it came to them
    assert told() == both
    run_benchmark(make(tmp_path, tiny_data, text.replace("[0]", "[1]")), here(1), 1)
    assert set(both) < set(told())  # and one that asks for too many labels with the other seed
    good = text.replace("stride = [99, 99, 99]", "stride = [16, 16, 16]")
    run_benchmark(make(tmp_path, tiny_data, good), here(), 1)
    assert both[0] not in told()
    assert both[1] in told()


def test_a_run_that_was_scored_otherwise_is_scored_again(tiny_data, tmp_path):
    text = GRID.replace(', { name = "vclipseg" }', "").replace("[0, 1]", "[0]")
    bench = make(tmp_path, tiny_data, text)
    (job,), _ = run_benchmark(bench, here(), 1)
    commands.evaluate(job.folder, None, None, ["evaluate.nsd_tolerance_mm=30"], QUIET, 1)
    again = make(tmp_path, tiny_data, text, record="again")
    (job,), _ = run_benchmark(again, here(), 1)
    assert job.state == "done"
    assert [row.nsd for row in read_runs(again.record)] == [
        row.nsd for row in read_runs(bench.record)
    ]


def test_the_same_run_twice_is_refused(tiny_data, tmp_path):
    twice = (
        '{ name = "vclipseg", label = "dynamic", set = { method = { dlb_weighting = "dynamic" } } }'
    )
    bench = make(
        tmp_path,
        tiny_data,
        GRID.replace('{ name = "vclipseg" }]', '{ name = "vclipseg" }, ' + twice + "]"),
    )
    with pytest.raises(UsageError, match="have the same settings; take one away"):
        bench.jobs()


def test_what_is_missing_is_of_the_grid_as_it_is_written(tiny_data, tmp_path):
    """A call for one seed does not make the grid complete."""
    bench = make(tmp_path, tiny_data)
    path = bench.planner.grid.path
    some = Planner(load_grid(path, (*TINY, "grid.seeds=[1]")), tiny_data, tmp_path / "runs")
    run_benchmark(Benchmark(some, bench.record, QUIET), here(1), 1)
    (facts,) = read_facts(bench.record).values()
    assert (facts.cells, facts.missing) == (4, 3)


def test_one_process_at_a_time_records(tiny_data, tmp_path):
    bench = make(tmp_path, tiny_data)
    elsewhere = Planner(bench.planner.grid, tiny_data, tmp_path / "other-runs")
    with locked(bench.record), pytest.raises(UsageError, match="another process is at work"):
        run_benchmark(Benchmark(elsewhere, bench.record, QUIET), here(0), 1)


def test_a_method_of_two_stages_starts_from_its_first(tiny_data, tmp_path):
    text = GRID.replace('methods = [{ name = "supervised" }, { name = "vclipseg" }]', TWO_STAGES)
    bench = make(tmp_path, tiny_data, text.replace("[0, 1]", "[0]"))
    (job,), _ = run_benchmark(bench, here(), 1)
    assert job.state == "done"
    first = Run.open(job.first_folder)
    assert (first.experiment.method_name, (job.first_folder / "metrics.json").exists()) == (
        "supervised",
        False,
    )
    run = Run.open(job.folder)
    assert run.experiment.train.init_from == str(job.first_folder)
    assert run.settings_hash == job.settings_hash  # known before, without the first stage's folder
    row = read_runs(bench.record)[0]
    assert row.seconds == pytest.approx(run.train_seconds + first.train_seconds)
    assert "starts from 4 steps of supervised (robust)" in (bench.record / "table.md").read_text(
        encoding="utf-8"
    )


def test_folds_and_draws_are_replicates(tiny_data, tmp_path):
    text = GRID.replace("seeds = [0, 1]", "seeds = [0]\nfolds = 2\ndraws = [3]")
    bench = make(tmp_path, tiny_data, text.replace(', { name = "vclipseg" }', ""))
    jobs, _ = run_benchmark(bench, here(), 1)
    assert states(jobs) == ["done"] * 2
    rows = [row for row in read_runs(bench.record) if not row.lcc]
    assert [(row.draw, row.fold) for row in rows] == [(3, 0), (3, 1)]
    tests = [Run.open(job.folder).split.test for job in jobs]
    assert len(set(tests[0]) | set(tests[1])) == 2  # each labeled case is a test case once


# The paper's protocol


@pytest.fixture(scope="module")
def looked(tiny_data, tmp_path_factory):
    """A grid of one cell under both protocols, and the same cell without looks."""
    folder = tmp_path_factory.mktemp("paper")
    text = GRID.replace("[0, 1]", "[0]").replace('{ name = "supervised" }, ', "")
    bench = make(folder, tiny_data, text, paper=True)
    (job,), _ = run_benchmark(bench, here(), 1)
    plain = make(folder, tiny_data, text, record="plain")
    (other,), _ = run_benchmark(plain, here(), 1)
    return bench, job, other


@pytest.mark.slow
def test_looking_at_the_test_set_changes_nothing_in_the_run(looked):
    _, job, other = looked
    assert job.folder.name == f"{other.folder.name}-paper"
    assert job.settings_hash == other.settings_hash
    with_looks, without = (load_model(Run.open(j.folder).model_path)[0] for j in (job, other))
    assert with_looks.keys() == without.keys()
    assert all((with_looks[name] == without[name]).all() for name in without)
    scores = [(j.folder / "cases.csv").read_text(encoding="utf-8") for j in (job, other)]
    assert scores[0] == scores[1]
    assert not (other.folder / "paper").exists()


@pytest.mark.slow
def test_rows_of_both_protocols_are_recorded_and_marked(looked):
    bench, job, _ = looked
    rows = read_runs(bench.record)
    assert [(row.protocol, row.lcc) for row in rows] == [
        ("paper", 0), ("paper", 1), ("strict", 0), ("strict", 1)
    ]  # fmt: skip
    assert {row.settings_hash for row in rows} == {job.settings_hash}
    text = (bench.record / "table.md").read_text(encoding="utf-8")
    strict, _, paper, *_ = text.split("\n## ")[1:]
    assert "Chosen on the test set" in paper
    assert "Chosen on the test set" not in strict
    assert "How much choosing on the test set flatters" in text
    assert states(bench.jobs()) == ["recorded"]


@pytest.mark.slow
def test_a_run_without_looks_is_trained_again_for_them(looked, tiny_data, tmp_path):
    bench, _, _ = looked
    plain = bench.record.parent / "plain"
    again = Benchmark(bench.planner, plain, QUIET)  # it has the strict rows only
    assert states(again.jobs()) == ["finished"]
    strict_only = Benchmark(make(tmp_path, tiny_data).planner, plain, QUIET)
    assert strict_only.jobs()[1].state == "recorded"


# The command line


def run_cli(folder, data, *options):
    path = folder / "grid.toml"
    path.write_text(GRID)
    settings = [part for override in TINY for part in ("--set", override)]
    places = ["--data", data, "--out", folder / "record", "--runs", folder / "runs"]
    command = [
        sys.executable,
        "-m",
        "vclipseg.cli",
        "benchmark",
        path,
        *places,
        *settings,
        *options,
    ]
    return [str(word) for word in command]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tiny_data, tmp_path, finished):
    """Two workers in processes of their own; what comes out is what an unbroken grid gave."""
    command = run_cli(tmp_path, tiny_data, "--workers", "2", "--set", "train.steps=4")
    running = subprocess.Popen(
        command, env=own_environment(1), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/experiment.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130, err
    done = subprocess.run(
        [*command, "--json"], env=own_environment(1), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {cell["state"] for cell in result["cells"]} <= {"done", "recorded"}
    mine = {row.key: row.dice for row in read_runs(tmp_path / "record")}
    assert mine == {row.key: row.dice for row in read_runs(finished / "record")}


@pytest.fixture
def call(run_cli):
    return lambda *words: run_cli("benchmark", *words)


def test_a_dry_run_lists_the_cells(call, tiny_data, tmp_path):
    words = run_cli(tmp_path, tiny_data, "--dry-run")[4:]
    code, out, _ = call(*words)
    assert code == 0
    assert "to do  vclipseg (robust), seed 1\n" in out
    assert out.endswith("4 cells: 4 to do\n")
    assert [cell["state"] for cell in json.loads(call(*words, "--json")[1])] == ["to do"] * 4


def test_data_are_needed_but_for_tables(call, tmp_path):
    path = _write(tmp_path, GRID)
    assert call(path)[0] == 2
    assert "--data" in call(path)[2]
    code, _, err = call(path, "--tables", "--out", tmp_path / "none")
    assert (code, "nothing recorded" in err) == (2, True)


@pytest.mark.slow
def test_tables_and_figure_of_what_is_there(call, finished, tiny_data):
    path = finished / "grid.toml"
    settings = [part for override in TINY for part in ("--set", override)]
    code, out, _ = call(path, "--out", finished / "record", "--tables", *settings)
    assert code == 0
    assert "vclipseg (robust, orthogonal)" in out
    words = (path, "--data", tiny_data, "--out", finished / "record", "--runs", finished / "runs")
    code, out, err = call(*words, "--figure", "median", *settings)
    assert code == 0, err
    (picture,) = (finished / "record").glob("figure-*.png")
    assert str(picture) in out
    assert call(*words, "--figure", "nobody", *settings)[0] == 2


# Time left


def test_the_time_left_is_that_of_the_same_methods(finished_pace):
    pace, supervised, ours, other = finished_pace
    assert pace.left([]) == 0
    assert pace.left([supervised, ours]) == pytest.approx((100 + 400) / 2)
    assert pace.left([other]) == pytest.approx((100 + 400) / 2 / 2)  # unknown: the mean
    pace.add(ours, 600)
    assert pace.left([ours]) == pytest.approx(500 / 2)


@pytest.fixture
def finished_pace(tmp_path):
    text = GRID.replace(
        '{ name = "vclipseg" }', '{ name = "vclipseg" }, { name = "vclipseg", preset = "code" }'
    )
    entries = load_grid(_write(tmp_path, text)).settings.methods
    add_run(tmp_path / "record", entries[0].name, [0.5], dataset="elsewhere", preset="robust")
    pace = Pace(tmp_path / "record", "phantom", 2)
    assert pace.left(entries) is None  # the record knows this method on other data alone
    pace.add(entries[0], 100)
    pace.add(entries[1], 400)
    return pace, *entries


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (150, "2 min"), (5000, "83 min"), (9000, "2 h 30 min")]
)
def test_times_are_spelled(seconds, text):
    assert spell_seconds(seconds) == text
