"""Beside the rest of Flower: mods, privacy wrappers, its arguments, nodes that come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fl_wb.barycenter import recursive_barycenter
from fl_wb.clients import FastAdaptation
from fl_wb.messages import records
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import (
    ADAPTATION,
    STAGE,
    TERNARIZATION,
    critic,
    evaluates,
    generator,
    initial_arrays,
    reply,
    seeded_state,
    uploads,
)


def strategy(**arguments: Any) -> AdaptiveCoalescence:
    settings: dict[str, Any] = {"generator": generator, "critic": critic, "stage": STAGE}
    return AdaptiveCoalescence(**settings | arguments)


def local_dp(epsilon: float) -> LocalDpMod:
    return LocalDpMod(clipping_norm=1.0, sensitivity=0.01, epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize(
    ("mod", "config"),
    [
        (local_dp(50.0), {}),
        (fixedclipping_mod, {"clipping_norm": 0.5}),
        (adaptiveclipping_mod, {"clipping_norm": 0.5}),
        (arrays_size_mod, {}),
        (message_size_mod, {}),
    ],
    ids=["local-dp", "fixed-clipping", "adaptive-clipping", "arrays-size", "message-size"],
)
def test_flowers_mods_work_on_train(mod: Any, config: dict[str, float]) -> None:
    # Prepare
    app = ClientApp()
    evaluates(app)

    @app.train(mods=[mod])
    def train(message: Message, context: Context) -> Message:
        return reply(message, ArrayRecord(seeded_state(context.node_id)))

    # Execute
    result = strategy().start(
        grid=InProcessGrid(app, nodes=2),
        initial_arrays=initial_arrays(),
        num_rounds=2,
        train_config=ConfigRecord(dict(config)),
    )

    # Assert
    merged = result.train_metrics_clientapp[2]
    assert (merged["uploads-merged"], merged["uploads-dropped"]) == (2, 0)
    network = generator()
    network.load_state_dict(result.arrays.to_torch_state_dict())
    records.check_samples(network)


@pytest.mark.parametrize("mod", [arrays_size_mod, message_size_mod])
def test_flowers_mods_work_beside_ours(mod: Any) -> None:
    ours = FastAdaptation(
        generator,
        lambda context: torch.zeros(3, 1, 4, 4),
        adaptation=ADAPTATION,
        ternarization=TERNARIZATION,
        reply_key="packed",
    )
    app = ClientApp(mods=[mod, ours])
    uploads(app)
    evaluates(app)
    result = strategy().start(
        grid=InProcessGrid(app, nodes=2), initial_arrays=initial_arrays(), num_rounds=1
    )
    assert "mean" in result.evaluate_metrics_clientapp[1]


def test_noise_that_leaves_no_generator_costs_the_upload_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = ClientApp()

    @app.train(mods=[local_dp(1e-9)])
    def train(message: Message, context: Context) -> Message:
        return reply(message, ArrayRecord(seeded_state(context.node_id)))

    result = strategy().start(
        grid=InProcessGrid(app, nodes=2), initial_arrays=initial_arrays(), num_rounds=1
    )
    # Of 24 noisy variances one at least is below zero, but for one time in 16 million.
    assert result.train_metrics_clientapp[1]["uploads-dropped"] == 2
    assert "the generator makes samples that are not finite" in caplog.text


WRAPPERS: list[Any] = [
    lambda s: DifferentialPrivacyServerSideFixedClipping(s, 0.1, 1.0, 2),
    lambda s: DifferentialPrivacyClientSideFixedClipping(s, 0.1, 1.0, 2),
    lambda s: DifferentialPrivacyServerSideAdaptiveClipping(s, 0.1, 2),
    lambda s: DifferentialPrivacyClientSideAdaptiveClipping(s, 0.1, 2),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_whose_privacy_would_not_be_there_is_refused_at_start(wrap: Any) -> None:
    app = ClientApp()
    uploads(app)
    grid = InProcessGrid(app, nodes=2)
    with pytest.raises(ValueError, match=r"inside DifferentialPrivacy\w+: .*LocalDpMod"):
        wrap(strategy()).start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)
    assert not any(node.received for node in grid.nodes.values())


def test_flowers_arguments_keep_their_meaning() -> None:
    # Prepare: other keys, own aggregation functions, central evaluation, configurations
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["settings"]
        seen.append((config["lr"], config["server-round"]))
        assert "weights" in message.content.array_records
        weight = MetricRecord({"samples": context.node_id, "loss": float(context.node_id)})
        arrays = ArrayRecord(seeded_state(context.node_id))
        return Message(RecordDict({"mine": arrays, "figures": weight}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert message.content.config_records["settings"]["steps"] == 5
        metrics = MetricRecord({"samples": 1, "score": 2.0})
        return Message(RecordDict({"figures": metrics}), reply_to=message)

    def aggregate(contents: list[RecordDict], key: str) -> MetricRecord:
        assert key == "samples"
        return MetricRecord({"replies": len(contents)})

    # Execute
    result = strategy(
        weighted_by_key="samples",
        arrayrecord_key="weights",
        configrecord_key="settings",
        train_metrics_aggr_fn=aggregate,
        evaluate_metrics_aggr_fn=aggregate,
        fraction_train=0.5,
        min_train_nodes=1,
        fraction_evaluate=0.25,
        min_evaluate_nodes=1,
        min_available_nodes=4,
    ).start(
        grid=InProcessGrid(app, nodes=4),
        initial_arrays=initial_arrays(),
        num_rounds=3,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_config=ConfigRecord({"steps": 5}),
        evaluate_fn=lambda server_round, arrays: MetricRecord({"arrays": len(arrays)}),
    )

    # Assert
    assert seen == [(0.1, r) for r in (1, 2, 3) for _ in range(2)]
    for server_round in (1, 2, 3):
        assert result.train_metrics_clientapp[server_round]["replies"] == 2
        assert result.evaluate_metrics_clientapp[server_round]["replies"] == 1
        central = result.evaluate_metrics_serverapp[server_round]
        assert central["arrays"] == len(initial_arrays())


def test_weights_under_another_key_are_the_barycenters() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"samples": context.node_id - 10, "num-examples": 1})
        content = {"arrays": ArrayRecord(seeded_state(context.node_id)), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    result = strategy(weighted_by_key="samples").start(
        grid=InProcessGrid(app, nodes=2), initial_arrays=initial_arrays(), num_rounds=1
    )
    networks = [generator(), generator()]
    for network, node_id in zip(networks, (12, 11), strict=True):
        network.load_state_dict(seeded_state(node_id))
    expected = recursive_barycenter(networks, [2, 1], critic=critic, stage=STAGE)
    for name, value in expected.state_dict().items():
        assert np.array_equal(value.numpy(), result.arrays[name].numpy())
