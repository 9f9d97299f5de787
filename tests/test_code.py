"""The code: cells of the right mass, standard normal inside, and ways there and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fl_wb.barycenter import Stage, shares_learned
from fl_wb.generators.code import Code
from fl_wb.generators.mixture import Mixture
from fl_wb.generators.reweighted import reweighted
from fl_wb.generators.sampling import generate
from fl_wb.ternary import numpy_reader
from fl_wb.transport import energy_distance
from tests.points import Gaussian

CASES = [
    pytest.param([1.0], 3, id="one"),
    pytest.param([1.0, 1.0], 1, id="two, one coordinate"),
    pytest.param([0.2, 0.8], 4, id="two, unequal"),
    pytest.param([5, 1, 1, 1, 2], 2, id="five, deeper than the latent"),
    pytest.param([1.0] * 300, 8, id="three hundred"),
    pytest.param([2.0**-k for k in range(12)], 3, id="a chain"),
]


def latents(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shares", "dim"), CASES)
def test_every_cell_has_its_share_and_is_standard_normal_inside(shares: list[float], dim: int):
    n = 60_000
    cell, inner = Code(shares).place(latents(n, dim))
    expected = torch.tensor(shares) / sum(shares)
    found = cell.bincount(minlength=len(shares)) / n
    assert ((found - expected).abs() <= 5 * (expected / n).sqrt()).all()
    heaviest = inner[cell == int(expected.argmax())]
    for column in [*heaviest[:20_000].T, *inner[:20_000].T]:
        assert kstest(column.numpy(), "norm").pvalue > 1e-4
    correlation = torch.corrcoef(inner.T).reshape(dim, dim) - torch.eye(dim)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize(("shares", "dim"), CASES)
def test_embedding_is_the_way_back(shares: list[float], dim: int):
    code, z = Code(shares), latents(2000, dim)
    torch.testing.assert_close(code.embed(*code.place(z)), z, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("shares", "dim"), CASES)
def test_recoded_latents_have_other_shares_and_stay_normal(shares: list[float], dim: int):
    code, z = Code(shares), latents(40_000, dim)
    weights = [k % 3 + 0.5 for k in range(len(shares))]
    moved = code.recode(z, weights)
    found = code.place(moved)[0].bincount(minlength=len(shares)) / len(z)
    expected = torch.tensor(weights) / sum(weights)
    assert ((found - expected).abs() <= 5 * (expected / len(z)).sqrt()).all()
    inner = code.place(moved)[1]
    assert kstest(inner[:, 0].numpy(), "norm").pvalue > 1e-4
    torch.testing.assert_close(code.recode(z, code.shares), z, atol=2e-5, rtol=1e-5)


def test_a_cell_of_weight_zero_is_never_met():
    code, z = Code([3, 1, 2, 2]), latents(5000, 2)
    moved = code.recode(z, [0, 1, 0, 1])
    assert set(code.place(moved)[0].tolist()) == {1, 3}
    assert moved.isfinite().all()
    assert set(code.place(code.recode(z, [0, 0, 1, 0]))[0].tolist()) == {2}


def test_two_maps_are_cut_at_the_first_ones_share():
    z = latents(1000, 3)
    cell, inner = Code([0.3, 0.7]).place(z)
    u = torch.special.ndtr(z[:, 0].double())
    assert torch.equal(cell, (u >= 0.3).long())
    expected = torch.where(u < 0.3, u / 0.3, (u - 0.3) / 0.7)
    torch.testing.assert_close(torch.special.ndtr(inner[:, 0].double()), expected)
    assert torch.equal(inner[:, 1:], z[:, 1:])


def test_the_mixture_is_the_pool_of_its_maps():
    shares, dim = [0.5, 0.3, 0.2], 2
    maps = [lambda z, k=k: z * (k + 1) + 10 * k for k in range(3)]
    mixed = Code(shares).mix(maps, latents(6000, dim))
    pool = torch.cat([maps[k](latents(round(6000 * s), dim, k + 1)) for k, s in enumerate(shares)])
    assert abs(energy_distance(mixed, pool)) < 0.02


def test_rows_stay_in_order_and_a_map_without_latents_is_not_called():
    called = []

    def spy(k: int):
        return lambda z: (called.append(k), z + 100 * k)[1]

    z = torch.tensor([[2.0], [-2.0], [3.0]])
    code = Code([1, 2, 1])
    cell, inner = code.place(z)
    mixed = code.mix([spy(k) for k in range(3)], z)
    torch.testing.assert_close(mixed, inner + 100 * cell.unsqueeze(1))
    assert sorted(called) == sorted(set(cell.tolist()))


def test_cells_lie_as_deep_as_their_share_asks():
    code = Code([8, 1, 1, 2, 4])
    depth = (code._paths >= 0).sum(1)
    assert depth.tolist() == [1, 4, 4, 3, 2]
    assert (Code([1.0] * 1000)._paths >= 0).sum(1).max() == 10


def test_branches_part_the_cells_by_the_first_cuts():
    code = Code([1.0] * 8)
    assert code.branches(0).unique().numel() == 1
    for depth in (1, 2, 3):
        sizes = code.branches(depth).unique(return_counts=True)[1]
        assert sizes.tolist() == [2 ** (3 - depth)] * 2**depth
    assert code.branches(9).tolist() == code.branches(3).tolist()
    shallow = Code([8, 1, 1, 1]).branches(1)  # the first cell is a branch of its own
    assert (shallow == shallow[0]).tolist() == [True, False, False, False]
    assert Code([1.0]).branches(4).tolist() == [0]


def test_shares_alone_determine_the_tree():
    shares = [0.1, 0.4, 0.1, 0.2, 0.2]
    z = latents(100, 3)
    once, again = Code(shares).place(z), Code([10 * share for share in shares]).place(z)
    assert torch.equal(once[0], again[0])
    torch.testing.assert_close(once[1], again[1])


@pytest.mark.parametrize("shares", [[], [1.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan]])
def test_shares_that_are_none_are_refused(shares: list[float]):
    with pytest.raises(ValueError, match="shares must be positive and finite"):
        Code(shares)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.nan]])
def test_weights_that_are_none_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="2 weights >= 0 are needed"):
        Code([1.0, 1.0]).place(latents(3, 2), weights)


@pytest.mark.parametrize("source", range(3))
@pytest.mark.parametrize("shares", [[1.0, 1.0, 1.0], [0.1, 0.6, 0.3]])
def test_samples_of_one_source_are_its_own(shares: list[float], source: int):
    # Prepare: a mixture, which knows its code, and what does not, and what is reweighted
    sources = [Gaussian([10.0 * k, 0.0], std=0.1) for k in range(3)]
    mixture = Mixture(sources, shares)
    plain = torch.nn.Sequential(mixture)
    plain.latent_dim = mixture.latent_dim
    elsewhere = [float(k != source) for k in range(3)]

    # Execute
    of_it = generate(mixture, 500, seed=3, source=source)

    # Assert
    own = generate(sources[source], 500, seed=3)
    torch.testing.assert_close(of_it, own, atol=1e-4, rtol=1e-5)
    for other, code in (
        (plain, mixture.code),
        (reweighted(plain, mixture.code, elsewhere), None),
        (reweighted(mixture, mixture.code, elsewhere), None),
    ):
        assert torch.equal(generate(other, 500, seed=3, source=source, code=code), of_it)


def test_one_source_of_uniform_latents_is_its_own():
    g = torch.nn.Identity()
    made = generate(g, 400, latent_dim=2, latents="uniform", source=1, code=Code([3, 1]))
    assert kstest(made[:, 0].numpy(), "uniform", (0.75, 0.25)).pvalue > 1e-3
    assert kstest(made[:, 1].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("source", [-1, 3, 0.5])
def test_a_source_that_is_none_is_refused(source: int):
    mixture = Mixture([Gaussian([0.0]) for _ in range(3)])
    with pytest.raises(ValueError, match=rf"source={source} must be from 0 to 2"):
        generate(mixture, 2, source=source)


def test_a_source_of_nobody_knows_which_is_refused():
    with pytest.raises(ValueError, match=r"source=1: Gaussian does not say .* code=Code\(shares\)"):
        generate(Gaussian([0.0]), 2, source=1)


@pytest.mark.parametrize(
    "counts", [[100, 100, 10, 1, 10, 10, 50, 5, 100, 3, 1], [1, 10, 10, 10, 50, 1, 5, 5, 3, 100]]
)
def test_shares_make_the_tree_of_the_weights_that_they_are_of(counts: list[int]):
    code = Code(counts)
    told = Code(shares_learned(counts, Stage(), 64))
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert told.shares == code.shares
    assert told.place(z)[0].equal(code.place(z)[0])
    assert Code(told.shares).place(z)[0].equal(code.place(z)[0])
    weights = np.array([float(k + 1) for k in range(len(counts))])
    moved = numpy_reader.recoded(z.numpy(), np.array(told.shares), weights)
    torch.testing.assert_close(
        torch.from_numpy(moved), code.recode(z, weights.tolist()), atol=1e-5, rtol=0
    )


def test_a_map_that_drops_the_dimension_of_one_latent_is_mixed():
    maps = [lambda z, k=k: (z[:, :1] * 0 + k).squeeze() for k in range(2)]
    made = Code([1, 1]).mix(maps, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))  # one in each cell
    assert made.tolist() == [0.0, 1.0]
