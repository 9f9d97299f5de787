"""What made a result: versions, commit, device and seeds."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fl_wb.app.schema import Config
from fl_wb.barycenter import VERSION


def provenance(config: Config) -> dict[str, Any]:
    """Return what a result file says of its making; None where there is nothing to say."""
    return {
        "version": _version(),
        "algorithm": VERSION,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": config.device,
        "seeds": {"run": config.seed, "data": config.data.seed},
    }


def comparable(made_by: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must be the same for two results to stand in one table."""
    return made_by.get("version"), made_by.get("algorithm")


def _version() -> str | None:
    try:
        return version("fl-wb")
    except PackageNotFoundError:  # a plain checkout
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
