"""How long a stage will take is said before, and a budget of seconds is kept."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.sampling import generate
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from tests.points import Gaussian, critic, same

PAUSE = 0.01  # seconds


class Slow(Gaussian):
    """A network whose every step takes its time."""

    def __init__(self, mean: Sequence[float], pause: float) -> None:
        super().__init__(mean)
        self.pause = pause

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.pause)
        return super().forward(z)


def merge(iterations: int, *, wgan: int = 0, pause: float = 0.0, **arguments: Any) -> nn.Module:
    stage = Stage(
        distillation=Distillation(iterations=iterations, batch_size=8),
        training=Training(iterations=wgan, batch_size=8, critic_steps=1, warmup=10),
    )
    sources = [Slow(mean, pause) for mean in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
    return recursive_barycenter(sources, stage=stage, critic=critic, **arguments)


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flwr")


@pytest.mark.parametrize("wgan", [0, 40])
def test_a_stage_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture, wgan: int) -> None:
    merge(210, wgan=wgan, pause=PAUSE)

    (said,) = re.findall(rf"Stage 1 of 1: about (\d+) s \({210 + wgan} iterations\)", caplog.text)
    steps = 210 + 3 * wgan  # an iteration of the WGAN calls the network thrice
    assert 0.75 * steps * PAUSE <= int(said) <= 4 * steps * PAUSE


def test_every_stage_that_is_trained_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(201, fan_in=2, store=tmp_path)
    assert re.findall(r"Stage (\d of \d)", caplog.text) == ["1 of 2", "2 of 2"]

    caplog.clear()
    merge(201, fan_in=2, store=tmp_path)
    assert not caplog.records


def test_a_budget_is_kept_and_its_iterations_make_the_same_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nu = merge(100_000, fan_in=2, budget=3.0, pause=PAUSE)

    (chosen,) = re.findall(
        r"a budget of 1.5 s a stage: ([\d,]+) of 100,000 iterations", caplog.text
    )
    iterations = int(chosen.replace(",", ""))
    assert 1.5 / PAUSE / 8 <= iterations <= 1.5 / PAUSE
    assert same(nu, merge(iterations, fan_in=2))


def test_a_budget_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    free = merge(201, store=tmp_path)

    assert same(merge(201, budget=1e6), free)
    assert same(merge(201, budget=1e6, store=tmp_path), free)
    assert len(list((tmp_path / "stages").iterdir())) == 1


def test_a_budget_is_seconds() -> None:
    with pytest.raises(ValueError, match="budget=0 must be more than 0"):
        merge(201, budget=0)


def test_the_quick_stage_draws_fewer_pairs(caplog: pytest.LogCaptureFixture) -> None:
    quick, usual = (s.distillation for s in (Stage.quick(), Stage()))
    assert quick.iterations * quick.batch_size < usual.iterations * usual.batch_size / 5
    nu = recursive_barycenter([Gaussian((0.0, 0.0)), Gaussian((1.0, 0.0))], stage=Stage.quick())

    assert "(2,500 iterations)" in caplog.text
    torch.testing.assert_close(
        generate(nu, 4000).mean(0), torch.tensor([0.5, 0.0]), atol=0.05, rtol=0
    )
