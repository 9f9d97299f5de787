"""Roles of nodes: who trains, who evaluates, who is asked, and what FedAvg makes of it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result

from fl_wb.strategies import AdaptiveCoalescence, RoleFedAvg
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import STAGE, answers_role, critic, evaluates, generator, initial_arrays, uploads


def strategy(**arguments: Any) -> AdaptiveCoalescence:
    return AdaptiveCoalescence(generator=generator, critic=critic, stage=STAGE, **arguments)


def app(*parts: Any) -> ClientApp:
    made = ClientApp()
    uploads(made)
    for part in parts:
        part(made)
    return made


def start(strategy: FedAvg, grid: InProcessGrid, rounds: int = 1) -> Result:
    return strategy.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=rounds)


def test_roles_decide_who_trains_and_who_evaluates() -> None:
    # Prepare
    grid = InProcessGrid(app(evaluates, answers_role))
    roles = {"source": [], "target": [], "both": [], "nonsense": []}
    for role in ("source", "target", "both", "nonsense", "target"):
        roles[role].append(grid.add({"role": role}))

    # Execute
    start(strategy(), grid, rounds=2)

    # Assert: asked once; an odd role is "both"
    work = {
        "source": ["query", "train", "train"],
        "target": ["query", "evaluate", "evaluate"],
        "both": ["query", "train", "evaluate", "train", "evaluate"],
    }
    work["nonsense"] = work["both"]
    for role, nodes in roles.items():
        for node_id in nodes:
            assert grid.nodes[node_id].received == work[role]


def test_minimums_do_not_wait_for_nodes_of_a_role_that_are_not_there() -> None:
    grid = InProcessGrid(app(evaluates, answers_role))
    grid.add({"role": "source"})
    grid.add({"role": "target"})
    result = start(strategy(min_train_nodes=2, min_evaluate_nodes=2), grid)
    assert result.train_metrics_clientapp[1]["uploads-merged"] == 1


def test_fractions_count_the_nodes_of_a_role() -> None:
    grid = InProcessGrid(app(evaluates, answers_role))
    for role in ["source"] * 4 + ["target"] * 4:
        grid.add({"role": role})
    result = start(
        strategy(
            fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.25, min_evaluate_nodes=1
        ),
        grid,
    )
    asked = [kind for node in grid.nodes.values() for kind in node.received]
    assert (asked.count("train"), asked.count("evaluate")) == (2, 1)
    assert result.train_metrics_clientapp[1]["uploads-merged"] == 2


def test_an_app_without_query_is_asked_once_and_plays_both_roles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = InProcessGrid(app(evaluates), nodes=3)
    start(strategy(), grid, rounds=2)
    asked = [kind for node in grid.nodes.values() for kind in node.received]
    assert (asked.count("query"), asked.count("train"), asked.count("evaluate")) == (1, 6, 6)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_node_that_does_not_answer_is_asked_again() -> None:
    grid = InProcessGrid(app(evaluates, answers_role))
    for role in ("source", "target", "source"):
        grid.add({"role": role})
    grid.nodes[12].silent = lambda message: (
        message.metadata.message_type == "query" and len(grid.nodes[12].received) == 1
    )
    start(strategy(), grid)
    assert grid.nodes[12].received == ["query", "train", "query", "evaluate"]


def test_fedavg_with_roles_is_fedavg() -> None:
    grid = InProcessGrid(app(evaluates), nodes=2)
    result = start(RoleFedAvg(), grid)
    expected = start(FedAvg(), InProcessGrid(app(evaluates), nodes=2))
    for name, array in expected.arrays.items():
        assert np.allclose(array.numpy(), result.arrays[name].numpy())
    assert isinstance(result.train_metrics_clientapp[1], MetricRecord)
