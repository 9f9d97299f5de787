"""The recursive barycenter against optimal transport, closed forms and POT's linear programme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import ot
import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import GEODESICS, Stage, optimality_gap, recursive_barycenter, stage_of
from fl_wb.generators.networks import MLPGenerator
from fl_wb.generators.sampling import generate
from fl_wb.metrics import energy_distance
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from fl_wb.transport import wasserstein1
from tests.points import Gaussian, critic, same

# A higher rate and fewer iterations than the defaults: enough for points in the plane.
QUICK = Stage(
    distillation=Distillation(iterations=500, batch_size=64, lr=1e-2),
    training=Training(iterations=20, warmup=20),
)
TINY = Stage(
    distillation=Distillation(iterations=3, batch_size=8),
    training=Training(iterations=2, batch_size=8, critic_steps=1, warmup=1),
)
LEFT, RIGHT = (-2.0, 0.0), (2.0, 0.0)
TRIANGLE = ((0.0, 0.0), (4.0, 0.0), (2.0, math.sqrt(12)))
SQUARE = ((-2.0, -2.0), (2.0, -2.0), (2.0, 2.0), (-2.0, 2.0))


def merged(
    means: Sequence[Sequence[float]],
    weights: Sequence[float] | None = None,
    *,
    geodesic: str = "mixture",
    stage: Stage = QUICK,
    seed: int = 0,
) -> nn.Module:
    sources = [Gaussian(mean) for mean in means]
    return recursive_barycenter(
        sources, weights, geodesic=geodesic, stage=stage, critic=critic, seed=seed
    )


def shares(samples: Tensor, centres: Sequence[Sequence[float]]) -> Tensor:
    nearest = torch.cdist(samples, torch.tensor(centres)).argmin(1)
    return nearest.bincount(minlength=len(centres)) / len(samples)


@lru_cache
def two_sources() -> tuple[Tensor, Tensor, float]:
    """Draw samples of the two Gaussians, and take their distance."""
    left, right = generate(Gaussian(LEFT), 1000, seed=2), generate(Gaussian(RIGHT), 1000, seed=3)
    return left, right, wasserstein1(left, right)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("geodesic", GEODESICS)
def test_a_stage_ends_on_its_geodesic(geodesic: str, t: float):
    nu = merged([LEFT, RIGHT], [1 - t, t], geodesic=geodesic)

    samples = generate(nu, 2000, seed=1)
    left, right, apart = two_sources()
    some = samples[:1000]  # exactly transported, which 2000 are in five times the time
    assert (wasserstein1(some, left) + wasserstein1(some, right)) / apart <= 1.05
    if geodesic == "displacement":
        mean = torch.tensor([4 * t - 2, 0.0])
        torch.testing.assert_close(samples.mean(0), mean, atol=0.15, rtol=0)
        torch.testing.assert_close(samples.std(0), torch.full((2,), 0.5), atol=0.15, rtol=0)
    if geodesic == "mixture":
        assert shares(samples, [LEFT, RIGHT])[1].item() == pytest.approx(t, abs=0.05)


def test_the_papers_start_moves_from_the_previous_generator_towards_the_new_one():
    stage = Stage(
        start="previous",
        fidelity=0.0,
        training=Training(
            iterations=120, batch_size=32, generator_lr=5e-3, critic_lr=1e-2, warmup=20
        ),
    )
    near = merged([LEFT, RIGHT], [0.9, 0.1], geodesic="displacement", stage=stage)
    far = merged([LEFT, RIGHT], [0.1, 0.9], geodesic="displacement", stage=stage)
    here, there = (generate(nu, 1000)[:, 0].mean() for nu in (near, far))
    # at t = 0.1 and 0.9 of the way from -2 to 2
    assert here.item() == pytest.approx(-1.6, abs=0.4)
    assert there.item() == pytest.approx(1.6, abs=0.4)


def test_a_small_part_keeps_its_shape():
    distances = []
    for seed in range(3):
        nu = merged([LEFT, RIGHT], [0.95, 0.05], seed=seed)
        samples = generate(nu, 8000, seed=1)
        small = samples[samples[:, 0] > 0]
        assert len(small) / len(samples) == pytest.approx(0.05, abs=0.025)
        distances.append(energy_distance(small, generate(Gaussian(RIGHT), 2000, seed=4)))
    # 0.27 if it gets one latent of twenty in training, where it gets one of ten: 0.19
    assert sum(distances) / 3 < 0.23


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_a_mixture_forgets_no_source(order: Sequence[int]):
    weights = (0.4, 0.3, 0.2, 0.1)
    stage = Stage(
        distillation=Distillation(iterations=1000, batch_size=64, lr=1e-2),
        training=Training(iterations=20, warmup=20),
    )

    nu = merged([SQUARE[i] for i in order], [weights[i] for i in order], stage=stage)

    found = shares(generate(nu, 4000, seed=1), SQUARE)
    torch.testing.assert_close(found, torch.tensor(weights), atol=0.05, rtol=0)


def test_displacement_reaches_the_linear_programmes_optimum_on_a_triangle():
    sources = [Gaussian(corner) for corner in TRIANGLE]
    n = 30
    drawn = [generate(source, n, seed=k) for k, source in enumerate(sources)]

    objectives = {}
    for geodesic in ("displacement", "mixture"):
        nu = merged(TRIANGLE, geodesic=geodesic)
        objectives[geodesic], bound = optimality_gap(generate(nu, n, seed=9), drawn)

    # POT's barycenter on a support that has room for the optimum: the samples themselves and a
    # grid over the triangle's middle.
    grid = torch.cartesian_prod(torch.linspace(0.5, 3.5, 7), torch.linspace(-0.5, 2.5, 7))
    support = torch.cat([*drawn, grid]).double()
    cost = torch.cdist(support, support).numpy()
    measures = np.zeros((len(support), 3))
    for k in range(3):
        measures[n * k : n * (k + 1), k] = 1 / n
    optimum = ot.lp.barycenter(measures, cost, weights=np.full(3, 1 / 3))
    optimum = np.clip(optimum, 0, None) / np.clip(optimum, 0, None).sum()
    least = sum(ot.emd2(optimum, measures[:, k].copy(), cost) for k in range(3)) / 3
    assert bound <= least <= objectives["displacement"] + 0.05
    assert objectives["displacement"] <= 1.05 * least
    assert objectives["mixture"] > 1.05 * least


def test_one_generator_is_its_own_barycenter():
    source = Gaussian(LEFT).train()
    nu = recursive_barycenter([source], critic=critic)
    assert same(nu, source) and nu is not source and not nu.training


def test_the_arguments_are_left_alone():
    sources = [Gaussian(LEFT).train().requires_grad_(False), Gaussian(RIGHT).eval()]
    torch.manual_seed(5)
    rng = torch.get_rng_state()

    nu = recursive_barycenter(sources, critic=critic, stage=TINY)

    assert torch.get_rng_state().equal(rng)
    assert same(sources[0], Gaussian(LEFT)) and same(sources[1], Gaussian(RIGHT))
    assert sources[0].training and not sources[1].training
    assert not any(p.requires_grad for p in sources[0].parameters())
    assert all(p.requires_grad for p in nu.parameters()) and not nu.training


@pytest.mark.parametrize("geodesic", GEODESICS)
def test_the_seed_decides_everything(geodesic: str):
    one = merged([LEFT, RIGHT], geodesic=geodesic, stage=TINY)
    torch.manual_seed(77)
    two = merged([LEFT, RIGHT], geodesic=geodesic, stage=TINY)
    other = merged([LEFT, RIGHT], geodesic=geodesic, stage=TINY, seed=1)
    assert same(one, two) and not same(one, other)


def test_only_the_ratio_of_weights_matters():
    assert same(
        merged([LEFT, RIGHT], [1, 3], stage=TINY), merged([LEFT, RIGHT], [2, 6], stage=TINY)
    )
    assert same(merged([LEFT, RIGHT], None, stage=TINY), merged([LEFT, RIGHT], [5, 5], stage=TINY))
    assert not same(
        merged([LEFT, RIGHT], [1, 3], stage=TINY), merged([LEFT, RIGHT], [3, 1], stage=TINY)
    )


def test_short_arguments_stand_for_fields_of_the_stage():
    sources = [Gaussian(LEFT), Gaussian(RIGHT)]
    spelled = Stage(
        geodesic="displacement",
        start="previous",
        distillation=TINY.distillation,
        training=Training(iterations=4, batch_size=8, critic_steps=1, warmup=1),
    )
    short = recursive_barycenter(
        sources,
        critic=critic,
        stage=TINY,
        geodesic="displacement",
        start="previous",
        iterations=4,
    )
    assert same(short, recursive_barycenter(sources, critic=critic, stage=spelled))
    assert TINY.geodesic == "mixture" and TINY.training.iterations == 2


def test_a_stage_may_be_its_distilled_start_alone():
    stage = Stage(distillation=Distillation(iterations=2), training=Training(iterations=0))
    merged = recursive_barycenter([Gaussian([0.0, 0.0]), Gaussian([1.0, 0.0])], stage=stage)
    assert torch.isfinite(generate(merged, 10)).all()


def test_progress_counts_all_stages_as_one():
    told = []
    recursive_barycenter(
        [Gaussian(corner) for corner in TRIANGLE],
        critic=critic,
        stage=TINY,
        fan_in=2,
        callback=lambda done, total, losses: told.append((done, total, losses["stage"])),
    )
    assert [done for done, _, _ in told] == list(range(1, 11))
    assert {total for _, total, _ in told} == {10}
    assert [stage for _, _, stage in told] == [1.0] * 5 + [2.0] * 5


def test_a_user_s_networks_work_unchanged():
    class Plain(nn.Module):
        """No attribute latent_dim, and no empty batches either."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, z: Tensor) -> Tensor:
            return self.linear(z.view(z.size(0), -1)).view(-1, 1, 2, 2)

    sources = [Plain(), Plain()]
    nu = recursive_barycenter(sources, [0.999, 0.001], stage=TINY, latent_dim=3)
    assert generate(nu, 5, latent_dim=3).shape == (5, 1, 2, 2)
    with pytest.raises(ValueError, match="latent_dim"):
        recursive_barycenter(sources, stage=TINY)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1.0], "1 weights for 2 measures"),
        ([1.0, 0.0], "positive and finite"),
        ([1.0, -1.0], "positive and finite"),
        ([1.0, math.nan], "positive and finite"),
        ([math.inf, 1.0], "positive and finite"),
    ],
)
def test_weights_out_of_range_are_refused(weights: list[float], text: str):
    with pytest.raises(ValueError, match=text):
        merged([LEFT, RIGHT], weights)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="no generators"):
        recursive_barycenter([])
    with pytest.raises(ValueError, match=r"geodesic='line'.*two_critics, mixture, displacement"):
        merged([LEFT, RIGHT], geodesic="line")
    with pytest.raises(ValueError, match=r"start='cold'.*distilled, previous"):
        Stage(start="cold")


