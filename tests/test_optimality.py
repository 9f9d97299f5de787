"""The gap to the best objective: closed forms, and bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fl_wb.barycenter import optimality_gap
from fl_wb.transport import displacement, wasserstein1

TRIANGLE = ((0.0, 0.0), (4.0, 0.0), (2.0, math.sqrt(12)))


def point(*values: float) -> Tensor:
    return torch.tensor([values])


def test_the_bound_is_reached_by_every_point_of_a_geodesic_at_equal_weights():
    left, right = torch.randn(40, 2) * 0.5, 4 + torch.randn(40, 2) * 0.5
    translate = left + 5.0
    for samples, sources in (
        (torch.cat([left, left, left, right]), (left, right)),
        (displacement(left, translate, 0.3), (left, translate)),
        (left, (left, right)),
    ):
        objective, bound = optimality_gap(samples, sources)
        assert objective == pytest.approx(wasserstein1(*sources) / 2, rel=1e-5)
        assert objective == pytest.approx(bound, rel=1e-5)


def test_at_unequal_weights_the_heavier_measure_is_optimal():
    left, right = point(0.0, 0.0), point(3.0, 4.0)
    objective, bound = optimality_gap(left, [left, right], [3.0, 1.0])
    assert objective == pytest.approx(0.25 * 5)
    assert bound == pytest.approx(objective)


def test_three_points_of_a_triangle():
    corners = [point(*corner) for corner in TRIANGLE]
    side = 4.0
    # stage by stage, on point masses: the middle of two corners, then a third of the way
    middle = displacement(corners[0], corners[1], 1 / 2)
    centroid = displacement(middle, corners[2], 1 / 3)

    mixture, bound = optimality_gap(torch.cat(corners), corners)
    optimum, _ = optimality_gap(centroid, corners)

    assert mixture == pytest.approx(2 / 3 * side, rel=1e-6)
    assert optimum == pytest.approx(side / math.sqrt(3), rel=1e-6)
    assert mixture / optimum == pytest.approx(2 / math.sqrt(3), rel=1e-6)
    assert bound == pytest.approx(side / 2, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_below_every_objective(seed: int):
    rng = torch.Generator().manual_seed(seed)
    k = 2 + seed % 3
    sources = [
        3 * torch.randn(1, 2, generator=rng) + torch.randn(9, 2, generator=rng) for _ in range(k)
    ]
    weights = (torch.rand(k, generator=rng) + 0.05).tolist()
    candidates = [*sources, torch.cat(sources), torch.stack(sources).mean(0)]
    for candidate in candidates:
        objective, bound = optimality_gap(candidate, sources, weights)
        assert 0 < bound <= objective + 1e-9


def test_weights_of_the_gap_are_normalised():
    sources = [point(0.0), point(1.0), point(5.0)]
    one = optimality_gap(point(2.0), sources, [1, 2, 3])
    other = optimality_gap(point(2.0), sources, [10, 20, 30])
    assert one == pytest.approx(other)
    assert one[0] == pytest.approx((2 * 1 + 1 * 2 + 3 * 3) / 6)
    with pytest.raises(ValueError, match="2 weights for 3 measures"):
        optimality_gap(point(2.0), sources, [1, 2])
