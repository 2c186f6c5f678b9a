from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from made_records import make_record, make_scores
from vclipseg import records
from vclipseg.errors import DataError


def test_columns_are_the_documented_ones():
    assert ",".join(records.RUN_COLUMNS) == (
        "settings_hash,dataset,method,preset,text,labeled,draw,fold,seed,filters,steps,protocol,"
        "weights,lcc,dice,jaccard,hd95_voxel,asd_voxel,hd95_mm,assd_mm,nsd,failures,seconds,"
        "device,commit"
    )


def test_settings_hash_ignores_order_and_nothing_else():
    settings = {"train": {"steps": 10, "seed": 1}, "data": "sha256:0"}
    same = {"data": "sha256:0", "train": {"seed": 1, "steps": 10}}
    first = records.settings_hash(settings)
    assert len(first) == 12
    assert set(first) <= set("0123456789abcdef")
    assert records.settings_hash(same) == first
    assert records.settings_hash({**settings, "data": "sha256:1"}) != first
    with pytest.raises(ValueError, match="JSON"):
        records.settings_hash({"lr": math.nan})


def test_settings_hash_is_pinned():
    """Committed records are found by it, so it may not change."""
    assert records.settings_hash({"seed": 0, "method": "vclipseg"}) == "d1b7f80ddb61"


def test_a_record_has_the_means_and_the_failures():
    scores = make_scores(failures=1)
    row = make_record(scores)
    assert row.dice == pytest.approx((0 + 0.7 + 0.9) / 3)
    assert row.hd95_mm == 2.0
    assert row.failures == 1
    assert make_record(scores, lcc=True).dice == pytest.approx((0 + 0.75 + 0.95) / 3)
    assert make_record(scores, protocol="paper").hd95_mm == pytest.approx(4 / 3)


def test_records_are_read_back(tmp_path):
    scores = make_scores(failures=1)
    rows = [make_record(scores), make_record(scores, lcc=True, draw=3, fold=1)]
    records.record(tmp_path / "results" / "la", rows, scores)
    read = records.read_runs(tmp_path / "results" / "la")
    assert [row.key for row in read] == [row.key for row in rows]
    assert (read[0].draw, read[1].draw, read[1].fold) == (None, 3, 1)
    assert read[0].dice == pytest.approx(rows[0].dice, abs=1e-6)
    cases = records.read_cases(tmp_path / "results" / "la")
    assert [score.case_id for score in cases[rows[0].key]] == ["c0", "c1", "c2"]
    assert [score.lcc for score in cases[rows[1].key]] == [1, 1, 1]


def test_undefined_means_are_empty_cells(tmp_path):
    scores = make_scores(failures=3)
    records.record(tmp_path, [make_record(scores)], scores)
    with (tmp_path / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["hd95_mm"], row["dice"], row["draw"]) == ("", "0", "")
    assert math.isnan(records.read_runs(tmp_path)[0].hd95_mm)


def test_a_run_recorded_again_replaces_its_rows(tmp_path):
    both = [make_record(), make_record(lcc=True)]
    other = make_record(settings_hash="other0000000", method="supervised")
    records.record(tmp_path, both, make_scores())
    records.record(tmp_path, [other], make_scores())
    before = (tmp_path / "runs.csv").read_text(encoding="utf-8")
    records.record(tmp_path, [other], make_scores())
    assert (tmp_path / "runs.csv").read_text(encoding="utf-8") == before
    records.record(tmp_path, [make_record(make_scores((0.6,)))], make_scores((0.6,)))
    read = records.read_runs(tmp_path)
    assert [(row.settings_hash, row.lcc) for row in read] == [
        ("other0000000", 0),
        ("0123456789ab", 0),
    ]
    cases = records.read_cases(tmp_path)
    assert [score.dice for score in cases[both[0].key]] == [0.6]
    assert both[1].key not in cases


def test_a_grid_knows_what_it_has(tmp_path):
    assert records.recorded(tmp_path) == set()
    records.record(tmp_path, [make_record()], make_scores())
    records.record(tmp_path, [make_record(settings_hash="second")], make_scores())
    assert records.recorded(tmp_path) == {"0123456789ab", "second"}


def test_forgetting_a_run(tmp_path):
    records.record(tmp_path, [make_record(), make_record(lcc=True)], make_scores())
    kept = make_record(settings_hash="kept", method="supervised")
    records.record(tmp_path, [kept], make_scores())
    for other in ({"dataset": "elsewhere"}, {"seed": 3}, {"text": "clip"}, {"steps": 15000}):
        assert records.forget(tmp_path, {make_record(**other).place}) == 0
    assert records.forget(tmp_path, {make_record().place}) == 1
    assert records.recorded(tmp_path) == {"kept"}
    assert records.forget(tmp_path, {make_record().place}) == 0


def test_an_interrupted_recording_is_not_recorded(tmp_path, monkeypatch):
    """cases.csv comes first: without its row in runs.csv the run is run again."""
    monkeypatch.setattr(records, "write_rows", only_cases(records.write_rows))
    with pytest.raises(KeyboardInterrupt):
        records.record(tmp_path, [make_record()], make_scores())
    assert (tmp_path / "cases.csv").is_file()
    assert records.recorded(tmp_path) == set()


def only_cases(write):
    def interrupted(path, *rest):
        if path.name != "cases.csv":
            raise KeyboardInterrupt
        write(path, *rest)

    return interrupted


def test_one_run_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="one run"):
        records.record(tmp_path, [make_record(), make_record(settings_hash="b")], make_scores())


@pytest.mark.parametrize("name", ["runs.csv", "cases.csv"])
def test_a_broken_table_is_named(tmp_path, name):
    (tmp_path / name).write_text("settings_hash,protocol,weights,lcc\nx,strict,last,0\n")
    read = records.read_runs if name == "runs.csv" else records.read_cases
    with pytest.raises(DataError, match=name):
        read(tmp_path)


def test_replicates_differ_in_seed_draw_or_fold():
    row = make_record()
    others = [replace(row, seed=2), replace(row, draw=1), replace(row, fold=1)]
    assert len({row.replicate, *(other.replicate for other in others)}) == 4
    assert replace(row, steps=1).replicate == row.replicate
    assert np.isfinite(row.dice)
