"""The baselines as settings: what each hands to the targets, in whole runs of the app."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fl_wb import ternary
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.clients import source_train
from fl_wb.data.datasets import load, source_samples, target_samples
from fl_wb.generators.copies import seeded
from fl_wb.generators.mixture import Mixture, states_as_mixture
from fl_wb.generators.sampling import generate
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest, load_tensors
from fl_wb.strategies import EdgeOnly, Ensemble, Transfer
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.test_simulation import TINY, run_in_process
from tests.toys import (
    SHAPE,
    TRAINING,
    critic,
    evaluates,
    generator,
    initial_arrays,
    reply,
    seeded_state,
    uploads,
)

State = dict[str, torch.Tensor]


def run(output: Path, *overrides: str) -> tuple[Any, State]:
    """Return the metrics and the final model of a run of the whole app."""
    run_in_process(output, "client.ternarize=false", *overrides)
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    (model,) = output.glob("*.safetensors")
    assert model.stem == found["config"]["strategy"]["name"]
    return found, load_tensors(model)[0]


def test_an_ensemble_is_the_exact_mixture_of_what_transfer_hands_on(tmp_path: Path) -> None:
    # Prepare: the two sources' generators, each as the model of a run of its own
    states, weights = [], []
    for k in range(2):
        found, state = run(tmp_path / str(k), "strategy=transfer", f"strategy.source={k}")
        assert set(found["final"]) == {"few", "barycenter", "adapted"}
        states.append(state)
        weights.append(found["sources"][str(k)]["num-examples"])

    # Execute
    found, mixture = run(tmp_path / "both", "strategy=ensemble", "client.ternarize=true")

    # Assert
    assert digest(mixture) == digest(states_as_mixture(states, torch.tensor(weights)))
    make = factories(compose(TINY))[0]
    network = Mixture([make(), make()])
    network.load_state_dict(mixture)
    assert found["bytes"]["generator"] == sum(
        v.numel() * v.element_size() for v in mixture.values()
    )
    adapted = ternary.load(tmp_path / "both" / "ternary" / "target-0.flwb", network)
    assert torch.equal(adapted.shares, network.shares)
    assert generate(adapted, 3).shape == (3, 1, 8, 8)


def test_edge_only_trains_no_source_and_adapts_a_fresh_network(tmp_path: Path) -> None:
    found, state = run(tmp_path, "strategy=edge_only", "client=plain", *TINY)

    fresh = seeded(factories(compose(TINY))[0], seed=0)
    assert digest(state) == digest(fresh.state_dict())
    assert not found["sources"]
    assert found["config"]["client"]["adaptation"]["fresh"]
    assert found["final"]["adapted"]["energy"] < found["final"]["barycenter"]["energy"]


def test_full_data_is_one_source_that_has_everything(tmp_path: Path) -> None:
    overrides = ("experiment=non_overlapping", "strategy=full_data")
    config = compose([*TINY, *overrides])
    train, _ = load(config.data)
    every = train[torch.isin(train.labels, torch.tensor([8, 9]))]
    few = {image.numpy().tobytes() for image in target_samples(config.data, 0).images}
    found = {image.numpy().tobytes() for image in source_samples(config.data, 0).images}
    assert len(found) == len(every)
    assert few < found

    metrics, _ = run(tmp_path, *overrides)
    assert metrics["sources"]["0"]["num-examples"] == len(every)
    assert list(metrics["sources"]) == ["0"]


def test_sources_may_have_unequal_weights() -> None:
    data = compose("experiment=unequal").data
    assert [len(source_samples(data, k)) for k in range(2)] == [400, 100]


@pytest.mark.parametrize("rounds", [1, 2])
def test_useless_uploads_are_no_part_of_an_ensemble(
    rounds: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepare: three nodes that train from the initial arrays in every round; one sends nonsense
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    app, broken = ClientApp(), ClientApp()
    uploads(app, {11: 3.0, 12: 1.0})
    evaluates(app)
    started = []

    @broken.train()
    def train(message: Message, context: Any) -> Message:
        started.append(message.content.array_records["arrays"].to_torch_state_dict())
        return reply(message, ArrayRecord({"net.0.weight": torch.zeros(3)}))

    evaluates(broken)
    grid = InProcessGrid(app, 2)
    grid.add({}, app=broken)

    # Execute
    result = Ensemble().start(grid=grid, initial_arrays=initial_arrays(), num_rounds=rounds)

    # Assert
    assert "dropped the upload of node 13: array " in caplog.text
    assert [digest(state) for state in started] == [digest(seeded_state(0))] * rounds
    network = Mixture([generator(), generator()])
    network.load_state_dict(result.arrays.to_torch_state_dict())
    assert network.shares.tolist() == [0.75, 0.25]


def test_transfer_hands_on_the_critic_of_its_source(tmp_path: Path) -> None:
    # Prepare: real sources, targets that keep what they are sent
    sent = []

    def train(message: Message, context: Any) -> Message:
        content = source_train(
            message,
            context,
            generator=generator,
            critic=critic,
            samples=lambda: torch.randn(9, *SHAPE),
            settings=TRAINING,
            send_critic=True,
            store=StageStore(tmp_path / str(context.node_id)),
            seed=context.node_id,
        )
        return Message(content, reply_to=message)

    def evaluate(message: Message, context: Any) -> Message:
        sent.append(message.content.array_records)
        return reply(message, ArrayRecord())

    app = ClientApp()
    app.train()(train)
    app.evaluate()(evaluate)

    # Execute
    Transfer(source=1).start(
        grid=InProcessGrid(app, 2), initial_arrays=initial_arrays(), num_rounds=1
    )

    # Assert: they are those of the second node, trained together
    (kept,) = (tmp_path / "12" / "stages").glob("*.safetensors")
    state, _ = load_tensors(kept)
    for arrays in sent:
        found = arrays["critic"].to_torch_state_dict()
        assert list(found) == list(critic().state_dict())
        assert all(torch.equal(value, state[f"critic/{name}"]) for name, value in found.items())
        model = arrays["arrays"].to_torch_state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.items())
    assert len(sent) == 2


def test_a_target_begins_with_the_critic_that_it_is_sent(tmp_path: Path) -> None:
    finals = []
    for choice in ("true", "false"):
        found, _ = run(tmp_path / choice, "strategy=transfer", f"strategy.critic={choice}")
        finals.append(found["final"])
    assert finals[0]["barycenter"] == finals[1]["barycenter"]
    assert finals[0]["adapted"] != finals[1]["adapted"]


def test_transfer_names_a_source_that_is_not_there() -> None:
    app = ClientApp()
    uploads(app)
    with pytest.raises(ValueError, match=r"source=2 \(counted from 0\), but of 2 sources that"):
        Transfer(source=2).start(
            grid=InProcessGrid(app, 2), initial_arrays=initial_arrays(), num_rounds=1
        )


def test_edge_only_asks_nobody_to_train() -> None:
    app = ClientApp()
    uploads(app)
    evaluates(app)
    grid = InProcessGrid(app, 2)
    result = EdgeOnly().start(grid=grid, initial_arrays=initial_arrays(), num_rounds=1)
    assert digest(result.arrays.to_torch_state_dict()) == digest(seeded_state(0))
    assert all("train" not in node.received for node in grid.nodes.values())


def test_transfer_takes_no_other_source_in_the_place_of_one_that_failed() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        if partition == 0:
            raise RuntimeError("out of memory")
        answer = reply(message, initial_arrays())
        answer.content["info"] = ConfigRecord({"partition": partition})
        return answer

    with pytest.raises(ValueError, match="but of 1 sources that uploaded a valid generator none"):
        Transfer(source=0, min_train_nodes=1).start(
            grid=InProcessGrid(app, 2), initial_arrays=initial_arrays(), num_rounds=1
        )
