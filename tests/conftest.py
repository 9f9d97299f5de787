"""One thread for every test: results are then the same bit for bit, and small networks faster."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import numpy as np
import pytest
import torch
from filelock import FileLock

from fl_wb.training.distillation import Distillation
from tests.fresh import copy_repository, make_environment

torch.set_num_threads(1)


LONG = ("test_deployment", "test_ray", "test_simulation", "test_surroundings")
"""Files that wait minutes for processes: begun last, they would be left alone with a core."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; the others stay in their order."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """Leave what all tests share, a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin each test, fixtures included, in one random state: none hangs on those before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def quick_gates(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fit gates and adapt in a fraction of the time, but in the tests of how good that is."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in ("test_gate", "test_likeness", "test_own_barycenter"):
            hasten(patch)
            # neighbours are sought among so many samples, each of which is compared with each
            patch.setattr("fl_wb.adaptation.likeness.WALKED", 500)
        if request.path.stem not in ("test_adaptation", "test_variation", "test_gate"):
            patch.setattr("fl_wb.adaptation.fast_adaptation.POOL", 1000)
        if request.path.stem not in ("test_own_barycenter", "test_conditional_flower", "test_gate"):
            patch.setattr("fl_wb.adaptation.weights.FOLDING", Distillation(100))
        if request.path.stem not in ("test_metrics", "test_conditional", "test_conditional_flower"):
            # a classifier as good as can be is not asked for; others have one of their own
            patch.setattr("fl_wb.metrics.features.STEPS", 300)
            patch.setattr("fl_wb.metrics.features._cache", {})
        yield


@pytest.fixture
def quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do so for one test of those modules, too, which asks what becomes of a gate."""
    hasten(monkeypatch)


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Have gates learned from few latents, in few steps."""
    patch.setattr("fl_wb.adaptation.likeness.WALKED", 1000)
    patch.setattr("fl_wb.adaptation.gates.WALKED", 1000)
    patch.setattr("fl_wb.adaptation.gates.LATENTS", 4000)
    patch.setattr("fl_wb.adaptation.gates.ITERATIONS", 200)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is in the repository."""
    return copy_repository(tmp_path_factory.mktemp("repository") / "fl-wb")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, checkout: Path, worker_id: str) -> Path:
    """Return the programs of an environment in which FL-WB's wheel is installed.

    All workers share it: the first that asks for it makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "fresh"
    with FileLock(folder.with_suffix(".lock")):
        made = folder / "programs"  # written last, with where they are
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made.write_text(str(make_environment(folder, checkout)), "utf-8")
        return Path(made.read_text("utf-8"))


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, from which no checkout is in reach."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
