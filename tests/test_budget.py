"""How long a stage will take is said before, and a budget of seconds is kept."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from tests.points import Gaussian, critic, same

PAUSE = 0.02  # seconds


class Slow(Gaussian):
    """A network whose every step takes its time."""

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            time.sleep(PAUSE)
        return super().forward(z)


def merge(iterations: int, *, wgan: int = 0, **arguments: object) -> nn.Module:
    stage = Stage(
        distillation=Distillation(iterations=iterations, batch_size=8),
        training=Training(iterations=wgan, batch_size=8, critic_steps=1, warmup=10),
    )
    sources = [Slow((0.0, 0.0)), Slow((1.0, 0.0)), Slow((0.0, 1.0))]
    return recursive_barycenter(sources, stage=stage, critic=critic, **arguments)


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flwr")


@pytest.mark.parametrize("wgan", [0, 50])
def test_a_stage_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture, wgan: int) -> None:
    merge(100, wgan=wgan)

    (said,) = re.findall(rf"Stage 1 of 1: about (\d+) s \({100 + wgan} iterations\)", caplog.text)
    steps = 100 + 3 * wgan  # an iteration of the WGAN calls the network thrice
    assert 0.75 * steps * PAUSE <= int(said) <= 4 * steps * PAUSE


def test_every_stage_that_is_trained_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(61, fan_in=2, store=tmp_path)
    assert re.findall(r"Stage (\d of \d)", caplog.text) == ["1 of 2", "2 of 2"]

    caplog.clear()
    merge(61, fan_in=2, store=tmp_path)
    assert not caplog.records


def test_a_budget_is_kept_and_its_iterations_make_the_same_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nu = merge(100_000, fan_in=2, budget=3.0)

    (chosen,) = re.findall(
        r"a budget of 1.5 s a stage: ([\d,]+) of 100,000 iterations", caplog.text
    )
    iterations = int(chosen.replace(",", ""))
    assert 1.5 / PAUSE / 8 <= iterations <= 1.5 / PAUSE
    assert same(nu, merge(iterations, fan_in=2))


def test_a_budget_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    free = merge(61, store=tmp_path)

    assert same(merge(61, budget=1e6), free)
    assert same(merge(61, budget=1e6, store=tmp_path), free)
    assert len(list((tmp_path / "stages").iterdir())) == 1


def test_a_budget_is_seconds() -> None:
    with pytest.raises(ValueError, match="budget=0 must be more than 0"):
        merge(61, budget=0)
