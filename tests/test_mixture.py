"""The exact mixture: the push-forward of its maps, and a generator like any other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.generators.mixture import Mixture
from tests.points import Gaussian


def shares(samples: Tensor, centres: Sequence[Sequence[float]]) -> Tensor:
    nearest = torch.cdist(samples, torch.tensor(centres)).argmin(1)
    return nearest.bincount(minlength=len(centres)) / len(samples)


def at(*point: float) -> nn.Module:
    return Gaussian(point, std=0.25)


def latents(n: int = 20_000) -> Tensor:
    """Draw standard normal latents, the deciding first coordinate spread evenly."""
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    z[:, 0] = torch.special.ndtri((torch.arange(n) + 0.5) / n)
    return z


def off_normal(values: Tensor, mean: float = 0.0, std: float = 1.0) -> float:
    """Return the Kolmogorov-Smirnov distance to N(mean, std^2)."""
    return float(kstest(values.numpy(), "norm", (mean, std)).statistic)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_push_forward_is_the_mixture(t: float):
    with torch.no_grad():
        samples = Code([1 - t, t]).mix([at(-2.0, 1.0), at(2.0, -1.0)], latents())
    second = samples[:, 0] > 0
    assert second.float().mean().item() == pytest.approx(t, abs=1e-3)
    for mode, (x, y) in ((~second, (-2, 1)), (second, (2, -1))):
        assert off_normal(samples[mode, 0], x, 0.25) < 2e-3
        assert off_normal(samples[mode, 1], y, 0.25) < 0.04


def test_a_mixture_of_many_has_their_shares_and_is_a_generator():
    centres = [(-4.0, 0.0), (0.0, 0.0), (4.0, 0.0)]
    mixture = Mixture([at(*centre) for centre in centres], [1.0, 5.0, 2.0])
    with torch.no_grad():
        found = shares(mixture(latents()), centres)
    torch.testing.assert_close(found, torch.tensor([0.125, 0.625, 0.25]), atol=5e-3, rtol=0)
    assert mixture.latent_dim == at(0.0, 0.0).latent_dim
    mixture(latents(100)).sum().backward()
    assert all(parameter.grad is not None for parameter in mixture.parameters())


@pytest.mark.parametrize("t", [1e-3, 0.5, 1 - 1e-3])
def test_extreme_latents_make_finite_samples(t: float):
    z = torch.tensor([[-40.0], [-9.0], [0.0], [9.0], [40.0]])
    there = Code([1 - t, t]).mix([lambda z: z] * 2, z)
    assert torch.isfinite(there).all() and there.abs().max() < 10
    assert z[0, 0] == -40  # the argument is left alone
