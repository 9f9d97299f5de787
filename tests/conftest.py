"""One thread for every test: results are then the same bit for bit, and small networks faster."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch

from tests.fresh import copy_repository, make_environment

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is in the repository."""
    return copy_repository(tmp_path_factory.mktemp("repository") / "fl-wb")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """Return the programs of an environment in which FL-WB's wheel is installed."""
    return make_environment(tmp_path_factory.mktemp("fresh"), checkout)


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, from which no checkout is in reach."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