# a stage of many, and trees of stages


CIRCLE = [
    (6 * math.cos(2 * math.pi * k / 12), 6 * math.sin(2 * math.pi * k / 12)) for k in range(12)
]


def test_many_measures_are_one_stage_and_none_is_forgotten():
    weights = [1.0 + k % 3 for k in range(12)]
    stage = Stage(distillation=Distillation(iterations=2500, batch_size=64, lr=1e-2))
    told: list[float] = []
    nu = recursive_barycenter(
        [Gaussian(centre) for centre in CIRCLE],
        weights,
        stage=stage,
        callback=lambda done, total, losses: told.append(losses["stage"]),
    )
    found = shares(generate(nu, 6000, seed=1), CIRCLE)
    expected = torch.tensor(weights) / sum(weights)
    assert ((found / expected - 1).abs() < 0.3).all()
    assert set(told) == {1.0}


@pytest.mark.parametrize(("fan_in", "stages"), [(2, 4), (3, 3), (4, 3), (5, 1), (None, 1)])
def test_a_tree_has_no_more_stages_than_it_needs(fan_in: int | None, stages: int):
    told: list[tuple[int, int, float]] = []
    recursive_barycenter(
        [Gaussian(corner) for corner in (*SQUARE, (0.0, 0.0))],
        critic=critic,
        stage=TINY,
        fan_in=fan_in,
        callback=lambda done, total, losses: told.append((done, total, losses["stage"])),
    )
    assert [done for done, _, _ in told] == list(range(1, 5 * stages + 1))
    assert {total for _, total, _ in told} == {5 * stages}
    assert {stage for _, _, stage in told} == set(range(1, stages + 1))


