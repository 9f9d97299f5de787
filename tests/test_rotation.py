"""Turned latents: the same measure, from a first weight that is nearer to three values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import generate
from fl_wb.ternary import Ternary
from fl_wb.ternary.rotation import nearest_rotation, turned
from fl_wb.transport import energy_distance
from tests.points import same


def rounded(weight: Tensor) -> Tensor:
    return Ternary(weight)(weight).detach()


def error(weight: Tensor) -> float:
    return ((rounded(weight) - weight).norm() / weight.norm()).item()


def first(generator: nn.Module) -> Tensor:
    return next(m for m in generator.modules() if isinstance(m, nn.Linear)).weight.detach()


def uneven(name: str = "mlp") -> nn.Module:
    """Return a generator to which some latents mean much more than others."""
    torch.manual_seed(0)
    generator = make_generator(name, (1, 8, 8)).eval().requires_grad_(False)
    first(generator).mul_(torch.logspace(-1, 1, 32))
    return generator


def test_the_rotation_that_hid_three_values_is_found():
    rng = torch.Generator().manual_seed(0)
    three = torch.randint(-1, 2, (2000, 6), generator=rng).float()
    hidden, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))

    weight = three @ hidden
    rotation = nearest_rotation(weight, rounded, rng)

    assert torch.allclose(rotation @ rotation.T, torch.eye(6), atol=1e-5)
    assert error(weight) > 0.3 and error(weight @ rotation) < 0.2


@pytest.mark.parametrize("name", ["mlp", "conv", "dcgan"])
def test_the_measure_stays_and_the_weight_comes_nearer(name: str):
    generator = uneven(name)

    other = turned(generator, rounded, 32)

    assert error(first(other)) < error(first(generator))
    # R^T R = W^+ W' is orthogonal: latents that are turned the other way make the same samples
    rotation = torch.linalg.lstsq(first(generator), first(other)).solution
    z = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(other(z), generator(z @ rotation.T), atol=1e-3)
    samples, turned_samples = (generate(g, 2000, seed=s) for s, g in enumerate((generator, other)))
    assert (
        abs(energy_distance(samples, turned_samples)) < 0.02 * samples.flatten(1).norm(dim=1).mean()
    )


class Skip(nn.Module):
    """z is seen by two layers."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.one(z).relu() + self.two(z)


class Tied(nn.Module):
    """The first layer is used again, further on."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.one(self.one(z).relu())


def even() -> nn.Module:
    """Return a layer that has three values already."""
    generator = nn.Linear(4, 300)
    generator.weight.data = torch.randint(-1, 2, (300, 4)).float()
    return generator


def diverged() -> nn.Module:
    generator = nn.Linear(4, 3)
    generator.weight.data[0, 0] = torch.inf
    return generator


def convolution_first() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 1, 4))


@pytest.mark.parametrize("make", [Skip, Tied, even, diverged, convolution_first])
def test_what_cannot_be_turned_is_left_as_it_is(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    generator = make().eval()
    before = make()
    before.load_state_dict(generator.state_dict())
    assert turned(generator, rounded, 4) is generator
    assert same(generator, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_turned_or_left(dtype: torch.dtype):
    class Half(nn.Sequential):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.to(dtype)).float()

    torch.manual_seed(0)
    generator = Half(nn.Linear(4, 50)).to(dtype)
    found = turned(generator, rounded, 4)
    assert first(found).dtype == dtype
    made, given = (generate(each, 500, latent_dim=4) for each in (found, generator))
    assert energy_distance(made, given) < 0.1


class Noisy(nn.Sequential):
    """Draws random numbers besides z."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + torch.randn(len(z), 1)


def test_a_generator_may_draw_random_numbers_of_its_own():
    torch.manual_seed(0)
    generator = Noisy(nn.Linear(4, 50))
    first(generator).mul_(torch.logspace(-1, 1, 4))
    state = torch.get_rng_state()
    assert error(first(turned(generator, rounded, 4))) < error(first(generator))
    assert torch.get_rng_state().equal(state)
