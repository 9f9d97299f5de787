"""Bad uploads and failing nodes: the round goes on, and the log says who and why."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import (
    STAGE,
    critic,
    evaluates,
    generator,
    initial_arrays,
    reply,
    seeded_state,
    uploads,
)

BAD = 12  # the id of the node that sends something bad; 11 and 13 are well

Content = dict[str, Any]
Spoil = Callable[[Content], None]


def start(app: ClientApp, nodes: int = 3, rounds: int = 1, **arguments: Any) -> Result:
    grid = InProcessGrid(app, nodes)
    return strategy(**arguments).start(
        grid=grid, initial_arrays=initial_arrays(), num_rounds=rounds
    )


def strategy(**arguments: Any) -> AdaptiveCoalescence:
    return AdaptiveCoalescence(generator=generator, critic=critic, stage=STAGE, **arguments)


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


def spoiled(spoil: Spoil, everyone: bool = False, from_round: int = 1) -> ClientApp:
    """App whose node `BAD` (or everyone) spoils its content before it sends it."""
    app = ClientApp()
    evaluates(app)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state: dict[str, torch.Tensor] = seeded_state(context.node_id)
        content: Content = {
            "arrays": {name: value.numpy() for name, value in state.items()},
            "metrics": {"num-examples": 1.0, "loss": 0.5},
        }
        late = message.content["config"]["server-round"] >= from_round  # type: ignore[operator]
        if late and (everyone or context.node_id == BAD):
            spoil(content)
        for key, value in content.items():
            if isinstance(value, dict) and key.startswith("arrays"):
                content[key] = ArrayRecord(
                    {k: v if isinstance(v, Array) else Array(v) for k, v in value.items()}
                )
            elif isinstance(value, dict):
                content[key] = MetricRecord(value)
        return Message(RecordDict(content), reply_to=message)

    return app


def change(name: str, to: Callable[[np.ndarray], Any]) -> Spoil:
    def spoil(content: Content) -> None:
        content["arrays"][name] = to(content["arrays"][name])

    return spoil


def weight(value: Any) -> Spoil:
    return lambda content: content["metrics"].update({"num-examples": value})


def constant(content: Content) -> None:
    content["arrays"] = {name: np.zeros_like(v) for name, v in content["arrays"].items()}


def huge(content: Content) -> None:
    content["arrays"] = {
        name: np.asarray(v * np.float32(1e38)) for name, v in content["arrays"].items()
    }


FIRST = "net.0.weight"
BAD_UPLOADS: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda c: c["arrays"].pop(FIRST), f"'{FIRST}' \\(8, 4\\) is missing"),
    "extra": (
        lambda c: c["arrays"].update(more=np.zeros(2)),
        "'more' is not part of the generator",
    ),
    "mis-shaped": (
        change(FIRST, lambda v: v.T.copy()),
        f"'{FIRST}' has shape \\(4, 8\\) instead of \\(8, 4\\)",
    ),
    "integer": (
        change(FIRST, lambda v: v.astype(np.int32)),
        f"'{FIRST}' is int32 instead of float32",
    ),
    "nan": (change("net.1.bias", lambda v: v * np.nan), "'net.1.bias' has values .* not finite"),
    "infinite": (change("net.1.bias", lambda v: v + np.inf), "'net.1.bias' .* not finite"),
    "undecodable": (
        change(FIRST, lambda v: Array("float32", v.shape, "numpy.ndarray", b"garbage")),
        f"'{FIRST}' cannot be decoded",
    ),
    "constant output": (constant, "the same sample from every latent"),
    "saturated output": (huge, "not finite|the same sample"),
    "no arrays": (lambda c: c.pop("arrays"), "it has 0 models, not one"),
    "two array records": (
        lambda c: c.update({"arrays-2": c["arrays"]}),
        "it has 2 models, not one",
    ),
    "no metrics": (lambda c: c.pop("metrics"), "0 MetricRecords instead of one"),
    "no weight": (lambda c: c["metrics"].pop("num-examples"), "'num-examples' is None"),
    "zero weight": (weight(0), "'num-examples' is 0, not a positive number"),
    "negative weight": (weight(-1.0), "not a positive number"),
    "nan weight": (weight(float("nan")), "not a positive number"),
    "infinite weight": (weight(float("inf")), "not a positive number"),
    "list of weights": (weight([1.0, 2.0]), "not a positive number"),
}


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_is_dropped_and_the_rest_is_merged(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare
    spoil, reason = BAD_UPLOADS[kind]
    healthy = InProcessGrid(spoiled(lambda content: None), nodes=3)
    del healthy.nodes[BAD]
    expected = strategy().start(grid=healthy, initial_arrays=initial_arrays(), num_rounds=1)

    # Execute
    result = start(spoiled(spoil))

    # Assert
    assert same(result.arrays, expected.arrays)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["uploads-merged"], metrics["uploads-dropped"]) == (2, 1)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert re.search(f"dropped the upload of node {BAD}: .*({reason})", said[0])


def test_an_array_record_may_have_any_key() -> None:
    def rename(content: Content) -> None:
        content["arrays-mine"] = content.pop("arrays")

    assert start(spoiled(rename)).train_metrics_clientapp[1]["uploads-merged"] == 3


def test_no_valid_upload_leaves_the_model_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Execute
    result = start(spoiled(constant, everyone=True), rounds=2)

    # Assert: both rounds evaluated the initial model
    assert len(result.arrays) == 0
    assert result.train_metrics_clientapp[2] == {"uploads-merged": 0, "uploads-dropped": 3}
    flat = torch.cat([value.flatten() for value in seeded_state(0).values()])
    for server_round in (1, 2):
        mean = result.evaluate_metrics_clientapp[server_round]["mean"]
        assert mean == pytest.approx(float(flat.mean()))
    assert "no valid upload in round 1: the model stays" in caplog.text


def test_a_later_round_without_valid_uploads_keeps_the_barycenter() -> None:
    once = start(spoiled(constant, everyone=True, from_round=2))
    twice = start(spoiled(constant, everyone=True, from_round=2), rounds=2)
    assert same(once.arrays, twice.arrays)
    assert twice.evaluate_metrics_clientapp[1] == twice.evaluate_metrics_clientapp[2]
    assert twice.train_metrics_clientapp[2] == {"uploads-merged": 3, "uploads-dropped": 3}


def test_odd_metrics_do_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    result = start(spoiled(lambda content: content["metrics"].update(more=1.0)))
    expected = {"loss": 0.5, "uploads-merged": 3, "uploads-dropped": 0}
    assert result.train_metrics_clientapp[1] == pytest.approx(expected)
    assert f"node {BAD} has metrics unlike the others'" in caplog.text


@pytest.mark.parametrize("fault", ["raises", "is killed", "is silent"])
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_the_round_goes_on_without_a_failing_node(
    fault: str, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare
    well = ClientApp()
    uploads(well)
    evaluates(well)
    grid = InProcessGrid(well, nodes=3)
    if fault == "raises":
        broken = ClientApp()
        if phase == "evaluate":
            uploads(broken)
        else:
            evaluates(broken)
        grid.nodes[BAD].app = broken
    else:
        attribute = {"is killed": "killed", "is silent": "silent"}[fault]
        setattr(grid.nodes[BAD], attribute, lambda m: m.metadata.message_type == phase)

    # Execute
    result = strategy().start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)

    # Assert: the node is named, also where the SuperLink answered in its place
    merged = result.train_metrics_clientapp[1]["uploads-merged"]
    assert merged == (2 if phase == "train" else 3)
    assert "mean" in result.evaluate_metrics_clientapp[1]
    outcome = "did not answer in time" if fault == "is silent" else "failed"
    assert f"aggregate_{phase}: node {BAD} {outcome}" in caplog.text


def test_a_node_that_fails_later_stays_merged() -> None:
    app = ClientApp()
    uploads(app)
    grid = InProcessGrid(app, nodes=3)
    grid.nodes[BAD].killed = lambda m: grid.nodes[BAD].received.count("train") > 1
    result = strategy().start(grid=grid, initial_arrays=initial_arrays(), num_rounds=2)
    assert result.train_metrics_clientapp[2]["uploads-merged"] == 3


def test_a_merge_that_diverges_leaves_the_model(caplog: pytest.LogCaptureFixture) -> None:
    # Prepare: from round 2 on, merging fails
    app, calls = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seed = 100 * message.content["config"]["server-round"] + context.node_id  # type: ignore
        calls.append(seed)
        return reply(message, ArrayRecord(seeded_state(seed)))

    def diverge(done: int, total: int, losses: dict[str, float]) -> None:
        if len(calls) > 3:
            raise FloatingPointError("WGAN training diverged")

    # Execute
    result = start(app, rounds=2, callback=diverge)

    # Assert
    assert len(result.arrays) == len(initial_arrays())
    assert "the merge failed (WGAN training diverged): the model stays" in caplog.text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"num-examples": 0},
        {"num-examples": [1, 2]},
        {"num-examples": float("nan"), "mean": 1.0},
    ],
)
def test_bad_evaluate_replies_are_dropped(
    metrics: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare
    well, broken = ClientApp(), ClientApp()
    uploads(well)
    evaluates(well)
    uploads(broken)

    @broken.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    grid = InProcessGrid(well, nodes=3)
    grid.nodes[BAD].app = broken

    # Execute
    result = strategy().start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)

    # Assert
    assert list(result.evaluate_metrics_clientapp[1]) == ["mean"]
    assert f"dropped the reply of node {BAD}" in caplog.text


def test_evaluation_without_usable_replies_is_skipped() -> None:
    app = ClientApp()
    uploads(app)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord()}), reply_to=message)

    assert start(app, rounds=2).evaluate_metrics_clientapp == {}


def test_every_fault_of_the_table_names_tests_that_there_are() -> None:
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
    table = text.split("## Faults")[1].split("## ")[0].strip().splitlines()[2:]
    assert len(table) > 20
    for row in table:
        *_, tests, end = re.split(r"(?<!\\)\|", row)
        file, found = "", re.findall(r"`(test_\w+\.py)?::(\w+)`", tests)
        assert found and not end, row
        for name, test in found:
            file = name or file
            tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
            assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, row
