"""A made-up record: supervised and VCLIPSeg on eight cases, two seeds."""

from __future__ import annotations

import pytest

from made_records import BASE, GAIN, add_run


@pytest.fixture
def grid(tmp_path):
    add_run(tmp_path, "vclipseg", BASE + GAIN, seed=1)
    add_run(tmp_path, "vclipseg", BASE + GAIN + 0.02, seed=0)
    add_run(tmp_path, "supervised", BASE, seed=0, text="")
    add_run(tmp_path, "supervised", BASE + 0.01, seed=1, text="")
    return tmp_path
