"""Sources and targets: what they train, keep, and say when their data or networks do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.app.schema import Config
from fl_wb.client_app import place
from fl_wb.clients import FastAdaptation, source_train, target_evaluate
from fl_wb.clients.training import train_source
from fl_wb.messages import keys, records
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import (
    ADAPTATION,
    SHAPE,
    TERNARIZATION,
    TRAINING,
    critic,
    generator,
    initial_arrays,
    seeded_state,
)


def points(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(n)) * 2 - 1


def ask(app: ClientApp, message_type: str, times: int = 1, **content: Any) -> Message:
    """Send one node a message with the initial arrays; return its last reply."""
    grid = InProcessGrid(app, nodes=1)
    record = RecordDict({"arrays": initial_arrays()} | content)
    for _ in range(times):
        (reply,) = grid.send_and_receive([Message(record, 11, message_type)])
    return reply


def source(samples: Callable[[], Tensor], **arguments: Any) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = source_train(
            message,
            context,
            generator=generator,
            critic=critic,
            samples=samples,
            settings=TRAINING,
            **arguments,
        )
        return Message(content, reply_to=message)

    return app


def test_a_source_uploads_a_generator_trained_on_its_data() -> None:
    # Execute
    content = ask(source(lambda: points(20), seed=3), "train").content

    # Assert
    start = generator()
    start.load_state_dict(seeded_state(0))
    trained, _ = train_source(start, critic, points(20), TRAINING, seed=3)
    found = content.array_records["arrays"].to_torch_state_dict()
    for name, value in trained.generator.state_dict().items():
        assert torch.equal(found[name], value), name
        assert not torch.equal(value, seeded_state(0)[name]), name
    metrics = content.metric_records["metrics"]
    assert metrics["num-examples"] == 20
    assert {"generator-loss", "critic-loss", "train-seconds"} <= metrics.keys()


@pytest.mark.parametrize(("again", "calls"), [(False, 1), (True, 3)])
def test_a_source_trains_once_unless_it_is_told_to_train_again(again: bool, calls: int) -> None:
    asked = []

    def samples() -> Tensor:
        asked.append(1)
        return points(20)

    content = ask(source(samples, again=again), "train", times=3).content
    assert len(asked) == calls
    assert content.metric_records["metrics"]["num-examples"] == 20


def test_a_source_with_one_sample_trains() -> None:
    content = ask(source(lambda: points(1)), "train").content
    records.validate(content.array_records["arrays"], generator().state_dict())


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_a_node_without_samples_says_so(message_type: str) -> None:
    app = source(lambda: points(0)) if message_type == "train" else target(points(0))
    reply = ask(app, message_type)
    assert "node 11 " in str(reply.error.reason)
    assert "has no samples" in str(reply.error.reason)


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_a_network_unlike_the_servers_is_named(message_type: str) -> None:
    app = source(lambda: points(9)) if message_type == "train" else target(points(9))
    arrays = ArrayRecord({**seeded_state(0), "net.3.weight": torch.zeros(3, 8)})
    reason = str(ask(app, message_type, arrays=arrays).error.reason)
    assert "'net.3.weight' has shape (3, 8) instead of (8, 8)" in reason
    assert "node 11" in reason


def test_samples_that_are_no_tensor_are_named() -> None:
    reply = ask(target(points(3).numpy()), "evaluate")  # type: ignore[arg-type]
    assert "its samples must be a Tensor (n, ...), not ndarray" in str(reply.error.reason)


def test_the_mod_wants_factories() -> None:
    with pytest.raises(TypeError, match="generator must be a factory"):
        FastAdaptation(generator(), lambda context: points(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="critic must be a factory"):
        FastAdaptation(generator, lambda context: points(1), critic=3)  # type: ignore[arg-type]


def target(samples: Tensor, **arguments: Any) -> ClientApp:
    """App whose own evaluate returns the arrays that it sees."""
    mod = FastAdaptation(
        generator,
        lambda context: samples,
        adaptation=ADAPTATION,
        ternarization=TERNARIZATION,
        **arguments,
    )
    app = ClientApp(mods=[mod])
    key = arguments.get("arrayrecord_key", "arrays")

    def echo(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content[key]}), reply_to=message)

    app.evaluate()(echo)
    app.train()(echo)
    app.query()(echo)
    return app


def seen(reply: Message) -> dict[str, Tensor]:
    state: dict[str, Tensor] = reply.content.array_records["arrays"].to_torch_state_dict()
    return state


@pytest.mark.parametrize("n", [1, 3, 100])
def test_the_mod_hands_on_an_adapted_ternary_generator(n: int) -> None:
    state = seen(ask(target(points(n)), "evaluate"))
    assert list(state) == list(seeded_state(0))
    for name, value in state.items():
        if value.dim() > 1:
            assert len(value.unique()) == 3, name
    network = generator()
    network.load_state_dict(state)  # strict
    records.check_samples(network)


def test_the_mod_without_ternarization_only_adapts() -> None:
    state = seen(ask(target(points(5), ternarize=False), "evaluate"))
    assert any(not torch.equal(state[k], v) for k, v in seeded_state(0).items())
    assert len(state["net.0.weight"].unique()) > 3


@pytest.mark.parametrize("message_type", ["train", "query"])
def test_the_mod_leaves_other_messages_alone(message_type: str) -> None:
    state = seen(ask(target(points(5)), message_type))
    assert all(torch.equal(state[k], v) for k, v in seeded_state(0).items())


def test_the_mod_finds_the_arrays_under_another_key() -> None:
    app = target(points(5), arrayrecord_key="model")
    assert len(seen(ask(app, "evaluate", model=initial_arrays()))["net.0.weight"].unique()) == 3
    reason = str(ask(app, "evaluate").error.reason)
    assert "no ArrayRecord 'model', only ['arrays']" in reason


def test_the_mod_refuses_samples_of_another_shape() -> None:
    reason = str(ask(target(torch.zeros(5, 1, 8, 8)), "evaluate").error.reason)
    assert "node 11" in reason
    assert "has samples of shape (1, 8, 8), but its generator makes samples of shape (1, 4, 4)" in (
        reason
    )


def test_the_mod_gives_the_same_generator_again() -> None:
    first, second = (seen(ask(target(points(5)), "evaluate")) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("send_few", [True, False])
def test_a_target_reports_every_step_and_its_packed_generator(send_few: bool) -> None:
    # Prepare
    app = ClientApp()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = target_evaluate(
            message,
            context,
            generator=generator,
            few=points(6),
            held_out=points(30),
            adaptation=ADAPTATION,
            ternarization=TERNARIZATION,
            send_few=send_few,
        )
        return Message(content, reply_to=message)

    # Execute
    content = ask(app, "evaluate").content

    # Assert
    metrics = content.metric_records[keys.METRICS]
    for step in ("barycenter", "adapted", "ternary"):
        for name in ("w1", "frechet", "kid", "energy", "density", "coverage", "memorization"):
            assert isinstance(metrics[f"{step}/{name}"], float)
    assert metrics[keys.WEIGHT] == 6
    packed = content.config_records[keys.INFO][keys.TERNARY]
    assert isinstance(packed, bytes)
    network = ternary.unpack(packed, generator())
    pictures = records.to_tensors(content.array_records[keys.SAMPLES])
    assert list(pictures) == ["few"] * send_few + ["barycenter", "adapted", "ternary"]
    assert not send_few or torch.equal(pictures["few"], points(6))
    assert len({len(p.unique()) for p in network.parameters() if p.dim() > 1}) == 1


@pytest.mark.parametrize(
    ("node_config", "expected"),
    [
        ({"partition-id": 0}, ("source", 0)),
        ({"partition-id": 1}, ("source", 1)),
        ({"partition-id": 2}, ("target", 0)),
        ({"partition-id": 3}, ("none", 3)),
        ({"partition-id": 0, "role": "target"}, ("target", 0)),
        ({"partition-id": 1, "role": "both"}, ("both", 1)),
    ],
)
def test_a_nodes_place_in_the_run(node_config: dict[str, Any], expected: tuple[str, int]) -> None:
    found = place(Context(7, 11, node_config, RecordDict(), {}), Config())
    assert (found.role, found.index) == expected


@pytest.mark.parametrize(
    ("node_config", "reason"),
    [({}, "needs a partition-id"), ({"partition-id": 0, "role": "boss"}, "role='boss' is not one")],
)
def test_a_node_without_a_place_is_named(node_config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"node 11: .*{reason}"):
        place(Context(7, 11, node_config, RecordDict(), {}), Config())


def test_training_leaves_its_arguments_alone() -> None:
    start: nn.Module = generator()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    train_source(start, critic, points(4), TRAINING)
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
