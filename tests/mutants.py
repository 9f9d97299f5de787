"""Slips in the mathematics that the tests must find: `python -m tests.mutants`.

Each is made in a copy of the package, where the tests that should find it are run. Prints the ones
that survive, and fails if there are any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A slip: in this file, what the pattern finds is replaced; these tests should fail."""

    name: str
    file: str
    pattern: str
    replacement: str
    tests: str = "tests/test_mutants.py"


MUTANTS = (
    Mutant(
        "both critics are given the first measure",
        "fl_wb/barycenter/merge.py",
        r"(self\._on_device\(measure\), rng\) for measure in measures)\]",
        r"\1[:1] * 2]",
    ),
    Mutant("no fidelity", "fl_wb/barycenter/merge.py", r"settings\.fidelity", "0.0"),
    Mutant("no energy", "fl_wb/ternary/ternarization.py", r"settings\.energy", "0.0"),
    Mutant(
        "latents not turned", "fl_wb/ternary/ternarization.py", r"= turned\(teacher.*", "= teacher"
    ),
    Mutant("no limit", "fl_wb/generators/mixture.py", r"min\(number, most\)", "number"),
)


def passes(tests: Iterable[str], folder: Path) -> bool:
    """Whether these tests pass in this copy of the package."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return not subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL
    ).returncode


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests pass in spite of the slip."""
    path = folder / mutant.file
    right = path.read_text()
    wrong, found = re.subn(mutant.pattern, mutant.replacement, right, flags=re.MULTILINE)
    if not found:
        raise SystemExit(f"{mutant.name}: nothing in {mutant.file} is like {mutant.pattern}")
    path.write_text(wrong)
    try:
        return passes([mutant.tests], folder)
    finally:
        path.write_text(right)


def main() -> None:
    """Try every mutant."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored)
        if not passes({mutant.tests for mutant in MUTANTS}, folder):
            raise SystemExit("the tests fail before any slip")
        alive = [mutant.name for mutant in MUTANTS if survives(mutant, folder)]
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} die")
    if alive:
        raise SystemExit(f"these survive: {'; '.join(alive)}")


if __name__ == "__main__":
    main()
