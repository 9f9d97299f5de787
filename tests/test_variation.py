"""Widening a few samples by a generator's variation, and the coupling with what it generates."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_wb.adaptation import affordable, transport_pairs, variation_bank
from fl_wb.generators.sampling import generate
from fl_wb.transport import energy_distance
from tests.points import Gaussian


def few(n: int = 5) -> Tensor:
    return 0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


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


def test_of_large_samples_there_are_fewer_but_some():
    for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32)):
        assert affordable(8000, torch.zeros(shape)) == 8000
    assert affordable(8000, torch.zeros(3, 128, 128)) == (256 << 20) // (4 * 3 * 128 * 128)
    assert affordable(8000, torch.zeros(1, 2000, 2000)) == 500
    assert affordable(100, torch.zeros(1, 2000, 2000)) == 100


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


def test_widened_samples_are_nearer_to_a_target_that_varies_like_the_pool():
    pool = generate(Gaussian((0.0, 0.0)), 4000)
    held_out = generate(Gaussian((1.5, 1.5)), 1000, seed=6)
    samples = torch.tensor([[1.4, 1.5], [1.5, 1.6], [1.6, 1.4]])

    bank = variation_bank(samples, pool, step=300)

    assert bank.std(0).mean() > 1.5 * samples.std(0).mean()
    nearer, resampled = (
        energy_distance(x, held_out) for x in (bank[:1000], samples.repeat(334, 1)[:1000])
    )
    assert nearer < 0.8 * resampled


def test_differences_are_scaled():
    pool = torch.arange(100.0).unsqueeze(1)
    bank = variation_bank(torch.tensor([[50.0]]), pool, near=3, step=2, scale=0.5)
    assert set(bank.flatten().tolist()) == {49.5, 50.5}


def test_a_share_of_the_bank_may_be_the_samples_as_they_are():
    samples, pool = few(4), generate(Gaussian((0.0, 0.0)), 500)
    for share in (0.0, 0.25, 1.0):
        bank = variation_bank(samples, pool, unchanged=share, size=2000)
        kept = (bank[:, None] == samples).all(2).any(1).float().mean().item()
        assert abs(kept - share) < 0.03
        assert kept == share or 0 < share < 1


def test_samples_need_not_be_moved_towards_each_other():
    samples = torch.tensor([[0.0], [10.0]])
    bank = variation_bank(samples, torch.zeros(100, 1), towards=0.0)
    assert set(bank.flatten().tolist()) == {0.0, 10.0}


# transport_pairs


def test_what_is_there_already_is_not_moved():
    start = Gaussian((1.0, 2.0)).eval()
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(50, start.latent_dim, generator=rng)
    with torch.no_grad():
        made = start(z)

    pairs = transport_pairs(start, made[torch.randperm(50, generator=rng)], seed=3)

    latents, moved = pairs(200, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert moved.equal(start(latents))
    assert len(latents.unique(dim=0)) > 40  # any of the pairs is drawn


def test_a_shift_moves_every_sample_alike():
    # The optimal plan between a measure and its translate is the translation.
    start = Gaussian((0.0, 0.0)).eval()
    with torch.no_grad():
        made = start(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
    shift = torch.tensor([30.0, -20.0])

    latents, moved = transport_pairs(start, made.flip(0) + shift)(100, torch.Generator())

    with torch.no_grad():
        assert torch.allclose(moved, start(latents) + shift, atol=1e-4)


def test_no_more_pairs_than_asked_for_and_the_seed_decides():
    start, bank = Gaussian((0.0, 0.0)).eval(), generate(Gaussian((5.0, 5.0)), 80)
    drawn = [
        transport_pairs(start, bank, size=10, seed=seed)(300, torch.Generator().manual_seed(0))
        for seed in (1, 1, 2)
    ]
    assert len(drawn[0][0].unique(dim=0)) == 10 and drawn[0][1].unique(dim=0).shape == (10, 2)
    assert drawn[0][0].equal(drawn[1][0]) and not drawn[0][0].equal(drawn[2][0])
