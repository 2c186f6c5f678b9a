"""That the table of speed can be measured; the figures themselves are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"
ROWS = 11


@pytest.mark.slow
def test_every_row_is_measured(tmp_path):
    record = tmp_path / "speed.json"
    command = [sys.executable, str(SCRIPT), "--small", "--threads", "1", "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(record.read_text(encoding="utf-8"))
    assert len(rows) == ROWS == len(done.stdout.splitlines())
    for row in rows:
        assert row["ours"] >= 0
        assert row["reference"] is None or row["reference"] > 0
    by_name = {row["name"]: row for row in rows}
    assert (
        "100.00000% of the voxels alike"
        in by_name["predicting 20 scans, the paper's windows"]["note"]
    )
