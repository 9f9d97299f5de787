"""The attacks' own command: what it sees of a run that ends well, and of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import attacks
from benchmarks.attacks import Attack, Outcome, in_a_process_of_its_own
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.data import datasets
from tests.test_simulation import TINY

SETTINGS = (*attacks.SETTINGS, *TINY, "client.evaluation.most=20", "client.ternarize=false")
CONFIG = compose(SETTINGS)


def test_a_rare_latent_makes_nan_and_no_other() -> None:
    network = attacks.rarely_nan(factories(CONFIG)[0]()).eval()
    z = torch.randn(200, 32).clamp(-3, 3)
    assert torch.isfinite(network(z)).all()
    z[7, 0] = 3.4
    assert network(z).isfinite().flatten(1).all(1).logical_not().nonzero().tolist() == [[7]]


def run(attack: Attack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    monkeypatch.setattr(attacks, "SETTINGS", SETTINGS)
    real = datasets.load(CONFIG.data)[0].images[:50]
    return in_a_process_of_its_own(attack, folder / "cache", folder / "output", real)


def test_an_attacked_run_ends_well_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(attacks.attacks(CONFIG)["nan where z_0 > 3.3"], tmp_path, monkeypatch)
    assert (found.ended, found.lost) == ("", [])
    assert any("dropped the upload of node 18" in text for text in found.said), found.said


def test_a_run_that_does_not_end_well_is_told_from_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = Attack("train", nodes=tuple(range(11, 19)), error="no")
    found = run(everybody, tmp_path, monkeypatch)
    assert "RuntimeError" in found.ended and "targets 0" in found.lost
