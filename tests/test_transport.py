"""Optimal transport on samples against closed forms and independent solvers."""

from __future__ import annotations

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import Tensor

from fl_wb import metrics
from fl_wb.transport import LONG, coupling, displacement, energy_distance, wasserstein1


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_w1_of_translates_is_the_length_of_the_shift():
    x = normal(80, 3, seed=0)
    y = x[torch.randperm(80)] + torch.tensor([2.0, 3.0, 6.0])
    assert wasserstein1(x, y) == pytest.approx(7, abs=1e-5)


def test_w1_on_the_line_is_the_distance_of_the_sorted_samples():
    x, y = normal(50, seed=0), 3 * normal(50, seed=1) ** 2
    sorted_distance = (x.sort().values - y.sort().values).abs().mean().item()
    assert wasserstein1(x, y) == pytest.approx(sorted_distance, rel=1e-6)


def test_w1_on_the_line_of_sets_of_different_sizes():
    x, y = normal(31, seed=0), 1 + 2 * normal(50, seed=1)
    expected = wasserstein_distance(x.numpy(), y.numpy())
    assert wasserstein1(x, y) == pytest.approx(expected, rel=1e-6)


def test_w1_is_the_cost_of_the_best_assignment():
    x, y = normal(40, 5, seed=0), 1 + normal(40, 5, seed=1)
    cost = torch.cdist(x.double(), y.double()).numpy()
    rows, columns = linear_sum_assignment(cost)
    assert wasserstein1(x, y) == pytest.approx(cost[rows, columns].mean(), rel=1e-9)


def test_w1_agrees_with_pot_on_images_of_different_number():
    x, y = normal(20, 1, 4, 4, seed=0), 0.5 + normal(33, 1, 4, 4, seed=1)
    solved = ot.solve_sample(x.flatten(1).numpy(), y.flatten(1).numpy(), metric="euclidean")
    assert wasserstein1(x, y) == pytest.approx(float(solved.value), rel=1e-5)


def test_w1_is_zero_on_one_set_and_symmetric():
    x, y = normal(30, 2, seed=0), normal(40, 2, seed=1)
    assert wasserstein1(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert wasserstein1(x, y) == pytest.approx(wasserstein1(y, x), rel=1e-9)


def test_w1_leaves_a_graph_alone():
    x = normal(4, 2, seed=0).requires_grad_(True)
    wasserstein1(2 * x, x.detach())
    assert x.grad is None


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (torch.zeros(0, 2), torch.zeros(3, 2), r"non-empty.*\(0, 2\)"),
        (torch.zeros(3, 2), torch.zeros(0, 2), "non-empty"),
        (torch.zeros(3, 2), torch.zeros(3, 3), r"one size.*\(3, 2\) and \(3, 3\)"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 1), "finite"),
        (torch.zeros(2, 1), torch.tensor([[0.0], [torch.inf]]), "finite"),
    ],
)
def test_w1_refuses_what_has_no_distance(x: Tensor, y: Tensor, text: str):
    with pytest.raises(ValueError, match=text):
        wasserstein1(x, y)


def test_coupling_is_the_best_permutation_for_the_squared_cost():
    x, y = normal(60, 2, seed=0), normal(60, 2, seed=1)

    index = coupling(x, y)

    assert index.sort().values.equal(torch.arange(60))
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert cost[range(60), index.numpy()].sum() == pytest.approx(cost[rows, columns].sum())


