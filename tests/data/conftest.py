"""Fixtures of more than one test file of the data layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import broken
import pytest


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without a problem, to look at only."""
    return broken.make_healthy(tmp_path_factory.mktemp("healthy"))


@pytest.fixture
def breakable(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return shutil.copytree(healthy, tmp_path / "data")
