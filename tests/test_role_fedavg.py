"""Roles of nodes: who trains, who evaluates, who is asked, and what FedAvg makes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result

from fl_wb.app.config import compose
from fl_wb.server_app import make_strategy
from fl_wb.strategies import AdaptiveCoalescence, RoleFedAvg
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import (
    STAGE,
    answers_role,
    critic,
    evaluates,
    generator,
    initial_arrays,
    reply,
    seeded_state,
    uploads,
)


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

    # Assert: asked once; an odd role is an error of that node, which is asked again each time
    work = {
        "source": ["query", "train", "train"],
        "target": ["query", "evaluate", "evaluate"],
        "both": ["query", "train", "evaluate", "train", "evaluate"],
        "nonsense": ["query"] * 4,
    }
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


def test_an_app_without_query_is_asked_once_a_node_and_plays_both_roles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = InProcessGrid(app(evaluates), nodes=3)
    start(strategy(), grid, rounds=2)
    asked = [kind for node in grid.nodes.values() for kind in node.received]
    assert (asked.count("query"), asked.count("train"), asked.count("evaluate")) == (3, 6, 6)
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


def test_of_nodes_that_left_no_role_is_kept() -> None:
    alone = {"min_available_nodes": 1, "min_train_nodes": 1, "min_evaluate_nodes": 1}
    grid, run = InProcessGrid(app(evaluates, answers_role)), strategy(**alone)
    left, stays = grid.add({"role": "source"}), grid.add({"role": "source"})
    start(run, grid)
    del grid.nodes[left]
    start(run, grid)
    grid.add({"role": "target"}, node_id=left)
    start(run, grid)
    assert grid.nodes[left].received == ["query", "evaluate"]
    assert grid.nodes[stays].received.count("query") == 1


def test_fedavg_with_roles_is_fedavg() -> None:
    grid = InProcessGrid(app(evaluates), nodes=2)
    result = start(RoleFedAvg(), grid)
    expected = start(FedAvg(), InProcessGrid(app(evaluates), nodes=2))
    for name, array in expected.arrays.items():
        assert np.allclose(array.numpy(), result.arrays[name].numpy())
    assert isinstance(result.train_metrics_clientapp[1], MetricRecord)


@pytest.mark.parametrize("reason", ["No query function registered", "out of order"])
def test_what_one_node_answers_says_nothing_of_the_others(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare: the first node that is asked fails
    odd = app(evaluates)

    @odd.query()
    def query(message: Message, context: Context) -> Message:
        raise ValueError(reason)

    grid = InProcessGrid(app(evaluates, answers_role))
    grid.add({}, app=odd)
    for role in ("source", "target"):
        grid.add({"role": role})

    # Execute
    start(strategy(), grid)

    # Assert
    assert grid.nodes[12].received == ["query", "train"]
    assert grid.nodes[13].received == ["query", "evaluate"]
    both = reason.startswith("No query")
    assert grid.nodes[11].received == ["query", "train", "evaluate"] if both else ["query"] * 2
    assert ("node 11 takes no part for now: asked for its role, it failed" in caplog.text) != both


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, list[int]]] = []

    def train(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        self.told.append(("train", server_round, sorted(contents)))

    def evaluate(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        self.told.append(("evaluate", server_round, sorted(contents)))


def test_an_observer_is_told_of_the_valid_replies_of_each_round() -> None:
    made, bad = app(evaluates), ClientApp()

    @bad.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, ArrayRecord())

    evaluates(bad)
    grid, seen = InProcessGrid(made, nodes=2), Seen()
    grid.add({}, app=bad)
    start(RoleFedAvg(observer=seen), grid, rounds=2)
    assert seen.told == [
        (kind, number, nodes)
        for number in (1, 2)
        for kind, nodes in (("train", [11, 12]), ("evaluate", [11, 12, 13]))
    ]


def test_no_nodes_own_word_takes_the_whole_model(caplog: pytest.LogCaptureFixture) -> None:
    made = ClientApp()
    uploads(made, {11: 1e308, 12: 1.0, 13: 1.0, 14: 1.0})
    found = start(RoleFedAvg(), InProcessGrid(made, nodes=4)).arrays
    for name, array in found.items():
        states = [seeded_state(node_id)[name] for node_id in (11, 12, 13, 14)]
        expected = states[0] / 2 + sum(states[1:]) / 6
        assert np.allclose(array.numpy(), expected.numpy(), atol=1e-6), name
    assert (
        "node 11 says it weighs 1e+308, 1 of all; it counts as 0.5 (max_share=3.0)" in caplog.text
    )


def test_an_aggregator_of_ones_own_sees_every_valid_reply() -> None:
    made, seen = ClientApp(), []

    @made.train()
    def train(message: Message, context: Context) -> Message:
        content = reply(message, ArrayRecord(seeded_state(context.node_id))).content
        content["metrics"]["per-class"] = [0.5] * (context.node_id - 9)
        return Message(content, reply_to=message)

    def aggregate(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.append(len(contents))
        return MetricRecord({"replies": len(contents)})

    for kind in (strategy, RoleFedAvg):
        start(kind(train_metrics_aggr_fn=aggregate), InProcessGrid(made, nodes=3))
    assert seen == [3, 3]


def test_patience_is_for_every_strategy_and_the_runs_setting_arrives() -> None:
    app = ClientApp()
    evaluates(app)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, ArrayRecord([np.zeros(1)]))

    grid = InProcessGrid(app, nodes=2)
    strategy = RoleFedAvg(patience=2, fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=4)
    assert [node.received.count("train") for node in grid.nodes.values()] == [2, 2]
    config = compose("strategy=fedavg strategy.patience=7")
    assert make_strategy(config, cast("Any", None))._patience == 7
    with pytest.raises(ValueError, match="patience=0 must be an integer of 1 or more"):
        RoleFedAvg(patience=0)