def test_displacement_of_translates_is_the_translate():
    x, shift = normal(64, 1, 2, 2, seed=0), torch.tensor([[[3.0, -1.0], [2.0, 0.5]]])
    y = (x + shift)[torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    for t in (0.25, 0.5, 0.75):
        torch.testing.assert_close(displacement(x, y, t), x + t * shift)


def test_displacement_runs_from_one_set_to_the_other():
    x, y = normal(20, 2, seed=0), 4 + normal(20, 2, seed=1)
    assert displacement(x, y, 0.0).equal(x)
    assert sorted(displacement(x, y, 1.0).tolist()) == sorted(y.tolist())


def test_displacement_moves_at_constant_speed():
    # McCann: W2(nu_s, nu_t) = |t - s| W2(nu_0, nu_1)
    x, y = normal(50, 2, seed=0), 2 + 3 * normal(50, 2, seed=1)

    def w2(a: Tensor, b: Tensor) -> float:
        return float(ot.solve_sample(a, b, metric="sqeuclidean").value) ** 0.5

    there = w2(x, y)
    assert w2(x, displacement(x, y, 0.3)) == pytest.approx(0.3 * there, rel=1e-4)
    assert w2(displacement(x, y, 0.3), y) == pytest.approx(0.7 * there, rel=1e-4)


def test_energy_distance_of_two_points():
    x, y = torch.zeros(5, 2), torch.tensor([[3.0, 4.0]]).repeat(7, 1)
    assert energy_distance(x, y).item() == pytest.approx(10)


def test_energy_distance_is_that_of_the_metrics():
    x, y = normal(40, 1, 3, 3, seed=0), 0.5 + normal(60, 1, 3, 3, seed=1)
    assert energy_distance(x, y).item() == pytest.approx(metrics.energy_distance(x, y), abs=1e-5)


def test_energy_distance_is_unbiased():
    # Of one measure with itself the mean over many draws is 0; a biased estimate would have
    # 2 E|x - x'| / n = 0.23 here.
    draws = [energy_distance(normal(10, 1, seed=i), normal(10, 1, seed=-i - 1)) for i in range(400)]
    assert abs(torch.stack(draws).mean().item()) < 0.05


def test_descent_on_the_energy_distance_moves_samples_to_their_target():
    x, y = torch.zeros(30, 2, requires_grad=True), 3 + normal(40, 2, seed=0)
    before = energy_distance(x, y)
    for _ in range(60):
        # the first step starts from thirty times the same sample, where distances have a kink
        (gradient,) = torch.autograd.grad(energy_distance(x, y), x)
        assert torch.isfinite(gradient).all()
        x = (x - 3 * gradient + 0.01 * normal(30, 2, seed=1)).detach().requires_grad_(True)
    assert energy_distance(x, y) < before / 10


@pytest.mark.parametrize("away", [0.0, 1000.0])
def test_long_samples_have_the_same_distances_and_gradients(away: float):
    # twins among them, as in a batch that is drawn with replacement
    x = (away + 0.3 * normal(30, LONG + 1, seed=1))[torch.arange(30) // 2 * 2]
    y = away + 0.3 * normal(30, LONG + 1, seed=2)
    cells = torch.arange(30) % 3
    long, short = (rows.clone().requires_grad_(True) for rows in (x, x))
    for within in (None, cells):
        one = energy_distance(long, y, within)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fl_wb.transport.LONG", x.shape[1])
            other = energy_distance(short, y, within)
        assert one.item() == pytest.approx(other.item(), abs=2e-3)
        (mine,), (theirs,) = torch.autograd.grad(one, long), torch.autograd.grad(other, short)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_energy_distance_within_cells_is_the_mean_of_the_cells():
    x, y = normal(30, 3, seed=1), normal(30, 3, seed=2)
    cells = torch.arange(30) % 3 % 2  # twenty of one, ten of the other
    of_each = [energy_distance(x[cells == k], y[cells == k]) for k in (0, 1)]
    expected = (20 * of_each[0] + 10 * of_each[1]) / 30
    assert energy_distance(x, y, cells).item() == pytest.approx(expected.item(), abs=1e-5)
    assert energy_distance(x, y, 0 * cells).item() == pytest.approx(
        energy_distance(x, y).item(), abs=1e-5
    )


def test_energy_distance_of_a_lone_sample_in_its_cell_is_to_its_partner():
    x, y = torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [7.0]])
    assert energy_distance(x, y, torch.tensor([0, 1])).item() == pytest.approx(2 * 1.5)
