"""What nodes weigh in the end: bounded, finite, and in the proportion of what they say."""

from __future__ import annotations

import math
import random

import pytest

from fl_wb.messages.weights import bounded_weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([3.0, 1.0], [3.0, 1.0]),  # three times the other: as it is
        ([4.0, 1.0], [0.75, 0.25]),
        ([1e12, 1.0, 3.0], [0.6, 0.1, 0.3]),
        ([1e308, 1e308], [0.5, 0.5]),
        ([1e308, 1e308, 1.0], [0.5, 0.5, 0.0]),
        ([1e308, 1e-308], [0.75, 0.25]),
        ([5.0], [5.0]),
        ([], []),
    ],
)
def test_in_closed_form(weights: list[float], expected: list[float]) -> None:
    assert bounded_weights(weights, 3) == pytest.approx(expected)


def test_no_share_is_above_the_bound_and_the_others_keep_their_proportions() -> None:
    rng = random.Random(0)
    for _ in range(200):
        weights = [math.exp(rng.gauss(0, 3)) for _ in range(rng.randint(2, 12))]
        found = bounded_weights(weights, 3)
        shares = [weight / sum(found) for weight in found]
        cap = 3 / (2 + len(weights))
        assert max(shares) <= cap * (1 + 1e-9) <= 3 / len(weights) * (1 + 1e-9)
        free = [s / w for s, w in zip(shares, weights, strict=True) if s < cap * (1 - 1e-9)]
        assert max(free) == pytest.approx(min(free))


def test_an_upload_of_several_nodes_counts_as_several() -> None:
    assert bounded_weights([8.0, 1.0, 1.0], 1, nodes=[8, 1, 1]) == [8.0, 1.0, 1.0]
    assert bounded_weights([80.0, 1.0, 1.0], 1, nodes=[8, 1, 1]) == pytest.approx([0.8, 0.1, 0.1])


@pytest.mark.parametrize("max_share", [0.5, 0, -1, math.nan])
def test_a_bound_below_an_equal_share_is_refused(max_share: float) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        bounded_weights([1.0], max_share)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        bounded_weights([1.0, weight])
