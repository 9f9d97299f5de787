"""AdaptiveCoalescence: merging, roles, later rounds, resuming; all on the in-process Grid."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from fl_wb.barycenter import UselessMeasures, recursive_barycenter
from fl_wb.clients.received import received_code
from fl_wb.federation import merger
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from fl_wb.training.distillation import Distillation
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


class Counter:
    """A progress callback that counts the iterations that were trained."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.iterations, self.stop_at = 0, stop_at

    def __call__(self, done: int, total: int, losses: dict[str, float]) -> None:
        self.iterations += 1
        if self.iterations == self.stop_at:
            raise KeyboardInterrupt  # as when the server is killed

    @property
    def stages(self) -> float:
        return self.iterations / (STAGE.distillation.iterations + STAGE.training.iterations)


def strategy(**arguments: Any) -> AdaptiveCoalescence:
    return AdaptiveCoalescence(
        **{"generator": generator, "critic": critic, "stage": STAGE} | arguments
    )


def app(*parts: Any, weights: dict[int, float] | None = None) -> ClientApp:
    made = ClientApp()
    uploads(made, weights)
    for part in parts:
        part(made)
    return made


def start(strategy: FedAvg, grid: InProcessGrid, rounds: int = 1) -> Result:
    return strategy.start(grid=grid, initial_arrays=initial_arrays(), num_rounds=rounds)


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


