"""The report: which runs belong together, what a row says, and what is drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fl_wb.app.config import compose
from fl_wb.commands import report
from fl_wb.commands.report import markdown, read
from tests.test_simulation import run_in_process

NAMES = ("w1", "frechet", "kid", "energy", "density", "coverage", "memorization")


def write(folder: Path, overrides: str, energy: float, **more: Any) -> None:
    """Write what a run leaves, with the same figures in every step but for the energy."""
    config = asdict(compose(overrides))
    steps = {"few": 0.5, "barycenter": energy + 1, "adapted": energy}
    final = {step: {**dict.fromkeys(NAMES, 0.25), "energy": e} for step, e in steps.items()}
    final["few"]["kid"] = None  # as JSON writes nan
    found = {
        "final": final,
        "targets": {"0": {"adapt-seconds": 2.0 + config["seed"], **more}},
        "bytes": {"generator": 5000, "ternary": []},
        "overrides": overrides,
        "config": config,
    }
    path = folder / overrides.replace("/", "_") / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found), encoding="utf-8")


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of each row of a Markdown table, by its title."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path: Path) -> None:
    # Prepare
    for seed, energy in ((0, 0.1), (1, 0.2), (2, 0.3)):
        write(tmp_path, f"experiment=overlapping strategy=fedavg seed={seed}", energy)
        write(tmp_path, f"experiment=overlapping seed={seed} strategy=fedavg client=plain", 0.4)
    write(tmp_path, "experiment=non_overlapping seed=0", 0.7)

    # Execute
    sections = read([tmp_path])

    # Assert
    assert [section.title for section in sections] == [
        "experiment=non_overlapping",
        "experiment=overlapping strategy=fedavg",
    ]
    table = rows(markdown(sections[1:]))
    assert table[""][:3] == ["coverage", "energy", "memorization"]
    assert table[""][-3:] == ["s", "kB", "n"]
    assert table["adapted"][:2] == ["0.250 ±0.000", "0.200 ±0.100"]
    assert table["adapted"][-3:] == ["3.0 ±1.0", "5.0 ±0.0", "3"]
    assert table["`client=plain`, adapted"][1] == "0.400 ±0.000"
    # What runs share before they part is one row, not one each.
    assert list(table)[2:4] == ["the few samples, resampled", "start"]
    assert sorted(list(table)[4:]) == ["`client=plain`, adapted", "adapted"]
    assert table["the few samples, resampled"][4] == ""


def test_several_sources_are_their_best_and_their_mean(tmp_path: Path) -> None:
    for source, energy in ((0, 0.1), (1, 0.3)):
        for seed in (0, 1):
            overrides = f"strategy=transfer strategy.source={source} seed={seed}"
            write(tmp_path, overrides, energy + seed * 0.02)
    write(tmp_path, "strategy=full_data seed=0", 0.05)

    table = rows(markdown(read([tmp_path])))

    title = "`strategy=transfer`, adapted, "
    assert table[title + "best of 2 sources (by energy)"][1] == "0.110 ±0.014"
    assert table[title + "mean of 2 sources"][1] == "0.210 ±0.014"
    assert table["`strategy=full_data`, adapted"][1] == "0.050"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"final": {}}'])
def test_what_is_no_run_is_named(
    tmp_path: Path,
    content: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["fl-wb-report", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        report.main()


def test_a_real_run_is_reported_with_its_convergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Prepare
    snapshots = "client.evaluation.snapshots=2"
    more = ("client.evaluation.bank=true", "client.evaluation.draws=2", snapshots)
    run_in_process(tmp_path / "run", *more)

    # Execute
    arguments = ["fl-wb-report", str(tmp_path / "run"), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit, match=r'pip install "fl-wb\[plots\]"'):
            report.main()
    else:
        report.main()
        assert (tmp_path / "plots" / "convergence-0.png").read_bytes().startswith(b"\x89PNG")

    # Assert
    table = rows(capsys.readouterr().out)
    for title in (
        "the few samples, resampled",
        "raw variation bank",
        "start",
        "own weights",
        "adapted",
        "ternary",
    ):
        assert float(table[next(row for row in table if row.endswith(title))][0]) >= 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    target = found["targets"]["0"]
    assert target["curve"]["iterations"] == [0, 1, 2]
    assert target["curve"]["seconds"] == sorted(target["curve"]["seconds"])
    for name in NAMES:  # it begins with the start, and ends with what was adapted
        assert target["curve"][name][0] == found["final"]["reweighted"][name]
        assert target["curve"][name][-1] == found["final"]["adapted"][name]
    assert found["final"]["few"]["memorization"] == 0
    sizes = found["bytes"]
    assert sizes["generator"] < sizes["generator-on-the-wire"]
    assert sizes["generator-on-disk"] == (tmp_path / "run/barycenter.safetensors").stat().st_size


def test_what_a_stranger_calls_its_metrics_breaks_no_report(tmp_path: Path) -> None:
    write(tmp_path, "seed=0", 0.5, curve=1.0)
    path = tmp_path / "seed=0" / "metrics.json"
    run = json.loads(path.read_text())
    run["final"]["ternary"] = run["final"]["adapted"]  # and no packed file beside
    path.write_text(json.dumps(run))
    (section,) = read([tmp_path])
    assert [row.step for row in section.rows.values()][-1] == "ternary"
    assert not any(row.curves for row in section.rows.values())
