"""Screening: outliers among samples, hostile nodes in rounds."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from ot import sliced_wasserstein_distance

from fl_wb.app.config import compose
from fl_wb.data.datasets import load
from fl_wb.messages.screening import outliers
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import STAGE, critic, generator, initial_arrays, reply, seeded_state

HOSTILE = (12, 15)


def spread(*centres: float) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(64, 3, generator=rng) + centre for centre in centres]


def test_far_sets_are_found_also_when_they_agree() -> None:
    sets = spread(0, 0.2, 9, -0.1, 9, 0.1, 0)
    assert [index for index, _ in outliers(sets, threshold=1.5)] == [2, 4]


def test_alike_and_few_sets_are_left_alone() -> None:
    assert outliers(spread(0, 0.1, -0.1, 0.2), threshold=1.5) == []
    assert outliers(spread(0, 0, 99), threshold=1.5) == []


def test_scale_does_not_matter() -> None:
    sets = spread(0, 0.2, 9, -0.1, 0)
    assert [i for i, _ in outliers([1e-6 * part for part in sets], threshold=2)] == [2]


def test_one_that_differs_from_all_the_same_is_infinitely_far() -> None:
    same = torch.zeros(8, 2)
    ((index, why),) = outliers([same, same, same, same + 1], threshold=2)
    assert index == 3
    assert "inf times further" in why


def test_collapsed_sets_are_found_where_they_are_not_far() -> None:
    rng = torch.Generator().manual_seed(2)
    sets = [torch.randn(64, 8, generator=rng) + 2 * torch.randn(8, generator=rng) for _ in range(6)]
    assert outliers(sets, threshold=3) == []
    for index in (1, 4):
        sets[index] = sets[index].mean(dim=0) + 0.01 * torch.randn(64, 8, generator=rng)
    why = "its samples have 0.01 of the spread that is typical"
    assert outliers(sets, threshold=3) == [(1, why), (4, why)]


def test_sets_of_different_kinds_are_told_from_noise() -> None:
    # Honest: each its own place in half of the coordinates, all the same in the other half. The
    # plain distances of noise are no larger than those of the honest among each other.
    rng = torch.Generator().manual_seed(2)
    sets = []
    for _ in range(6):
        own = 0.1 * torch.randn(64, 8, generator=rng) + torch.randn(8, generator=rng)
        sets.append(torch.cat([own, 0.01 * torch.randn(64, 8, generator=rng) - 1], dim=1))
    sets += [0.5 * torch.randn(64, 16, generator=rng) - 0.5 for _ in range(2)]
    plain = [
        sorted(sliced_wasserstein_distance(one, other, p=1, seed=0) for other in sets)[4]
        for one in sets
    ]
    assert max(plain[6:]) < 2 * min(plain[:6])
    assert [index for index, _ in outliers(sets, threshold=3)] == [6, 7]


def digits(*lists: list[int]) -> list[torch.Tensor]:
    """Return 256 real digits of each list of classes, drawn with replacement."""
    everything, _ = load(compose([]).data)
    sets = []
    for number, classes in enumerate(lists):
        some = everything.images[torch.isin(everything.labels, torch.tensor(classes))]
        rng = torch.Generator().manual_seed(number)
        sets.append(some[torch.randint(len(some), (256,), generator=rng)])
    return sets


SOURCES = {
    "of one class": [[k] for k in range(8)],
    "of five": [[k % 10 for k in range(2 * s, 2 * s + 5)] for s in range(8)],
    "unlike": [[0], [1], [2, 3], [4, 5, 6, 7], [8, 9], list(range(10)), [5], [7]],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_half_the_ink_and_a_mark_are_seen_in_a_samples_own_values(kind: str) -> None:
    honest = digits(*SOURCES[kind])
    assert outliers(honest, threshold=3) == []
    dimmed, marked = [[*honest] for _ in range(2)]
    for index in (0, 5):
        dimmed[index] = (honest[index] + 1) / 2 - 1
        marked[index] = honest[index].clone()
        marked[index][:205, :, :2, :2] = 1  # four in five
    assert [index for index, _ in outliers(dimmed, threshold=3)] == [0, 5]
    assert [index for index, _ in outliers(marked, threshold=3)] == [0, 5]


def test_a_hundred_sets_are_compared_with_some_of_them() -> None:
    sets = spread(*[0.0] * 60, *[9.0] * 2, *[0.0] * 40)
    assert [index for index, _ in outliers(sets, threshold=2)] == [60, 61]


@pytest.mark.parametrize("threshold", [1.0, 0.0, math.nan])
def test_a_threshold_below_the_typical_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be more than 1"):
        outliers(spread(0, 0, 0, 0), threshold=threshold)
    with pytest.raises(ValueError, match="must be more than 1"):
        AdaptiveCoalescence(generator=generator, screening=threshold)


def hostile_app() -> ClientApp:
    """Six nodes of one kind; two send generators whose every sample is near a corner."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = {name: value.clone() for name, value in seeded_state(context.node_id).items()}
        if context.node_id in HOSTILE:
            last = [name for name in state if name.endswith("bias")][-1]
            state[last] = state[last] + 1.5
        return reply(message, ArrayRecord(state))

    return app


def test_hostile_uploads_are_screened_out_and_their_nodes_no_longer_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Prepare
    grid, clean = InProcessGrid(hostile_app(), nodes=6), InProcessGrid(hostile_app(), nodes=6)
    for node_id in HOSTILE:
        del clean.nodes[node_id]
    settings = {"generator": generator, "critic": critic, "stage": STAGE}
    start = {"initial_arrays": initial_arrays(), "num_rounds": 3}

    # Execute
    strategy = AdaptiveCoalescence(**settings, screening=2.0, patience=2)
    result = strategy.start(grid=grid, **start)

    # Assert: the barycenter of the others, bit for bit
    expected = AdaptiveCoalescence(**settings).start(grid=clean, **start)
    for name, array in expected.arrays.items():
        assert (array.numpy() == result.arrays[name].numpy()).all()
    dropped = [result.train_metrics_clientapp[n]["uploads-dropped"] for n in (1, 2, 3)]
    assert dropped == [2, 2, 0]
    for node_id, node in grid.nodes.items():
        assert node.received.count("train") == (2 if node_id in HOSTILE else 3)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("times further from the others'" in text for text in said) == 4
    assert sum("is not asked to train again" in text for text in said) == 2


def test_without_screening_hostile_uploads_are_merged() -> None:
    strategy = AdaptiveCoalescence(generator=generator, critic=critic, stage=STAGE)
    grid = InProcessGrid(hostile_app(), nodes=6)
    result = strategy.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)
    assert result.train_metrics_clientapp[1]["uploads-merged"] == 6


def test_one_nan_does_not_hide_another_set() -> None:
    rng = torch.Generator().manual_seed(0)
    sets = [torch.randn(64, 16, generator=rng) for _ in range(8)]
    sets[3] += 20
    sets[5][7, 2] = torch.nan
    found = dict(outliers(sets, threshold=3))
    assert sorted(found) == [3, 5]
    assert found[5] == "its samples are not finite"