def test_arguments_are_fedavgs_then_keyword_only() -> None:
    ours = list(inspect.signature(AdaptiveCoalescence).parameters.values())
    theirs = list(inspect.signature(FedAvg).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    required = [p.name for p in ours if p.default is p.empty]
    assert required == ["generator"]


def test_the_model_is_the_barycenter_of_the_uploads() -> None:
    # Prepare: the heaviest first, whatever the order of the nodes
    grid = InProcessGrid(app(evaluates, weights={11: 1, 12: 3, 13: 2}), nodes=3)
    networks = []
    for node_id in (12, 13, 11):
        network = generator()
        network.load_state_dict(seeded_state(node_id))
        networks.append(network)

    # Execute
    result = start(strategy(seed=5), grid)

    # Assert
    expected = recursive_barycenter(networks, [3, 2, 1], critic=critic, stage=STAGE, seed=5)
    found = result.arrays.to_torch_state_dict()
    assert list(found) == list(initial_arrays())
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name
    metrics = {"loss": 0.5, "uploads-merged": 3, "uploads-dropped": 0}
    assert result.train_metrics_clientapp[1] == pytest.approx(metrics)
    assert "mean" in result.evaluate_metrics_clientapp[1]


def test_replies_in_another_order_give_the_same_model() -> None:
    grids = [InProcessGrid(app(), nodes=3), InProcessGrid(app(), nodes=3)]
    grids[1].reverse = True
    first, second = (start(strategy(), grid).arrays for grid in grids)
    assert same(first, second)


def test_one_upload_is_the_model_itself() -> None:
    grid = InProcessGrid(app(), nodes=1)
    result = start(strategy(min_available_nodes=1, min_train_nodes=1, min_evaluate_nodes=1), grid)
    assert same(result.arrays, ArrayRecord(seeded_state(11)))


def test_the_model_keeps_the_dtypes_of_the_initial_arrays() -> None:
    wide = ArrayRecord({k: v.double() for k, v in seeded_state(0).items()})
    grid = InProcessGrid(app(), nodes=2)
    result = strategy().start(grid=grid, initial_arrays=wide, num_rounds=1)
    assert {array.dtype for array in result.arrays.values()} == {"float64"}


def test_a_new_node_costs_one_stage_and_unchanged_uploads_none() -> None:
    # Prepare
    counter = Counter()
    coalescence, grid = strategy(callback=counter), InProcessGrid(app(), nodes=3)
    stages = []

    def note(messages: list[Message]) -> None:
        if messages and messages[0].metadata.message_type == "train":
            stages.append(counter.stages)

    grid.before_send = note

    def between_rounds(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 2:
            grid.add({}, node_id=31)
        if server_round == 3:
            del grid.nodes[12]

    # Execute
    result = coalescence.start(
        grid=grid, initial_arrays=initial_arrays(), num_rounds=4, evaluate_fn=between_rounds
    )

    # Assert: three uploads cost a stage; round 2 none; round 3 a shorter one; who left stays
    assert [*stages, counter.stages] == pytest.approx([0, 1, 1, 1.6, 1.6])
    merged = [result.train_metrics_clientapp[r]["uploads-merged"] for r in range(1, 5)]
    assert merged == [3, 3, 4, 4]


def test_a_changed_upload_costs_one_shorter_stage() -> None:
    # Prepare: one sends another generator in the second round
    counter, made, weights = Counter(), ClientApp(), {11: 3.0, 12: 2.0, 13: 1.0}

    @made.train()
    def train(message: Message, context: Context) -> Message:
        changed = context.node_id == 13 and message.content["config"]["server-round"] == 2
        arrays = ArrayRecord(seeded_state(100 if changed else context.node_id))
        return reply(message, arrays, weights[context.node_id])

    # Execute
    start(strategy(callback=counter), InProcessGrid(made, nodes=3), rounds=2)

    # Assert: a stage, then one of half the iterations (1.5 of 3 rounds to 2)
    assert counter.iterations == (3 + 2) + (2 + 1)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_killed_server_resumes_from_its_store(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepare: a checkpoint after every iteration
    monkeypatch.setattr("fl_wb.persistence.stage_store.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    unbroken, whole = Counter(), Counter(stop_at)
    expected = start(strategy(callback=unbroken), InProcessGrid(app(), nodes=3)).arrays
    with pytest.raises(KeyboardInterrupt):
        start(strategy(store=tmp_path, callback=whole), InProcessGrid(app(), nodes=3))

    # Execute: a new server, a new strategy, the same folder
    rest = Counter()
    found = start(strategy(store=tmp_path, callback=rest), InProcessGrid(app(), nodes=3)).arrays

    # Assert
    assert same(found, expected)
    assert rest.iterations == unbroken.iterations - stop_at


def test_starting_again_starts_afresh() -> None:
    coalescence = strategy()
    start(coalescence, InProcessGrid(app(), nodes=3))
    second = start(coalescence, InProcessGrid(app(), nodes=2))
    assert second.train_metrics_clientapp[1]["uploads-merged"] == 2


class NoLatents(nn.Module):
    """A generator that does not say its latent dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.net = generator()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        samples: torch.Tensor = self.net(z)
        return samples


@pytest.mark.parametrize(
    ("arguments", "arrays", "reason"),
    [
        ({}, {"net.0.weight": torch.zeros(9, 4)}, r"'net.0.weight' .*\(9, 4\) instead of \(8, 4\)"),
        ({}, {"extra": torch.zeros(1)}, "'extra' is not part"),
        ({"critic": lambda: nn.Linear(3, 1)}, {}, r"critic does not take samples \(4, 1, 4, 4\)"),
        ({"critic": lambda: nn.Flatten()}, {}, r"critic makes scores \(4, 16\)"),
        ({"latent_dim": 5}, {}, r"takes no latents \(4, 5\)"),
    ],
)
def test_networks_that_do_not_fit_are_refused_before_training(
    arguments: dict[str, Any], arrays: dict[str, torch.Tensor], reason: str
) -> None:
    grid = InProcessGrid(app(), nodes=2)
    with pytest.raises(ValueError, match=reason):
        strategy(**arguments).start(
            grid=grid, initial_arrays=ArrayRecord({**seeded_state(0), **arrays})
        )
    assert all("train" not in node.received for node in grid.nodes.values())


def test_a_generator_needs_a_latent_dimension() -> None:
    arrays = ArrayRecord(dict(NoLatents().state_dict()))
    grid = InProcessGrid(app(), nodes=2)
    with pytest.raises(ValueError, match="latent"):
        strategy(generator=NoLatents).start(grid=grid, initial_arrays=arrays)


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_networks_are_given_as_factories(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a factory"):
        strategy(**{name: generator()})


def test_the_critic_has_a_default_and_settings_have_short_forms() -> None:
    counter = Counter()
    coalescence = strategy(critic=None, geodesic="two_critics", iterations=7, callback=counter)
    start(coalescence, InProcessGrid(app(), nodes=2))
    assert counter.iterations == 7 + STAGE.training.iterations


# what nodes go on from


def rounds_of(
    continue_from: str, rounds: int = 2, **arguments: Any
) -> tuple[dict[tuple[int, int], ArrayRecord], Result]:
    """Run with nodes 11 and 12, and 13 from round 2 on; return what each was sent, by round."""
    made, sent = ClientApp(), {}

    @made.train()
    def train(message: Message, context: Context) -> Message:
        server_round = message.content["config"]["server-round"]
        sent[server_round, context.node_id] = message.content["arrays"]
        return reply(message, ArrayRecord(seeded_state(100 * server_round + context.node_id)))

    evaluates(made)
    grid = InProcessGrid(made, nodes=2)

    def join(messages: list[Message]) -> None:
        if (1, 12) in sent and 13 not in grid.nodes:
            grid.add({}, node_id=13)

    grid.before_send = join
    return sent, start(strategy(continue_from=continue_from, **arguments), grid, rounds)


def test_a_node_goes_on_from_its_own_upload_and_a_newcomer_from_the_barycenter() -> None:
    sent, result = rounds_of("own", rounds=3)
    assert same(sent[1, 11], initial_arrays())
    assert same(sent[2, 11], ArrayRecord(seeded_state(111)))
    assert same(sent[3, 12], ArrayRecord(seeded_state(212)))
    assert same(sent[3, 13], ArrayRecord(seeded_state(213)))
    first_round = rounds_of("barycenter", rounds=1)[1].arrays
    assert same(sent[2, 13], first_round)
    assert not same(result.arrays, first_round)


def test_nodes_go_on_from_the_barycenter_if_asked_to() -> None:
    sent, _ = rounds_of("barycenter")
    assert same(sent[2, 11], sent[2, 12]) and same(sent[2, 11], sent[2, 13])
    assert same(sent[2, 11], rounds_of("barycenter", rounds=1)[1].arrays)


def test_nodes_go_on_from_the_average_if_asked_to() -> None:
    sent, _ = rounds_of("average")
    assert same(sent[2, 11], sent[2, 13])
    for name, value in sent[2, 11].to_torch_state_dict().items():
        mean = (seeded_state(111)[name].double() + seeded_state(112)[name].double()) / 2
        torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=0)


def test_what_nodes_go_on_from_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="continue_from='last' is not one of own, average, bary"):
        strategy(continue_from="last")


@pytest.mark.parametrize(("evaluate_fn", "stages"), [(None, 1), (lambda *_: None, 3)])
def test_a_round_whose_model_nobody_gets_merges_nothing(evaluate_fn: Any, stages: int) -> None:
    counter, made = Counter(), ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        server_round = message.content["config"]["server-round"]
        return reply(message, ArrayRecord(seeded_state(100 * server_round + context.node_id)))

    result = strategy(fraction_evaluate=0.0, callback=counter).start(
        grid=InProcessGrid(made, nodes=2),
        initial_arrays=initial_arrays(),
        num_rounds=3,
        evaluate_fn=evaluate_fn,
    )
    shorter = 3 / 5  # a stage that starts at the barycenter of the round before
    assert counter.stages == pytest.approx(1 + shorter * (stages - 1))
    assert not same(result.arrays, initial_arrays())


@pytest.mark.parametrize(("max_age", "merged"), [(None, [2, 2, 2]), (0, [2, 1, 1]), (1, [2, 2, 1])])
@pytest.mark.parametrize("moves", [100, 0])
def test_old_uploads_count_as_long_as_they_may(
    moves: int, max_age: int | None, merged: list[int]
) -> None:
    # Prepare: node 12 trains in the first round alone, and node 11 perhaps sends the same again
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        server_round = message.content["config"]["server-round"]
        if server_round > 1 and context.node_id == 12:
            raise RuntimeError("busy")
        return reply(message, ArrayRecord(seeded_state(moves * server_round + context.node_id)))

    # Execute
    result = start(strategy(max_age=max_age), InProcessGrid(made, nodes=2), rounds=3)

    # Assert
    found = [result.train_metrics_clientapp[r]["uploads-merged"] for r in (1, 2, 3)]
    assert found == merged


class Mined(nn.Module):
    """Finite weights, and yet samples that are not, far from the origin of the latents."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer("mine", torch.zeros(1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        samples: torch.Tensor = self.net(z)
        return samples + (self.mine * (z[:, :1] > 3.3) * 1e38) * 1e38


@pytest.mark.parametrize(("nodes", "mined"), [(1, {11}), (5, {12}), (5, {11, 13, 14})])
def test_uploads_that_spoil_the_merge_are_dropped_at_once_and_the_rest_is_merged(
    nodes: int, mined: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare
    caplog.set_level(logging.INFO, "flwr")
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.node_id)
            network = Mined()
        if context.node_id in mined:
            network.mine.fill_(1.0)
        return reply(message, ArrayRecord(dict(network.state_dict())))

    stage = replace(STAGE, distillation=Distillation(iterations=700, batch_size=128))
    minima = dict.fromkeys(("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"), 1)
    coalescence = AdaptiveCoalescence(generator=Mined, stage=stage, **minima)

    # Execute
    result = coalescence.start(
        grid=InProcessGrid(made, nodes=nodes),
        initial_arrays=ArrayRecord(dict(Mined().state_dict())),
        num_rounds=1,
    )

    # Assert
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["uploads-merged"], metrics["uploads-dropped"]) == (
        nodes - len(mined),
        len(mined),
    )
    assert bool(result.arrays) == (nodes > len(mined))
    begun = [r.args[0] for r in caplog.records if "merging %d generators" in str(r.msg)]
    assert begun == [n for n in (nodes, nodes - len(mined)) if n]  # many cost no more than one


def test_a_merge_that_no_upload_spoils_leaves_the_model_where_its_own_samples_do(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*arguments: Any, **settings: Any) -> nn.Module:
        raise UselessMeasures({"the merged one": "the generator makes samples that are not finite"})

    monkeypatch.setattr(merger, "barycenter_of", spoilt)
    result = start(strategy(), InProcessGrid(app(), nodes=2))
    assert not result.arrays
    assert "the merge failed (the generator makes samples that are not finite)" in caplog.text


def test_a_weight_of_next_to_nothing_makes_a_code_that_targets_take() -> None:
    made, told = ClientApp(), []
    uploads(made, {11: 1e-12})

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        code, _ = received_code(message, context)
        told.append(code)
        return reply(message, ArrayRecord())

    start(strategy(), InProcessGrid(made, nodes=3))
    assert len(told) == 3 and min(told[0].shares) > 5e-7


def test_a_reply_that_nobody_can_read_counts_as_dropped() -> None:
    good, bad = ClientApp(), ClientApp()
    uploads(good)

    @bad.train()
    def train(message: Message, context: Context) -> Message:
        answer = reply(message, initial_arrays())
        for number in range(17):
            answer.content[f"more-{number}"] = ConfigRecord({"bytes": b"x" * 1_000_000})
        return answer

    grid = InProcessGrid(good, nodes=2)
    grid.add({}, app=bad)
    result = start(strategy(patience=2, fraction_evaluate=0.0), grid, rounds=4)
    assert [result.train_metrics_clientapp[r]["uploads-dropped"] for r in (1, 2, 3)] == [1, 1, 0]
