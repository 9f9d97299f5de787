"""The generative part of a larger model: coalesced, while all other arrays are averaged."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fl_wb import ternary
from fl_wb.barycenter import recursive_barycenter
from fl_wb.clients import FastAdaptation, fast_adaptation
from fl_wb.messages import generator_part
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.toys import ADAPTATION, STAGE, TERNARIZATION, reply

KEYS = ("fc3.", "decoder.")
LATENT = 3
WEIGHTS = {11: 1.0, 12: 3.0, 13: 2.0}
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapt with few samples of the start: their number is no concern of these tests."""
    monkeypatch.setattr("fl_wb.adaptation.fast_adaptation.POOL", 100)


class Net(nn.Module):
    """A model with the parts and names of Flower's VAE example, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(6, LATENT), nn.Linear(6, LATENT)
        self.fc3 = nn.Linear(LATENT, 6)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))


class Decoder(nn.Module):
    """The part that generates."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.fc3, self.decoder = net.fc3, net.decoder

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        samples: torch.Tensor = self.decoder(self.fc3(z))
        return samples


def state_of(seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = dict(Net().state_dict())
    state["encoder.1.num_batches_tracked"] += seed
    return state


def generative(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith(KEYS)}


def headed(state: State, head: str) -> State:
    return {head + name: value for name, value in state.items()}


def app(spoil: Any = None, head: str = "") -> ClientApp:
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        state = headed(state_of(context.node_id), head)
        if spoil and context.node_id == 13:
            spoil(state)
        return reply(message, ArrayRecord(state), WEIGHTS[context.node_id])

    return made


def strategy(**arguments: Any) -> AdaptiveCoalescence:
    settings: dict[str, Any] = {"generator": Decoder, "latent_dim": LATENT, "stage": STAGE}
    return AdaptiveCoalescence(**settings | {"generator_keys": KEYS} | arguments)


def start(strategy: FedAvg, client: ClientApp | None = None, head: str = "") -> ArrayRecord:
    grid = InProcessGrid(client or app(), nodes=3)
    initial = ArrayRecord(headed(state_of(0), head))
    return strategy.start(grid=grid, initial_arrays=initial, num_rounds=1).arrays


def test_the_part_is_coalesced_and_the_rest_is_averaged() -> None:
    # Prepare
    networks = []
    for node_id in (12, 13, 11):  # the heaviest first
        networks.append(Decoder())
        networks[-1].load_state_dict(generative(state_of(node_id)))
    barycenter = recursive_barycenter(networks, [3, 2, 1], stage=STAGE, latent_dim=LATENT)

    # Execute
    found = start(strategy())

    # Assert
    averaged = start(FedAvg())
    for name, value in state_of(0).items():
        assert (found[name].dtype, found[name].shape) == (
            str(value.numpy().dtype),
            tuple(value.shape),
        )
        if name.startswith(KEYS):
            expected = barycenter.state_dict()[name].numpy()
            assert np.array_equal(found[name].numpy(), expected), name
        else:
            assert np.allclose(found[name].numpy(), averaged[name].numpy(), atol=0.5), name
            if name.endswith("weight"):
                assert np.allclose(found[name].numpy(), averaged[name].numpy(), atol=1e-7), name
    assert list(found) == list(state_of(0))
    assert int(found["encoder.1.num_batches_tracked"].numpy()) == 12  # of 11, 12, 12, 12, 13, 13
    Net().load_state_dict(found.to_torch_state_dict())  # strict


def test_the_models_names_may_begin_with_more_than_the_generators_own() -> None:
    head = "trainer.model."
    keys = tuple(head + key for key in KEYS)
    found = start(strategy(generator_keys=keys), app(head=head), head)
    expected = start(strategy())
    assert list(found) == [head + name for name in expected]
    for name, array in expected.items():
        assert np.array_equal(found[head + name].numpy(), array.numpy()), name


@pytest.mark.parametrize(
    ("names", "own", "head"),
    [
        (["0.weight", "0.bias"], ["0.weight", "0.bias"], ""),
        (["g.0.weight", "g.0.bias"], ["0.weight", "0.bias"], "g."),
        (["m.g.0.weight", "m.g.0.bias"], ["g.0.weight", "extra"], "m."),  # is named as missing
        (["m.a.weight", "n.a.weight"], ["a.weight"], ""),
        (["g.0.weight"], ["1.weight"], ""),
        ([], ["1.weight"], ""),
    ],
)
def test_what_stands_before_a_generators_own_names(
    names: list[str], own: list[str], head: str
) -> None:
    arrays = ArrayRecord({name: torch.zeros(1) for name in names})
    found, before = generator_part.own(arrays, own)
    assert before == head
    assert list(found) == [name.removeprefix(head) for name in names]


def test_a_prefix_of_nothing_is_answered_with_those_that_there_are() -> None:
    arrays = ArrayRecord({f"m.{name}": torch.zeros(1) for name in ("g.0.weight", "d.1.bias", "x")})
    with pytest.raises(ValueError, match=r"'g.'; the model's begin with m.d., m.g., m.x$"):
        generator_part.split(arrays, ("g.",))


def test_an_upload_whose_other_arrays_are_bad_is_dropped_whole() -> None:
    def spoil(state: State) -> None:
        state["fc1.weight"] = state["fc1.weight"] * torch.nan

    found = start(strategy(), app(spoil))["fc1.weight"].numpy()
    expected = (state_of(11)["fc1.weight"] + 3 * state_of(12)["fc1.weight"]) / 4
    assert np.allclose(found, expected.numpy())


def test_the_rest_is_refit_to_the_merged_part() -> None:
    # Prepare: a refit that sees the merged model and spoils the generator's arrays
    seen: list[State] = []

    def refit(state: State) -> State:
        seen.append(state)
        return {name: torch.full_like(value, 7) for name, value in state.items()}

    # Execute
    found = start(strategy(refit=refit))

    # Assert
    merged = start(strategy())
    assert [list(state) for state in seen] == [list(state_of(0))]
    for name, value in merged.items():
        assert np.array_equal(seen[0][name].numpy(), value.numpy()), name
        expected = value.numpy() if name.startswith(KEYS) else np.full_like(value.numpy(), 7)
        assert np.array_equal(found[name].numpy(), expected), name


def raises(state: State) -> State:
    raise FloatingPointError("the encoder diverged")


def diverges(state: State) -> State:
    return {n: value / 0 if value.is_floating_point() else value for n, value in state.items()}


@pytest.mark.parametrize(
    ("refit", "why"), [(raises, "FloatingPointError: the encoder"), (diverges, "not finite")]
)
def test_a_refit_that_fails_costs_itself_and_not_the_run(
    refit: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    found, averaged = start(strategy(refit=refit)), start(strategy())
    assert list(found) == list(averaged)
    for name, value in averaged.items():
        assert np.array_equal(found[name].numpy(), value.numpy()), name
    assert re.search(rf"aggregate_train: refit failed \(.*{why}.*\): the averaged", caplog.text)


def test_a_refit_that_returns_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"refit returned .*'encoder.0.weight' .* is missing"):
        start(strategy(refit=generative))


@pytest.mark.parametrize(
    ("arguments", "kind", "reason"),
    [
        ({"generator_keys": ("fc9.",)}, ValueError, "begins with 'fc9.'; the model's begin with "),
        ({"generator_keys": "decoder."}, TypeError, r"such as \('decoder.',\), not one string"),
        ({"generator_keys": ()}, ValueError, "at least one prefix"),
        ({"generator_keys": ("fc3.", "")}, ValueError, "none that is ''"),
        ({"generator_keys": (3,)}, TypeError, "must be strings"),
        ({"generator_keys": ("decoder.",)}, ValueError, r"'fc3.weight' \(6, 3\) is missing"),
        ({"generator_keys": (*KEYS, "fc1.")}, ValueError, "'fc1.weight' is not part"),
        (
            {"generator_keys": None},
            ValueError,
            r"'encoder.0.weight' is not .* \(15 arrays, of which the generator has 4: ",
        ),
        ({"generator_keys": None, "refit": dict}, ValueError, "refit without generator_keys"),
    ],
)
def test_a_part_that_is_none_is_refused_before_training(
    arguments: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    grid = InProcessGrid(app(), nodes=3)
    with pytest.raises(kind, match=reason):
        strategy(**arguments).start(grid=grid, initial_arrays=ArrayRecord(state_of(0)))
    assert not any(node.received for node in grid.nodes.values())


def echo(head: str = "", **arguments: Any) -> ClientApp:
    made = ClientApp(
        mods=[
            FastAdaptation(
                Decoder,
                lambda context: torch.ones(4, 5),
                adaptation=ADAPTATION,
                ternarization=TERNARIZATION,
                latent_dim=LATENT,
                generator_keys=tuple(head + key for key in KEYS),
                **arguments,
            )
        ]
    )

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return made


def evaluate_once(grid: InProcessGrid, seed: int = 0, head: str = "") -> RecordDict:
    content = RecordDict({"arrays": ArrayRecord(headed(state_of(seed), head))})
    message = Message(content=content, message_type="evaluate", dst_node_id=11)
    (found,) = grid.send_and_receive([message])
    assert not found.has_error(), found.error
    return found.content


@pytest.mark.parametrize("head", ["", "model."])
def test_the_mod_adapts_the_part_and_leaves_the_rest_alone(head: str) -> None:
    content = evaluate_once(InProcessGrid(echo(head, reply_key="packed"), nodes=1), head=head)
    found = content.array_records["arrays"].to_torch_state_dict()
    assert list(found) == list(headed(state_of(0), head))
    found = {name.removeprefix(head): value for name, value in found.items()}
    for name, value in state_of(0).items():
        if not name.startswith(KEYS):
            assert torch.equal(found[name], value), name
    assert len(found["fc3.weight"].unique()) == 3
    packed = content.config_records["packed"]["ternary"]
    assert isinstance(packed, bytes)
    for name, value in ternary.unpack(packed, Decoder()).state_dict().items():
        assert torch.allclose(value, found[name])


def test_the_mod_keeps_what_it_made_while_model_and_samples_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Prepare
    made = []
    make = fast_adaptation.make_own
    monkeypatch.setattr(
        fast_adaptation, "make_own", lambda *a, **k: made.append(1) or make(*a, **k)
    )
    grid = InProcessGrid(echo(reply_key="packed"), nodes=1)

    # Execute
    first, second, _ = (evaluate_once(grid, seed) for seed in (0, 0, 1))

    # Assert
    assert len(made) == 2
    assert first["packed"] == second["packed"]
    for name, value in first.array_records["arrays"].items():
        assert np.array_equal(value.numpy(), second.array_records["arrays"][name].numpy())
    assert len(grid.nodes[11].context.state) == 2  # the last, not all


def test_the_mod_refuses_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="reply_key sends the ternary generator"):
        FastAdaptation(Decoder, lambda context: torch.ones(1), reply_key="a", ternarize=False)
    with pytest.raises(TypeError, match="not one string"):
        FastAdaptation(Decoder, lambda context: torch.ones(1), generator_keys="decoder.")


def test_a_reply_key_in_use_is_named() -> None:
    grid = InProcessGrid(echo(reply_key="metrics"), nodes=1)
    content = RecordDict({"arrays": ArrayRecord(state_of(0))})
    message = Message(content=content, message_type="evaluate", dst_node_id=11)
    (found,) = grid.send_and_receive([message])
    assert "the reply has a record 'metrics' already" in found.error.reason


def test_a_counter_that_fedavg_averaged_before_is_no_obstacle() -> None:
    state = state_of(0)
    arrays = ArrayRecord(state)
    arrays["encoder.1.num_batches_tracked"] = Array(np.asarray(2.6))
    grid = InProcessGrid(app(), nodes=3)
    found = strategy().start(grid=grid, initial_arrays=arrays, num_rounds=1).arrays
    counter = found["encoder.1.num_batches_tracked"]
    assert (counter.dtype, float(counter.numpy())) == ("float64", 12)  # as initial_arrays has it


def enc_app(
    values: Any,
    weights: dict[int, float] | None = None,
    sent: dict[int, list[float]] | None = None,
) -> ClientApp:
    """Nodes that send their own generator, and fc1.bias full of values(node_id, round)."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        server_round = message.content["config"]["server-round"]
        if sent is not None:
            got = message.content.array_records["arrays"]["fc1.bias"].numpy()
            sent[context.node_id].append(float(got[0]))
        state = state_of(context.node_id)
        state["fc1.bias"] = torch.full_like(
            state["fc1.bias"], values(context.node_id, server_round)
        )
        return reply(message, ArrayRecord(state), (weights or {}).get(context.node_id, 1.0))

    return made


def test_the_rest_follows_its_nodes_though_their_generators_stay() -> None:
    seen: list[float] = []
    strategy().start(
        grid=InProcessGrid(enc_app(lambda node, number: float(number)), nodes=2),
        initial_arrays=ArrayRecord(state_of(0)),
        num_rounds=3,
        evaluate_fn=lambda number, arrays: seen.append(float(arrays["fc1.bias"].numpy()[0])),
    )
    assert seen[1:] == [1.0, 2.0, 3.0]


def test_no_node_weighs_more_than_max_share_in_an_average() -> None:
    sent: dict[int, list[float]] = {11: [], 12: [], 13: []}

    def values(node: int, number: int) -> float:
        return 100.0 if node == 12 else 1.0

    client = enc_app(values, {12: 1e12}, sent)
    found = strategy(continue_from="average").start(
        grid=InProcessGrid(client, nodes=3),
        initial_arrays=ArrayRecord(state_of(0)),
        num_rounds=2,
    )
    expected = pytest.approx((3 * 100 + 2 * 1) / 5)  # three times the mean of the others
    assert float(found.arrays["fc1.bias"].numpy()[0]) == expected
    assert sent[11][1] == sent[13][1] == expected