@pytest.mark.parametrize("geodesic", ["two_critics", "displacement"])
def test_a_geodesic_between_two_measures_takes_two(geodesic: str):
    with pytest.raises(ValueError, match=rf"fan_in=3 must be 2: {geodesic} is between two"):
        recursive_barycenter([Gaussian(LEFT)], geodesic=geodesic, fan_in=3)
    with pytest.raises(ValueError, match="fan_in=1 must be 2 or more"):
        recursive_barycenter([Gaussian(LEFT)], fan_in=1)


def test_two_critics_are_trained_or_refused():
    with pytest.raises(ValueError, match=r"two_critics.*training.iterations of 1 or more, not 0"):
        Stage(geodesic="two_critics")
    brief = Stage(training=Training(iterations=3))
    assert stage_of(brief, "two_critics", None, None, None) == replace(
        brief, geodesic="two_critics"
    )
    short = stage_of(None, "two_critics", None, 7, None)
    assert (short.distillation.iterations, short.training.iterations) == (7, Training().iterations)


@pytest.mark.parametrize(("n", "iterations"), [(2, 20), (10, 20), (20, 34), (40, 56), (80, 56)])
def test_a_stage_of_many_measures_takes_longer(n: int, iterations: int):
    told: list[tuple[int, int]] = []
    recursive_barycenter(
        [Gaussian((float(k), 0.0)) for k in range(n)],
        stage=Stage(distillation=Distillation(iterations=20, batch_size=8)),
        callback=lambda done, total, losses: told.append((done, total)),
    )
    assert told[-1] == (iterations, iterations)  # 20 (n / 10) ** 3/4, at most 2.8 times 20


