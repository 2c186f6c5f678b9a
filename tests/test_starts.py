"""The state of a run when its pseudo-labels began: what goes into the record."""

import csv
import importlib
import sys
from pathlib import Path

import pytest

from vclipseg import records
from vclipseg.errors import UsageError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
starts = importlib.import_module("starts")

GRID = ROOT / "results/la-1.25mm-ablation"


@pytest.fixture
def runs():
    """The runs of VCLIPSeg in a grid, as a record has them."""
    kept = (r for r in records.read_runs(GRID) if r.protocol == "strict" and not r.lcc)
    return [r for r in kept if r.method == "vclipseg"]


def logged(path, shares, losses=(0.5, 0.3, 0.2)):
    lines = zip((10, 20, 30), losses, shares, strict=True)
    path.write_text(
        "step,supervised,pseudo_share\n" + "".join(f"{s},{loss},{p}\n" for s, loss, p in lines)
    )
    return path


def test_a_row_has_the_loss_of_its_step_beside_the_dice(runs, tmp_path):
    row = starts.row(runs[0], logged(tmp_path / "log.csv", shares=(0, 0, 1)), step=20)
    assert (row["step"], float(row["supervised"]), row["dice"]) == (20, 0.3, runs[0].dice)
    assert set(row) == set(starts.COLUMNS)


def test_a_run_without_pseudo_labels_has_no_row(runs, tmp_path):
    assert starts.row(runs[0], logged(tmp_path / "log.csv", shares=(0, 0, 0)), step=20) is None


def test_a_step_that_was_not_logged_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="no line of step 25"):
        starts.row(runs[0], logged(tmp_path / "log.csv", shares=(0, 0, 1)), step=25)


def test_runs_without_a_folder_are_counted(runs, tmp_path, monkeypatch, capsys):
    losses = [(0.5, 1 - run.dice, 0.2) for run in runs[:4]]  # the surer, the better
    logs = {
        run.settings_hash: logged(tmp_path / run.settings_hash, (0, 0, 1), loss)
        for run, loss in zip(runs, losses, strict=False)
    }
    monkeypatch.setattr(starts, "logs_of", lambda _: logs)
    record = tmp_path / "starts.csv"
    asked = f"starts.py {GRID} {tmp_path} --method vclipseg --step 20 --record {record}"
    monkeypatch.setattr(sys, "argv", asked.split())
    starts.main()
    assert capsys.readouterr().out == f"4 runs, Spearman -1.00; {len(runs) - 4} without a folder\n"
    with record.open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == [str(r.seed) for r in runs[:4]]
