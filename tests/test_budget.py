"""How long a stage will take is said before, and a budget of seconds is kept."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fl_wb.app.config import compose
from fl_wb.barycenter import Measure, Stage, recursive_barycenter
from fl_wb.barycenter import merge as merging
from fl_wb.generators.networks import ConvGenerator, MLPGenerator, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.strategies import AdaptiveCoalescence
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


def test_what_is_done_once_is_not_counted_for_every_iteration(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = merging.settle

    def slow(*arguments: Any, **named: Any) -> None:
        time.sleep(0.5)
        settle(*arguments, **named)

    monkeypatch.setattr(merging, "settle", slow)
    merge(2000)
    (said,) = re.findall(r"Stage 1 of 1: about (\d+) s", caplog.text)
    assert int(said) <= 25  # a few; each of twenty iterations' share of the half second makes 50


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


class Batches(ConvGenerator):
    """Keeps how many latents a network is trained with at a time."""

    seen: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__((1, 8, 8), latent_dim=4, width=4)

    def forward(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.add(len(z))
        return super().forward(z)


class Connected(Batches):
    """The same without convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLPGenerator((1, 8, 8), latent_dim=4, width=4)


@pytest.mark.parametrize("through_flower", [False, True])
@pytest.mark.parametrize(
    ("network", "given", "expected"),
    [
        (Batches, {}, 32),
        (Connected, {}, 200),
        (Batches, {"stage": Stage(budget=1e6, fidelity=0)}, 32),
        (Batches, {"stage": Stage(distillation=Distillation(batch_size=77))}, 77),
        (Connected, {"stage": Stage.quick()}, 32),
    ],
)
def test_batches_suit_the_network_unless_they_are_given(
    network: type[Batches], given: dict[str, Any], expected: int, through_flower: bool
) -> None:
    Batches.seen.clear()
    if through_flower:
        merger = AdaptiveCoalescence(generator=network, iterations=2, **given).merger
        merger.merge([Measure.of(network(), 1.0), Measure.of(network(), 1.0)], None)
    else:
        recursive_barycenter([network(), network()], iterations=2, **given)
    assert Batches.seen == {expected}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("network=dcgan data=mnist data.root=/x", 32),
        ("network=conv data=mnist data.root=/x", 64),
        ("network=mlp", 200),
        ("network=dcgan data=mnist data.root=/x strategy.stage.distillation.iterations=9", 32),
        ("network=dcgan data=mnist data.root=/x strategy.stage.distillation.batch_size=50", 50),
    ],
)
def test_batches_of_a_run_suit_its_network(overrides: str, expected: int) -> None:
    stage = compose(overrides).strategy.stage
    shape = (1, 32, 32)
    network = make_generator(compose(overrides).network.generator, shape, width=4)
    assert stage.distillation.batch(network) == expected
    assert stage.of_measures(2, network).distillation.batch_size == expected


def test_the_quick_stage_draws_fewer_pairs(caplog: pytest.LogCaptureFixture) -> None:
    nu = recursive_barycenter([Gaussian((0.0, 0.0)), Gaussian((1.0, 0.0))], stage=Stage.quick())

    assert "(2,500 iterations)" in caplog.text
    torch.testing.assert_close(
        generate(nu, 4000).mean(0), torch.tensor([0.5, 0.0]), atol=0.05, rtol=0
    )
