"""The law of what a generator is called with: draws, uniform numbers and back, labels, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.generators.latents import Driven, Latents, frequencies, law_of, mixed
from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import (
    check_function,
    driven,
    generate,
    generate_rows,
    latents_of,
    undriven,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exponential(n: int, generator: torch.Generator) -> Tensor:
    return -torch.rand(n, 3, generator=generator).clamp(min=1e-30).log()


def infogan(n: int, generator: torch.Generator) -> Tensor:
    """Two normal coordinates, and a category of three as 0 and 1."""
    z = torch.randn(n, 2, generator=generator)
    category = torch.randint(3, (n,), generator=generator)
    return torch.cat([z, nn.functional.one_hot(category, 3).float()], 1)


LAWS = ["normal", "uniform", "uniform(-1,1)", exponential]
LABELLED = [*LAWS, infogan]


@pytest.mark.parametrize("law", LAWS)
def test_uniform_numbers_and_back(law: Any) -> None:
    latents = Latents(3, law)
    z = latents.draw(20_000, rng(1))
    u = latents.uniforms(z)

    for column in u.T:
        assert kstest(column.numpy(), "uniform").statistic < 0.02
    middle = (u > 0.001) & (u < 0.999)  # draws end somewhere, where a law goes on
    torch.testing.assert_close(
        torch.where(middle, latents.rows(u), z), z.double(), atol=1e-4, rtol=1e-3
    )


def test_the_normal_law_is_what_torch_draws() -> None:
    assert torch.equal(Latents(5).draw(7, rng(3)), torch.randn(7, 5, generator=rng(3)))


@pytest.mark.parametrize("law", ["uniform", "uniform(-1,1)", exponential])
def test_the_cells_of_another_law_have_their_share_and_the_law_inside(law: Any) -> None:
    latents, shares, n = Latents(3, law), [0.5, 0.3, 0.15, 0.05], 40_000
    z = latents.draw(n, rng(2))
    cell, inner = Code(shares).place(z, latents=latents)

    found = cell.bincount(minlength=4) / n
    assert (found - torch.tensor(shares)).abs().max() < 0.01
    again = latents.draw(n, rng(5))
    for column, other in zip(inner.T, again.T, strict=True):
        assert kstest(column.numpy(), other.numpy()).statistic < 0.02
    back = Code(shares).embed(cell, inner, latents=latents)
    u = latents.uniforms(z)
    inside = ((u > 0.001) & (u < 0.999)).all(1)
    torch.testing.assert_close(back[inside], z[inside], atol=1e-3, rtol=1e-2)


def test_the_greatest_draws_of_a_law_lie_in_no_cell_of_weight_zero() -> None:
    latents = Latents(3, exponential)
    z = torch.tensor([[0.1, 0.2, 0.3], [99.0, 0.2, 99.0], [0.1, 99.0, 99.0]])

    for weights in ([1.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.3, 0.2, 0.0]):
        cell, inner = Code([1.0] * len(weights)).place(z, weights, latents)
        assert not (cell == len(weights) - 1).any()
        assert inner.isfinite().all()


def test_a_code_cuts_neither_categories_nor_labels() -> None:
    latents = Latents(5, infogan, frequencies(4))

    assert latents.free == (0, 1)
    rows = latents.draw(5000, rng())
    cell, inner = Code([1, 1, 2, 3, 1, 1, 1]).place(rows, latents=latents)
    assert torch.equal(inner[:, 2:], rows[:, 2:])
    assert cell.unique().tolist() == list(range(7))


def test_latents_that_cannot_be_told_apart_are_refused() -> None:
    def sphere(n: int, generator: torch.Generator) -> Tensor:
        return nn.functional.normalize(torch.randn(n, 2, generator=generator))

    with pytest.raises(ValueError, match="no coordinate of these latents is continuous and indep"):
        Code([1, 1]).place(torch.zeros(3, 2), latents=Latents(2, sphere))
    with pytest.raises(ValueError, match="no coordinate of these latents"):
        Code([1, 1]).place(torch.zeros(3, 1), latents=Latents(1, lambda n, g: torch.zeros(n, 1)))


@pytest.mark.parametrize("law", LABELLED)
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_every_label_has_its_share_of_the_rows(law: Any, n: int) -> None:
    often = frequencies([3, 0, 1, 4])
    dim = 5 if law is infogan else 3
    rows = Latents(dim, law, often).draw(n, rng())

    assert rows.shape == (n, dim + 1)
    counts = rows[:, -1].long().bincount(minlength=4)
    assert (counts - n * torch.tensor(often)).abs().max() < 1
    assert counts[1] == 0


def test_labels_come_in_random_order_apart_from_the_latents() -> None:
    rows = Latents(1, "normal", frequencies(2)).draw(10_000, rng())
    assert abs(float(torch.corrcoef(rows.T)[0, 1])) < 0.04
    assert 2300 < rows[:5000, 1].sum() < 2700  # where in turn, or sorted, it were 2500 or 0


class Doubled(nn.Module):
    """Twice the latent, and far apart by labels."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        assert label.dtype == torch.int64
        assert label.dim() == 1
        return self.scale * z + 100 * label.unsqueeze(1)


