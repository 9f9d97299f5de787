"""Adaptation to a few samples: what it transfers, what it refuses, and that it helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fl_wb.adaptation import METHODS, Adaptation, adapt, choose_anchor, variation_bank
from fl_wb.networks import MLPCritic, generate, make_generator
from fl_wb.transport import energy_distance
from fl_wb.wgan import Training
from tests.points import Gaussian, critic, same

TINY = Training(iterations=2, batch_size=8, critic_steps=1, warmup=1)


def few(n: int = 5, *, mean: float = 0.0) -> Tensor:
    return mean + 0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def tiny(method: str = "variation") -> Adaptation:
    return Adaptation(method=method, training=TINY)


@pytest.mark.parametrize("method", METHODS)
def test_the_arguments_are_left_alone(method: str):
    start, samples = Gaussian((0.0, 0.0)).train().requires_grad_(False), few()
    torch.manual_seed(3)
    rng = torch.get_rng_state()

    adapted = adapt(start, samples, settings=tiny(method))

    assert torch.get_rng_state().equal(rng)
    assert same(start, Gaussian((0.0, 0.0))) and samples.equal(few())
    assert start.training and not any(p.requires_grad for p in start.parameters())
    assert not adapted.training and all(p.requires_grad for p in adapted.parameters())
    assert not same(adapted, start)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_everything(method: str):
    def once(seed: int) -> nn.Module:
        return adapt(Gaussian((0.0, 0.0)), few(), settings=tiny(method), seed=seed)

    one = once(4)
    torch.manual_seed(99)
    assert same(one, once(4)) and not same(one, once(5))


def test_iterations_critic_and_latent_dimension_are_the_caller_s():
    made, done = [], []

    def factory() -> nn.Module:
        made.append(MLPCritic((2,), width=4))
        return made[-1]

    start = nn.Sequential(nn.Linear(3, 2))
    adapt(
        start,
        few(),
        critic=factory,
        iterations=3,
        settings=tiny(),
        latent_dim=3,
        callback=lambda i, total, _: done.append((i, total)),
    )
    assert len(made) == 1 and done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "samples",
    [few(1), few(2), few(1).repeat(3, 1), few().double(), torch.ones(3, 2, dtype=torch.int64)],
    ids=["one", "two", "equal", "float64", "integers"],
)
def test_whatever_is_a_sample_works(method: str, samples: Tensor):
    adapted = adapt(Gaussian((0.0, 0.0)), samples, settings=tiny(method))
    assert torch.isfinite(generate(adapted, 50)).all()


def test_images_and_batch_statistics_work_with_one_sample():
    start = make_generator("conv", (1, 8, 8), latent_dim=4, width=4)
    adapted = adapt(start, torch.zeros(1, 1, 8, 8), settings=tiny())
    assert generate(adapted, 3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (torch.zeros(0, 2), "no samples to adapt to"),
        (torch.zeros(3, 5), r"shape \(5,\) for a generator that makes \(2,\)"),
        (torch.zeros(3, 2, 1), r"shape \(2, 1\) for a generator that makes \(2,\)"),
        (torch.tensor([[0.0, torch.nan]]), "not all finite"),
        (torch.tensor([[0.0, -torch.inf]]), "not all finite"),
    ],
)
def test_what_is_no_sample_is_refused(samples: Tensor, text: str):
    with pytest.raises(ValueError, match=text):
        adapt(Gaussian((0.0, 0.0)), samples, settings=tiny())


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method='magic' is not one of variation, plain"):
        Adaptation(method="magic")


# variation_bank


def test_variation_is_the_pool_s_own():
    # Samples far from the pool; in the pool two clusters that never mix.
    rng = torch.Generator().manual_seed(0)
    pool = torch.cat(
        [torch.randn(100, 2, generator=rng) * 0.1, 50 + torch.randn(100, 2, generator=rng)]
    )
    pairs = (pool.unsqueeze(0) - pool.unsqueeze(1)).reshape(-1, 2)
    largest = []
    for sample in (torch.tensor([[20.0, 5.0]]), torch.tensor([[30.0, 40.0]])):  # nearer to one each
        bank = variation_bank(sample, pool, near=60, step=30, size=100)

        assert bank.shape == (100, 2)
        differences = bank - sample
        nearest = torch.cdist(differences.double(), pairs.double()).min(1).values
        assert nearest.max() < 1e-5  # rounded when it was added to the sample
        assert differences.norm(dim=1).min() > 0  # y2 is never y1
        largest.append(differences.abs().max())
    # the first sample varies as little as its own cluster does, the second as much as its own
    assert largest[0] < 1 < largest[1]


def test_variation_starts_on_the_way_to_a_near_sample():
    few = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    pool = torch.stack([torch.zeros(2), torch.full((2,), 9.0)]).repeat_interleave(100, 0)

    bank = variation_bank(few, pool, partners=2, near=50, step=50, size=400)

    # the pool's neighbours are equal, so that nothing but the start varies
    first = bank[::4]  # from (0, 0), whose two nearest are (1, 0) and (0, 1)
    assert first.min() == 0 and first.prod(1).max() == 0
    assert first.amax(0).min() > 0.6 and first.max() <= 0.7
    last = bank[3::4] - few[3]  # from (9, 9): a near sample is never the sample itself
    assert last.norm(dim=1).max() > 3 and last.max() <= 0


def test_neighbours_are_as_many_as_asked_for():
    # A grid on a line and one step: x' is x plus or minus one, and y1 one of three.
    pool = torch.arange(100.0).unsqueeze(1)
    bank = variation_bank(torch.tensor([[50.0]]), pool, near=3, step=2)
    assert set(bank.flatten().tolist()) == {49.0, 51.0}
    wider = variation_bank(torch.tensor([[50.0]]), pool, near=3, step=4)
    assert set(wider.flatten().tolist()) == {48.0, 49.0, 51.0, 52.0}


def test_widened_samples_stay_within_the_values_that_occur():
    pool = torch.rand(300, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bank = variation_bank(torch.full((1, 1, 2, 2), 0.9), pool)
    assert bank.max() == pool.max() and bank.min() >= pool.min()
    bright = variation_bank(torch.full((1, 1, 2, 2), 3.0), pool)
    assert bright.max() == 3


def test_the_bank_depends_on_its_seed_alone():
    pool = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    rng = torch.get_rng_state()
    one, two, other = (variation_bank(few(), pool, seed=seed) for seed in (1, 1, 2))
    assert one.equal(two) and not one.equal(other)
    assert torch.get_rng_state().equal(rng)


# the anchor


def test_the_anchor_holds_where_the_start_already_fits():
    pool = generate(Gaussian((0.0, 0.0)), 2000)
    fits = generate(Gaussian((0.0, 0.0)), 60, seed=1)
    assert choose_anchor(pool, fits) == choose_anchor(pool, fits[:1]) > 0
    assert choose_anchor(pool, fits + 2) == 0


def test_the_anchor_is_chosen_by_a_relative_distance():
    pool = generate(Gaussian((0.0, 0.0)), 2000)
    for shift, held in ((0.1, True), (0.4, False)):
        samples = generate(Gaussian((shift, 0.0)), 300, seed=1)
        rho = energy_distance(pool[:1000], samples) / torch.pdist(samples).mean()
        assert (rho.item() < 0.03) is held
        for scale in (1.0, 100.0):  # the unit of the samples plays no part
            assert (choose_anchor(scale * pool, scale * samples) > 0) is held


def test_an_anchor_holds_the_generator_at_its_start():
    start, samples = Gaussian((0.0, 0.0)), few(mean=3.0)

    def moved(anchor: float) -> float:
        settings = Adaptation(anchor=anchor, training=Training(iterations=40, batch_size=32))
        adapted = adapt(start, samples, critic=critic, settings=settings)
        return (generate(adapted, 300) - generate(start, 300)).norm(dim=1).mean().item()

    assert moved(100.0) < moved(0.0) / 3


# that it helps


@pytest.mark.parametrize("method", METHODS)
def test_adaptation_comes_nearer_to_the_target(method: str):
    start, target = Gaussian((0.0, 0.0)), Gaussian((2.0, 1.0))
    settings = Adaptation(
        method=method,
        training=Training(iterations=150, batch_size=64, warmup=20, generator_lr=2e-3),
    )

    adapted = adapt(start, generate(target, 10, seed=5), critic=critic, settings=settings)

    held_out = generate(target, 1000, seed=6)
    before, after = (energy_distance(generate(g, 1000), held_out) for g in (start, adapted))
    assert after < before / 4


def test_variation_keeps_the_spread_that_plain_fine_tuning_loses():
    # Three samples of a target that varies as the start does, elsewhere.
    start, target = Gaussian((0.0, 0.0)), Gaussian((1.5, 1.5))
    samples = torch.tensor([[1.4, 1.5], [1.5, 1.6], [1.6, 1.4]])
    training = Training(iterations=200, warmup=20, generator_lr=5e-3, critic_lr=1e-2)

    def adapted(method: str) -> Tensor:
        settings = Adaptation(method=method, training=training)
        return generate(adapt(start, samples, critic=critic, settings=settings), 1000)

    varied, plain = adapted("variation"), adapted("plain")

    assert varied.std(0).mean() > 2 * plain.std(0).mean()
    held_out = generate(target, 1000, seed=6)
    assert energy_distance(varied, held_out) < energy_distance(plain, held_out)


@pytest.mark.parametrize("seed", [6, 7])
def test_where_the_start_already_fits_adaptation_does_little_harm(seed: int):
    start = Gaussian((0.0, 0.0))
    settings = Adaptation(training=Training(iterations=100, warmup=20))
    samples = generate(start, 50, seed=seed)

    adapted = adapt(start, samples, critic=critic, settings=settings)

    held_out = generate(start, 1000, seed=99)
    # plain fine-tuning ends at 0.27 for the first of the seeds
    assert energy_distance(generate(adapted, 1000), held_out) < 0.1
