"""Planes of three values: their closed form, gradients, what a weight loses, how many it gets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

from fl_wb.ternary import Ternarization, Ternary, pack, ternarize, unpack
from fl_wb.ternary.planes import mean_above, planes_needed
from tests.points import same


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 2.0])
def test_the_mean_above_a_threshold_is_the_truncated_gaussian_s(ratio: float):
    tail, _ = quad(norm.pdf, ratio, np.inf)
    expected, _ = quad(lambda x: x * norm.pdf(x) / tail, ratio, np.inf)
    assert mean_above(torch.tensor(ratio)).item() == pytest.approx(expected, rel=1e-5)


def test_a_gaussian_weight_becomes_its_mean_magnitude_above_the_threshold():
    rng = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(400, 400, generator=rng)
    ternary = Ternary(weight)
    with torch.no_grad():
        ternary.threshold.fill_(0.8)
        result = ternary(weight)
    above = weight.abs() > 0.08
    assert result.sign().ne(weight.sign() * above).float().mean() < 1e-3
    alpha = result.max().item()
    assert alpha == pytest.approx(weight[above].abs().mean().item(), rel=1e-3)
    assert alpha == pytest.approx(0.1 * mean_above(torch.tensor(0.8)).item(), rel=0.01)
    assert set(result.flatten().tolist()) == {-alpha, 0.0, alpha}


def test_the_first_threshold_is_seven_tenths_of_the_mean_magnitude():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    threshold = Ternary(weight).threshold.item() * weight.square().mean().sqrt()
    assert threshold.item() == pytest.approx(0.7 * weight.abs().mean().item(), rel=1e-3)


def test_gradients_go_straight_to_weights_and_by_alpha_to_the_threshold():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 30, generator=rng, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(30, 30, generator=rng, dtype=torch.float64)
    ternary = Ternary(weight)

    result = ternary(weight)
    (upstream * result).sum().backward()

    assert weight.grad is not None and weight.grad.equal(upstream)
    signs, scale = result.detach().sign(), weight.detach().square().mean().sqrt()
    ratio, step = ternary.threshold.detach(), 1e-5
    slope = (mean_above(ratio + step) - mean_above(ratio - step)) / (2 * step)
    expected = (upstream * signs).sum() * scale * slope
    torch.testing.assert_close(ternary.threshold.grad, expected, rtol=1e-5, atol=0)


def lost(weight: Tensor, planes: int = 1) -> float:
    rest = Ternary(weight, planes)(weight).detach() - weight
    return (rest.norm() / weight.norm()).item()


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[0.9]]),
        torch.tensor([-1e-5]),
        torch.full((3, 5, 2), -0.3),
        torch.tensor([[2.0, 0.0, -2.0, 2.0], [0.0, 2.0, 2.0, 0.0]]),
        torch.tensor([[0.0, 4.0], [4.0, 4.0]]),
        torch.zeros(2, 2),
    ],
)
def test_what_has_one_magnitude_stays_as_it_is(weight: Tensor):
    torch.testing.assert_close(Ternary(weight)(weight).detach(), weight, rtol=1e-6, atol=0)


def test_weights_of_one_sign_keep_their_mean():
    weight = 1 + 0.2 * torch.rand(30, 30, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        result = Ternary(sign * weight)(sign * weight)
        assert result.mean().item() == pytest.approx(sign * 1.1, abs=0.01)
        assert lost(sign * weight) < 0.06 and lost(sign * weight, 2) < 0.03


def test_every_plane_takes_up_what_the_others_leave():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    one, two, three = (lost(weight, planes) for planes in (1, 2, 3))
    assert 0.4 < one < 0.5 and two < 0.5 * one and three < 0.7 * two
    first = Ternary(weight)(weight).detach()
    both = first + Ternary(weight - first)(weight - first).detach()
    assert both.equal(Ternary(weight, 2)(weight))


# how many a layer gets


def test_a_layer_gets_the_planes_that_it_needs():
    # Whose samples are a cliff of the first weight needs it exactly; the last one is linear.
    class Cliff(nn.Module):
        latent_dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 8)

        def forward(self, z: Tensor) -> Tensor:
            return self.last((1.5 * self.first(z)).sin())

    torch.manual_seed(0)
    generator = Cliff().eval()
    z = torch.randn(500, 4)
    assert planes_needed(generator, z, 3, seed=0) == [1, 1]
    with torch.no_grad():
        generator.first.weight.mul_(4)
    assert planes_needed(generator, z, 3, seed=0) == [2, 1]
    assert planes_needed(generator, z, 1, seed=0) == [1, 1]

    ternary = ternarize(generator, settings=Ternarization(0, planes=2))
    assert len(ternary.first.weight.abs().unique()) == 5
    assert len(ternary.last.weight.abs().unique()) == 2
    assert same(unpack(pack(ternary), Cliff()), ternary)


@pytest.mark.parametrize(
    ("widths", "planes"),
    [((32, 32, 32, 32), [1, 1, 1]), ((3, 54, 54, 1), [1, 1, 3]), ((3, 80, 80, 1), [3, 1, 3])],
)
def test_the_smallest_layers_have_all_planes_while_they_are_a_twentieth(
    widths: tuple[int, ...], planes: list[int]
):
    torch.manual_seed(0)
    first, middle, last = (nn.Linear(*pair) for pair in itertools.pairwise(widths))
    generator = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last).eval()
    z = torch.randn(500, widths[0])
    assert planes_needed(generator, z, 3, seed=0) == planes
    assert planes_needed(generator, z, 1, seed=0) == [1, 1, 1]


@pytest.mark.parametrize("planes", [0, 4, -1])
def test_planes_out_of_range_are_refused(planes: int):
    with pytest.raises(ValueError, match=f"planes={planes} must be at least 1 and less than 4"):
        Ternarization(planes=planes)
