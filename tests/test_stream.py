"""Sources that come one after another, and targets that offer what they adapted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_wb.app.config import compose
from fl_wb.app.overrides import ConfigError
from fl_wb.clients.sharing import offer, offers, shared
from fl_wb.messages import keys
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.test_own_data import folder_of
from tests.test_role_fedavg import strategy
from tests.test_simulation import BRIEF, run_in_process
from tests.toys import evaluates, generator, initial_arrays, uploads

FEW = "client.ternarize=false client.evaluation.draws=1"


def seen(grid: InProcessGrid, kind: str) -> list[int]:
    """Return how often each node got a message of a kind, in the order of their ids."""
    return [grid.nodes[node].received.count(kind) for node in sorted(grid.nodes)]


def test_a_role_for_one_round_is_asked_for_again() -> None:
    app = ClientApp()
    uploads(app)
    evaluates(app)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        asked = message.content.config_records["config"]["server-round"]
        role = "source" if asked == context.node_config["turn"] else "target"
        answer = ConfigRecord({"role": role, "again": True})
        return Message(RecordDict({"config": answer}), reply_to=message)

    grid = InProcessGrid(app)
    for turn in (1, 2, 3):
        grid.add({"turn": turn})
    alone = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
    run = strategy(**alone)
    result = run.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=3)
    for turn, node in enumerate(grid.nodes.values()):
        assert node.received[::2] == ["query"] * 3
        assert node.received[1::2] == ["train" if r == turn else "evaluate" for r in range(3)]
    assert [result.train_metrics_clientapp[r]["uploads-merged"] for r in (1, 2, 3)] == [1, 2, 3]
    run.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)
    assert [node.received[6:] for node in grid.nodes.values()] == [
        ["query", "train"],
        ["query", "evaluate"],
        ["query", "evaluate"],
    ]


STREAM = [
    "experiment=stream",
    "data.sources=[[0,1],[2,3],[4,5]]",
    "data.targets=[[0,1],[0,1,2,3]]",
    "rounds=3",
    BRIEF,
    *FEW.split(),
]


@pytest.mark.parametrize("name", ["adaptive_coalescence", "fedavg", "full_data", "edge_only"])
def test_nodes_come_in_turn(tmp_path: Path, name: str) -> None:
    nodes = 3 if name == "full_data" else 5  # which has one source, of all data
    grid = run_in_process(tmp_path, *STREAM, f"strategy={name}", nodes=nodes)
    trained = {"full_data": [1, 0, 0], "edge_only": [0] * 5}
    assert seen(grid, "train") == trained.get(name, [1, 1, 1, 0, 0])
    assert seen(grid, "evaluate")[-2:] == [1, 2]  # the last stays
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["targets"].keys() == {"0", "1"} and found["error"] is None
    if name == "adaptive_coalescence":
        assert [found["rounds"][r]["train"]["uploads-merged"] for r in "123"] == [1, 2, 3]


def test_each_round_has_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four = "data.targets=[[0,1],[0,1,2],[0,1,2,3],[0,1,2,3,4]]"
    with caplog.at_level(logging.INFO, logger="flwr"):
        run_in_process(tmp_path, *STREAM[:1], four, "rounds=4", BRIEF, nodes=9)
    assert all(f"barycenter, target {number}" in caplog.text for number in range(4))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert len(found["bytes"]["ternary"]) == 4


@pytest.mark.parametrize("weights", ["shares", "uniform"])
def test_what_a_target_adapted_is_merged_from_the_next_round_on(
    tmp_path: Path, weights: str
) -> None:
    options = ["rounds=3", "client.share_adapted=true", f"client.weights={weights}"]
    uneven = "data.sources=[[0,1,2,3,4,5,6,7],[8,9]]"
    grid = run_in_process(tmp_path, *options, uneven, *FEW.split())
    assert seen(grid, "train") == [3, 3, 2] and seen(grid, "evaluate") == [0, 0, 3]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [found["rounds"][r]["train"]["uploads-merged"] for r in "123"] == [2, 3, 3]
    assert all(found["rounds"][r]["train"]["uploads-dropped"] == 0 for r in "123")
    kept = grid.nodes[13].context.state
    assert shared(grid.nodes[13].context)[keys.METRICS] == MetricRecord({"num-examples": 30})
    assert any(isinstance(record, ArrayRecord) for record in kept.values())


def test_in_turn_a_target_shares_in_the_round_after_its_own(tmp_path: Path) -> None:
    grid = run_in_process(tmp_path, *STREAM, "client.share_adapted=true", nodes=5)
    assert seen(grid, "train") == [1, 1, 1, 1, 1]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [found["rounds"][r]["train"]["uploads-merged"] for r in "123"] == [1, 3, 5]


def test_a_target_that_asks_for_privacy_or_has_its_own_data_offers_nothing(tmp_path: Path) -> None:
    config = ["rounds=2", "client.share_adapted=true", BRIEF, *FEW.split()]
    own = {"role": "target", "data": str(folder_of(tmp_path / "data", 0))}
    said = {13: {"epsilon": 1.0}, 14: own, 15: own | {"share-adapted": True}}
    grid = run_in_process(tmp_path / "run", *config, nodes=5, said=said)
    assert seen(grid, "train") == [2, 2, 0, 0, 1]
    assert [offers(grid.nodes[node].context) for node in (13, 14, 15)] == [False, False, True]


def test_what_memorises_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    network, rng = generator().eval(), torch.Generator().manual_seed(0)
    context = Context(7, 13, {}, RecordDict(), {})
    with torch.no_grad():
        made = network(torch.randn(300, 4, generator=rng))
    offer(context, network, made[:100], made[100:], min_memorization=0.5)
    assert offers(context)
    state = shared(context)[keys.ARRAYS].to_torch_state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    offer(context, network, made[:100], made[100:] + 9, min_memorization=0.5)
    assert not offers(context)
    assert "node 13 offers nothing: memorization=" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("rounds=1", "client.share_adapted=true needs rounds of 2 or more, not 1"),
        ("client.privacy.epsilon=8", "client.share_adapted=true is not with client.privacy.epsil"),
        ("strategy=ensemble", "client.share_adapted=true is not for strategy=ensemble"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(f"client.share_adapted=true rounds=2 {overrides}")