def test_a_conditional_generator_is_one_of_one_tensor() -> None:
    given = Doubled()
    one = driven(given, labels=3)
    rows, made = generate_rows(one, 9, seed=4)

    torch.testing.assert_close(made, 2 * rows[:, :2] + 100 * rows[:, 2:])
    assert torch.equal(generate(given, 9, seed=4, labels=3), made)
    assert rows[:, 2].long().bincount().tolist() == [3, 3, 3]
    assert undriven(one, given) is given
    assert undriven(one, one) is one
    assert driven(one, labels=5) is one
    assert torch.equal(
        generate(given, 9, seed=4, latent_dim=np.int64(2), labels=np.int64(3)),
        generate(given, 9, seed=4, labels=3),
    )
    assert latents_of(one).width == 3


def test_what_takes_normal_latents_alone_stays_as_it_is() -> None:
    network = make_generator("mlp", (1, 4, 4), latent_dim=3, width=4)

    assert driven(network) is network
    assert isinstance(driven(network, latents="uniform"), Driven)
    low = generate(driven(network, latents="uniform(-1, 1)"), 5)
    assert torch.equal(low, generate(network, 5, latents="uniform(-1,1)"))
    assert not torch.equal(low, generate(network, 5))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"latents": "gauss"}, r"latents='gauss' is not one of normal, uniform, uniform\(-1,1\)"),
        ({"labels": 0}, "labels=0 must be from 1 to"),
        ({"labels": [1, -1]}, "counts of labels must be >= 0"),
        ({"labels": [0, 0]}, "not all of them 0"),
        ({"labels": [float("nan")]}, "counts of labels"),
        (
            {"latents": lambda n, g: torch.zeros(n, 3)},
            r"called with \(5, torch.Generator\), must return finite ones \(5, 2\), not \(5, 3\)",
        ),
        ({"latents": lambda n, g: [0] * n}, "not list"),
        ({"labels": 3, "source": 0, "code": Code([1, 1])}, "source= and labels=: which latents"),
    ],
)
def test_what_is_no_law_is_named(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        generate(Doubled(), 5, **arguments)


def test_a_mixture_has_the_labels_of_its_parts() -> None:
    assert mixed([(1.0, ()), (2.0, ())]) == ()
    assert mixed([(1.0, (1.0, 0.0)), (3.0, (0.0, 1.0))]) == (0.25, 0.75)
    assert mixed([(1e308, (1.0, 0.0)), (1e308, ())]) == (0.75, 0.25)
    assert mixed([(1.0, (1.0, 0.0)), (1.0, ())], (0.0, 1.0)) == (0.5, 0.5)
    assert law_of("uniform (-1, 1)") == "uniform(-1,1)"


class Of(nn.Module):
    """A generator that makes its samples in the given way."""

    latent_dim = 2

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, z: Tensor) -> Tensor:
        made: Tensor = self.make(z)
        return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda z: z + 100 * torch.randint(10, (len(z), 1)), "other samples of the same latents"),
        (lambda z: z + 100 * (torch.arange(len(z)) % 10).unsqueeze(1), "its place in the batch"),
        (
            lambda z: z + torch.randn(len(z), 1, generator=rng()),
            "a sample must be a function of its latent",
        ),
    ],
)
def test_a_generator_that_is_no_function_of_its_rows_is_refused(make: Any, reason: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        check_function(Of(make), Latents(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_labels_are_refused_whatever_is_drawn() -> None:
    coin = Of(lambda z: z + 100 * torch.randint(2, (len(z), 1)))
    for seed in range(500):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="other samples of the same latents"):
            check_function(coin, Latents(2))


def test_batch_statistics_pass() -> None:
    check_function(Of(lambda z: z / z.std(0)), Latents(2))
