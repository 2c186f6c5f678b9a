from __future__ import annotations

import torch

from vclipseg.methods.base import Loss, Term
from vclipseg.runlog import RunLog, read_log


def loss(value, weight=0.5, **facts):
    return Loss(facts=facts, dice=Term(weight, torch.tensor(value, requires_grad=True)))


def test_rows_are_means_since_the_last(tmp_path):
    log = RunLog(tmp_path)
    for value in (1.0, 2.0):
        log.add(loss(value, share=torch.tensor(value / 4)))
    row = log.row(2, lr=0.1)
    assert (row["dice"], row["total"], row["dice_weight"], row["share"]) == (1.5, 0.75, 0.5, 0.375)
    log.add(loss(4.0, weight=1.0, share=0.5))
    log.row(3, lr=0.05)
    log.close()
    rows = read_log(tmp_path / "log.csv")
    assert list(rows[0]) == ["step", "seconds", "lr", "total", "dice", "share", "dice_weight"]
    assert [(r["step"], r["lr"], r["dice"], r["total"]) for r in rows] == [
        ("2", "0.1", "1.5", "0.75"),
        ("3", "0.05", "4", "4"),
    ]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.add(loss(float(step)))
        log.row(step, 0.1)
    log.close()
    again = RunLog(tmp_path, first_step=2)
    assert [row["step"] for row in again.rows] == ["1", "2"]
    again.add(loss(9.0))
    again.row(3, 0.1)
    again.close()
    assert [row["dice"] for row in read_log(tmp_path / "log.csv")] == ["1", "2", "9"]


def test_an_open_stretch_is_carried_over(tmp_path):
    log = RunLog(tmp_path)
    log.add(loss(1.0))
    again = RunLog(tmp_path)
    again.load_state_dict(log.state_dict())
    again.add(loss(3.0))
    assert again.row(2, 0.1)["dice"] == 2
    assert log.count == 1


def test_seconds_go_on(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr("vclipseg.runlog.time.monotonic", lambda: next(clock))
    log = RunLog(tmp_path)
    log.add(loss(1.0))
    assert log.row(1, 0.1)["seconds"] == 10
    log.write()
    assert RunLog(tmp_path, first_step=1).seconds == 15


def test_columns_may_come_later(tmp_path):
    log = RunLog(tmp_path)
    log.add(loss(1.0))
    log.row(1, 0.1)
    log.add(loss(1.0, late=0.5))
    log.row(2, 0.1)
    log.close()
    assert [row["late"] for row in read_log(tmp_path / "log.csv")] == ["", "0.5"]


def test_no_log_no_rows(tmp_path):
    assert read_log(tmp_path / "log.csv") == []


def test_tensorboard(tmp_path):
    log = RunLog(tmp_path, tensorboard=True)
    log.add(loss(1.0))
    log.row(1, 0.1)
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())
