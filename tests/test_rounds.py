"""The benchmark of rounds: who gets which digits, and what an interrupted one keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rounds
from tests.toys import STAGE


@pytest.mark.parametrize("split", rounds.SPLITS)
def test_every_digit_is_one_nodes_or_held_out(split: str) -> None:
    images, held_out = rounds.digits(split, 4, seed=10)

    assert len(held_out) == 360
    everything = torch.cat([*images, held_out]).flatten(1)
    assert len(everything) == 1797 == len(everything.unique(dim=0))


def test_what_was_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Prepare
    monkeypatch.setattr("fl_wb.barycenter.recursion.Stage", lambda: STAGE)
    monkeypatch.setattr(rounds, "STEPS", 12)
    monkeypatch.setattr(rounds, "DRAWS", 1)
    words = f"rounds {tmp_path} --splits iid --nodes 2 --seeds 10 --rounds 2 --methods".split()

    def benchmark(*methods: str) -> tuple[list[str], list[str]]:
        """Return what was run, and the table's rows."""
        monkeypatch.setattr(sys, "argv", [*words, *methods])
        rounds.main()
        lines = capsys.readouterr().out.splitlines()
        return [n for n in lines if n.startswith("#")], [n for n in lines if "energy" in n]

    # Execute and assert
    ran, rows = benchmark("fedavg")
    assert (len(ran), len(rows)) == (1, 1)
    ran, rows = benchmark("fedavg", "ours")
    assert len(ran) == 1 and "method='ours'" in ran[0] and len(rows) == 2
    assert benchmark("fedavg", "ours") == ([], rows)
    mine, other = (found[-1] for found in rounds.load(tmp_path / "rounds.jsonl").values())
    assert mine != other and mine["pool energy"] != mine["energy"]
