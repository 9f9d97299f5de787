"""The page's command: whose tables are replaced, and that figures of two versions never meet."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.baselines import check_version
from benchmarks.evidence import Piece, filled, pieces_of
from fl_wb.app.config import compose
from fl_wb.app.provenance import provenance

PAGE = """# Figures

Of the commit `0123abc`.

```sh
.venv/bin/python -m benchmarks.one MNIST --root=MNIST \\
    --seeds 10
```

| a | b |
|---|---|
| old | 1 |

```sh
.venv/bin/python -m benchmarks.two
```

Words, and then a table that nobody makes:

| kept |
|---|
"""
COMMAND = "-m benchmarks.one MNIST --root=MNIST \\\n    --seeds 10"


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    config, result = compose("data=digits seed=3"), tmp_path / "metrics.json"
    made_by = provenance(config)
    assert made_by["seeds"] == {"run": 3, "data": config.data.seed}
    result.write_text(json.dumps({"made-by": made_by}))
    check_version(result, config)
    for other in ({}, {"made-by": {**made_by, "algorithm": 0}}):
        result.write_text(json.dumps(other))
        with pytest.raises(SystemExit, match="use another --output"):
            check_version(result, config)


def test_the_last_table_that_a_command_prints_takes_the_place_of_the_old(tmp_path: Path) -> None:
    (piece,) = pieces_of(PAGE, tmp_path)
    assert piece.command == COMMAND
    first, last = "|  | b |\n|---|----|\n| x | 2 |\n", "|    |   b |\n|----|----:|\n| y  |  3 |\n"
    page = filled(PAGE, {COMMAND: f"# after seed 10\n{first}\n{last}"})
    old, new = "| a | b |\n|---|---|\n| old | 1 |", "|  | b |\n|---|---|\n| y | 3 |"
    assert page == PAGE.replace(old, new)
    assert filled(PAGE, {}) == PAGE


def test_a_command_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("import sys\nprint('| x |\\n|---|\\n|', sys.argv[1:], '|')\n")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    piece = Piece(COMMAND, tmp_path / "kept.txt")
    piece.run({"MNIST": "/there"})
    printed = piece.printed()
    assert printed is not None
    assert "['/there', '--root=/there', '--seeds', '10']" in printed
    (package / "one.py").write_text("raise SystemExit(3)\n")
    piece.run({})  # it is there
    assert piece.printed() == printed
    failed = Piece(COMMAND, tmp_path / "failed.txt")
    failed.run({})
    assert failed.printed() is None
    assert "# failed (3): -m benchmarks.one" in capfd.readouterr().out


def test_the_page_is_made_of_committed_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        own = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("print('| new |\\n|---|\\n| 2 |')\n")
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "feat: one")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    arguments = ["all", "--page", str(page), "--folder", str(tmp_path / "kept")]
    evidence.main(arguments)
    made = page.read_text()
    assert "| new |\n|---|\n| 2 |" in made
    assert "Of the commit `0123abc`" not in made
    (package / "one.py").write_text("print(1)\n")
    with pytest.raises(SystemExit, match=r"not committed.*\n.*one\.py"):
        evidence.main(arguments)
    (package / "one.py").write_text("print('| newer |\\n|---|\\n| 3 |')\n")
    git("commit", "-qam", "feat: another")
    evidence.main(arguments)
    assert "| newer |\n|---|\n| 3 |" in page.read_text()  # not what other code printed


def test_the_page_names_commands_that_exist() -> None:
    page = evidence.ROOT / "docs" / "results.md"
    pieces = pieces_of(page.read_text("utf-8"), Path("evidence"))
    assert len(pieces) > 5
    for module in {piece.command.split()[1] for piece in pieces}:
        assert importlib.util.find_spec(module), module
