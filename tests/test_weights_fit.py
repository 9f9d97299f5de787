"""Weights fitted to a few samples: exact where they can be known, humble where they cannot."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from fl_wb.adaptation import fit_gate, own_start
from fl_wb.adaptation.weights import WEIGHTS, cell_samples, fit_weights
from fl_wb.generators.code import Code
from fl_wb.generators.reweighted import reweighted
from fl_wb.generators.sampling import generate
from fl_wb.transport import energy_distance, wasserstein1


class Line(nn.Module):
    """The exact mixture of N(c_k, spread^2) on a line, by its code."""

    def __init__(self, centres: list[float], shares: list[float], spread: float = 0.1) -> None:
        super().__init__()
        self.spread = spread
        self.latent_dim, self.code = 3, Code(shares)
        self.centres = nn.Parameter(torch.tensor(centres))

    def forward(self, z: Tensor) -> Tensor:
        cell, inner = self.code.place(z)
        return (self.centres[cell] + self.spread * inner[:, 0]).unsqueeze(1)


def draws(centres: list[float], counts: list[int], seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    parts = [
        c + 0.1 * torch.randn(n, 1, generator=rng) for c, n in zip(centres, counts, strict=True)
    ]
    return torch.cat(parts)


CENTRES, SHARES = [0.0, 1.0, 2.0, 5.0], [0.4, 0.3, 0.2, 0.1]
LINE = Line(CENTRES, SHARES)


@pytest.mark.parametrize("counts", [[0, 300, 0, 100], [50, 50, 200, 100], [400, 0, 0, 0]])
def test_the_weights_of_a_mixture_of_the_cells_are_found(counts: list[int]):
    weights = fit_weights(LINE, LINE.code, draws(CENTRES, counts))
    torch.testing.assert_close(weights, torch.tensor(counts).double() / 400, atol=0.02, rtol=0)
    assert weights.dtype == torch.float64 and weights.min() >= 0
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_a_cell_that_no_sample_supports_gets_next_to_nothing():
    weights = fit_weights(LINE, LINE.code, draws(CENTRES, [10, 0, 10, 0]))
    assert weights[1] < 0.03 and weights[3] < 0.03
    assert fit_weights(LINE, LINE.code, draws(CENTRES, [0, 10, 0, 0]))[1] > 0.975


def test_of_cells_that_overlap_each_gets_its_part():
    # every sample may be of both cells, whose densities differ by a factor of e^(4x - 2)
    near = Line([0.0, 1.0], [0.5, 0.5], spread=0.5)
    for share in (0.0, 0.25, 0.8):
        samples = generate(reweighted(near, near.code, (1 - share, share)), 1000, seed=4)
        assert fit_weights(near, near.code, samples)[1] == pytest.approx(share, abs=0.08)


def test_no_other_weights_make_the_samples_likelier():
    near = Line([0.0, 1.0, 2.0], [0.5, 0.3, 0.2], spread=0.5)
    samples = generate(reweighted(near, near.code, (0.1, 0.6, 0.3)), 800, seed=4)
    centres = torch.arange(3.0)
    densities = torch.distributions.Normal(centres, 0.5).log_prob(samples).exp().double()
    most = (densities @ fit_weights(near, near.code, samples)).log().mean()
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.rand(3, generator=rng).double() + 1e-3
        assert (densities @ (other / other.sum())).log().mean() < most + 0.01


def test_one_sample_says_nothing_and_a_few_little():
    shares = torch.tensor(SHARES, dtype=torch.float64)
    assert torch.equal(fit_weights(LINE, LINE.code, draws(CENTRES, [0, 1, 0, 0])), shares)
    target = generate(LINE, 1000, seed=9)
    for n in (2, 3, 5):
        lost = [
            energy_distance(
                generate(
                    reweighted(
                        LINE,
                        LINE.code,
                        fit_weights(LINE, LINE.code, generate(LINE, n, seed=seed)),
                    ),
                    1000,
                    seed=1,
                ),
                target,
            ).item()
            for seed in range(20)
        ]
        assert sum(lost) / len(lost) < 0.05  # of a mean distance of 1.7


def test_radii_are_inverse_distances():
    samples = draws(CENTRES, [20, 0, 10, 0])
    weights = fit_weights(LINE, LINE.code, samples, method="radius")
    cells = cell_samples(LINE, LINE.code, torch.Generator().manual_seed(0))
    radii = torch.tensor([wasserstein1(cell, samples) for cell in cells], dtype=torch.float64)
    torch.testing.assert_close(weights * radii, (weights * radii)[0].expand(4))
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > weights[1] > weights[3]


def test_plain_methods():
    few = draws(CENTRES, [3, 0, 0, 0])
    assert fit_weights(LINE, LINE.code, few, method="uniform").tolist() == [0.25] * 4
    assert fit_weights(LINE, LINE.code, few, method="shares").tolist() == list(LINE.code.shares)
    alone = Line([1.0], [3.0])
    for method in WEIGHTS:
        assert fit_weights(alone, alone.code, few, method=method).tolist() == [1.0]


def test_the_same_arguments_give_the_same_bits_and_nothing_moves():
    few, state = draws(CENTRES, [5, 5, 0, 0]), torch.random.get_rng_state()
    one, two = (fit_weights(LINE, LINE.code, few) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.random.get_rng_state()) and LINE.training


def test_sixty_four_cells_take_no_more_than_seconds():
    many = Line([float(k) for k in range(64)], [1.0] * 64)
    few = draws([3.0, 40.0], [10, 10])
    began = time.process_time()
    weights = fit_weights(many, many.code, few)
    assert time.process_time() - began < 5
    assert weights[3] + weights[40] > 0.8


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="method='best' is not one of fitted, radius"):
        fit_weights(LINE, LINE.code, torch.zeros(3, 1), method="best")
    with pytest.raises(ValueError, match="no samples to fit weights to"):
        fit_weights(LINE, LINE.code, torch.zeros(0, 1))


@pytest.mark.parametrize(
    ("samples", "error", "text"),
    [
        (torch.zeros(3, 1, dtype=torch.uint8), TypeError, "are uint8, and the generator makes"),
        (torch.zeros(3, 2), ValueError, r"shape \(2,\) for a generator that makes \(1,\)"),
        (torch.zeros(3, 1, 1), ValueError, r"shape \(1, 1\) for a generator that makes \(1,\)"),
        (torch.zeros(3), ValueError, r"shape \(\) for a generator that makes \(1,\)"),
        (torch.tensor([[0.0], [torch.nan]]), ValueError, "not all finite"),
    ],
)
def test_what_is_no_sample_is_refused(samples: Tensor, error: type[Exception], text: str):
    for method in ("fitted", "radius"):
        with pytest.raises(error, match=text):
            fit_weights(LINE, LINE.code, samples, method=method)
        with pytest.raises(error, match=text):
            own_start(LINE, LINE.code, samples, method=method)
    with pytest.raises(error, match=text):
        fit_gate(LINE, samples)


def test_samples_of_another_unit_are_said():
    near = Line([-0.95, 0.9], [0.5, 0.5], spread=0.01)
    for of in (lambda few: fit_weights(near, near.code, few), lambda few: fit_gate(near, few)):
        with pytest.warns(UserWarning, match=r"should they be 2 x - 1\?"):
            of(torch.tensor([[0.1], [0.9], [0.5]]))


def test_a_cell_that_is_none_cannot_be_forgotten() -> None:
    with pytest.raises(ValueError, match=r"without=\[4\] must be cells, from 0 to 3"):
        fit_weights(LINE, LINE.code, draws(CENTRES, [5, 5, 5, 5]), without=[0, 4])