def test_a_stage_can_start_at_another_generator():
    sources = [Gaussian(LEFT), Gaussian(RIGHT)]
    stage = Stage(distillation=Distillation(iterations=1, batch_size=8, lr=1e-9))
    nu = recursive_barycenter(sources, stage=stage, initial=Gaussian((7.0, 7.0)))
    torch.testing.assert_close(
        generate(nu, 500).mean(0), torch.tensor([7.0, 7.0]), atol=0.1, rtol=0
    )


def test_a_sequence_that_makes_its_generators_is_asked_when_they_are_needed():
    class Lazy(Sequence[nn.Module]):
        def __init__(self) -> None:
            self.made: list[int] = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, k: int) -> nn.Module:  # type: ignore[override]
            self.made.append(k)
            return Gaussian(TRIANGLE[k])

    lazy = Lazy()
    nu = recursive_barycenter(lazy, critic=critic, stage=TINY)
    eager = [Gaussian(corner) for corner in TRIANGLE]
    assert same(nu, recursive_barycenter(eager, critic=critic, stage=TINY))
    assert len(lazy.made) <= 3 * 3


def test_a_start_that_nothing_moves_does_not_take_the_barycenter_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Prepare: the first of four is saturated; it has no gradient
    sources = []
    for seed in range(4):
        torch.manual_seed(seed)
        sources.append(MLPGenerator((1, 4, 4), latent_dim=4, width=32).eval())
    honest = torch.cat([generate(source, 300, seed=seed) for seed, source in enumerate(sources)])
    with torch.no_grad():
        for parameter in sources[0].parameters():
            parameter.mul_(1e6)
    stage = Stage(distillation=Distillation(iterations=300, batch_size=32, lr=1e-2))

    # Execute
    nu = recursive_barycenter(sources, [1.0, 1.0, 1.0, 1.0], stage=stage)

    # Assert
    assert caplog.text.count("has learned nothing") == 1
    spread = torch.pdist(honest.flatten(1)).mean().item()
    assert energy_distance(generate(nu, 500), honest) < spread  # 4.6 of it by the first start
    caplog.clear()
    recursive_barycenter(sources[1:], stage=stage)
    assert "has learned nothing" not in caplog.text
