from __future__ import annotations

from vclipseg import console
from vclipseg.console import Console


def test_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 21.0, 22.0, 42.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Console().bar("train", 4) as advance:
        for step in range(1, 5):
            advance(step, f"loss {step}")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["train: 2/4", "train: 4/4"]
    assert "left" in lines[0]
    assert "left" not in lines[1]
    assert lines[1].endswith("loss 4")


def test_quiet_says_nothing(capsys):
    quiet = Console(quiet=True)
    quiet.note("hello")
    with quiet.bar("train", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_notes_are_plain(capsys):
    Console().note("[bold]x[/bold] 12 " + "long " * 60)
    err = capsys.readouterr().err
    assert err == "[bold]x[/bold] 12 " + "long " * 60 + "\n"


def test_a_bar_on_a_terminal(capsys):
    shown = Console()
    shown.rich._force_terminal = True
    with shown.bar("prepare", 3) as advance:
        advance(1, "case")
        advance(3, "case", total=3)
    assert "prepare" in capsys.readouterr().err


def test_the_end_is_said_once(capsys):
    with Console().bar("check") as advance:
        advance(2, "b", 2)
        advance(2, "b", 2)
    assert capsys.readouterr().err.count("check: 2/2") == 1
