"""Where cells run: environment, reasons of failures, a cluster that is made up."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

import vclipseg
from vclipseg.benchmark import launch
from vclipseg.benchmark.cells import Order, locked
from vclipseg.errors import UsageError

ORDERS = [Order(name, {}, f"runs/{name}", "data") for name in ("a", "b", "c")]


def test_cells_use_the_source_of_their_parent(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = launch.own_environment(3)
    source, rest = environment["PYTHONPATH"].split(os.pathsep)
    assert Path(source) == Path(vclipseg.__file__).parents[1]
    assert rest == "elsewhere"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_each_worker_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    """With three workers on two of them two share one; a place that gets free keeps its GPU."""
    given = []

    class Process:
        def __init__(self, order, threads, gpu):
            self.order = order
            given.append((order.folder, gpu))

        ended = True

        def result(self):
            return launch.Ended(self.order, "done")

        def stop(self, number):
            pass

    monkeypatch.setattr(launch, "_Process", Process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b")
    ended = list(launch.local(3, 1)(ORDERS, lambda: 0))
    assert len(ended) == 3
    assert [gpu for _, gpu in given] == ["4", "GPU-b", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    assert launch.visible_gpus() == ["0", "1"]
    assert launch.own_environment(1, "1")["CUDA_VISIBLE_DEVICES"] == "1"


def test_no_worker_waits_for_a_first_stage_while_there_is_other_work():
    """Cells 1 and 2 share the first stage "f"; cell 3 has none."""
    one, two = (Order(name, {}, name, "data", first_folder="f") for name in ("1", "2"))
    three = Order("3", {}, "3", "data")
    assert launch.next_order([one, two, three], []) is one
    assert launch.next_order([two, three], [one]) is three
    assert launch.next_order([two], [one]) is two


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loading\nerror: no such data\n", "no such data"),
        ("Traceback (most recent call last):\n  x\nRuntimeError: out of luck\nbye\n", "RuntimeError: out"),
        ("torch.cuda.OutOfMemoryError: much\n", "torch.cuda.OutOfMemoryError: much"),
        ("Killed\n", "Killed"),
        ("", "nothing"),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_error(tmp_path, text, said):
    log = tmp_path / "stderr.txt"
    log.write_text(text)
    reason = launch.reason(log, 5)
    assert reason.startswith(said)
    assert reason.endswith(f"(exit code 5; {log})")


def test_orders_survive_json():
    order = Order("a", {"train": {"lr": 0.1}}, "runs/a", "data", True, {"x": 1}, "runs/first")
    assert Order.from_json(order.to_json()) == order


def test_one_at_a_time_in_a_folder(tmp_path):
    busy = pytest.raises(UsageError, match="another process")
    with locked(tmp_path / "run"), busy, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


# A cluster


class Job:
    def __init__(self, function, order):
        self.error = None
        try:
            function(order)
        except Exception as error:
            self.error = error

    def done(self):
        return True

    def exception(self):
        return self.error


class Executor:
    made: ClassVar[list[Executor]] = []

    def __init__(self, folder, cluster):
        if cluster not in ("slurm", "local", "debug"):
            raise ValueError(f"unknown cluster {cluster}")
        self.folder, self.cluster, self.parameters = folder, cluster, {}
        Executor.made.append(self)

    def update_parameters(self, **parameters):
        if "nonsense" in parameters:
            raise NameError("unknown argument nonsense")
        self.parameters |= parameters

    def map_array(self, function, orders):
        return [Job(function, order) for order in orders]


@pytest.fixture
def submitit(monkeypatch):
    module = types.ModuleType("submitit")
    module.AutoExecutor = Executor
    module.helpers = types.SimpleNamespace(DelayedSubmission=lambda *given: given)
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    Executor.made.clear()
    return module


def test_a_cluster_runs_every_order_and_tells_what_failed(submitit, monkeypatch, tmp_path):
    ran = []

    def run_cell(order, console):
        ran.append(order.title)
        if order.title == "b":
            raise UsageError("first line\nthe reason")

    monkeypatch.setattr(launch, "run_cell", run_cell)
    given = ["slurm_partition=gpu", "gpus_per_node=1"]
    run = launch.launcher("debug", given, tmp_path, 4, 2)
    ended = {end.order.title: (end.state, end.why) for end in run(ORDERS, lambda: 0)}
    assert ran == ["a", "b", "c"]
    assert ended == {"a": ("done", ""), "b": ("failed", "the reason"), "c": ("done", "")}
    (executor,) = Executor.made
    assert executor.parameters == {
        "name": "vclipseg",
        "cpus_per_task": 2,
        "slurm_array_parallelism": 4,
        "slurm_partition": "gpu",
        "gpus_per_node": 1,
    }
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_job_that_is_interrupted_is_submitted_again(submitit):
    job = launch.ClusterJob()
    assert job.checkpoint(ORDERS[0]) == (job, ORDERS[0])


def test_a_cluster_that_is_stopped_leaves_its_jobs(submitit, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "run_cell", lambda order, console: None)
    run = launch.launcher("debug", [], tmp_path, 1, 1)
    assert list(run(ORDERS, lambda: 2)) == []


@pytest.mark.parametrize(("kind", "given"), [("pbs", []), ("slurm", ["nonsense=1"])])
def test_what_submitit_refuses_is_told(submitit, tmp_path, kind, given):
    with pytest.raises(UsageError, match=f"--cluster {kind}: unknown"):
        launch.launcher(kind, given, tmp_path, 1, 1)


def test_without_submitit_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'vclipseg\[cluster\]'"):
        launch.launcher("slurm", [], tmp_path, 1, 1)


def test_parameters_of_the_cluster():
    given = ["timeout_min=600", "slurm_partition=gpu", 'slurm_additional_parameters={"qos": "x"}']
    assert launch.read_parameters(given) == {
        "timeout_min": 600,
        "slurm_partition": "gpu",
        "slurm_additional_parameters": {"qos": "x"},
    }
    with pytest.raises(UsageError, match="key=value"):
        launch.read_parameters(["gpu"])
