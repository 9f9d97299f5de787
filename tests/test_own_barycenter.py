"""From the server's shares to a target's own barycenter: what travels, and what is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_wb.adaptation import WEIGHTS, folded, own_start, weights
from fl_wb.clients import FastAdaptation, target_evaluate
from fl_wb.generators.code import Code
from fl_wb.generators.networks import MLPGenerator
from fl_wb.generators.reweighted import Reweighted, reweighted
from fl_wb.generators.sampling import generate
from fl_wb.messages import keys
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from fl_wb.training.distillation import Distillation
from fl_wb.transport import energy_distance
from tests.toys import (
    ADAPTATION,
    SHAPE,
    STAGE,
    TERNARIZATION,
    generator,
    initial_arrays,
    seeded_state,
    uploads,
)

CODE = Code([0.5, 0.3, 0.2])


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_wb.adaptation.fast_adaptation.POOL", 100)
    monkeypatch.setattr(weights, "FOLDING", Distillation(3, 8))


def start() -> nn.Module:
    network = generator()
    network.load_state_dict(seeded_state(0))
    return network.eval()


def few(cell: int, n: int = 12) -> Tensor:
    """Return samples of one cell alone: no doubt whose they are."""
    alone = [float(k == cell) for k in range(len(CODE))]
    return generate(reweighted(start(), CODE, alone), n, seed=5)


# the server


def evaluated(**arguments: Any) -> list[RecordDict]:
    """Run a federation of three nodes; return what they were sent to evaluate."""
    app = ClientApp()
    uploads(app, {11: 2.0, 12: 5.0, 13: 3.0})
    contents = []

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        contents.append(message.content)
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app, nodes=3)
    strategy = AdaptiveCoalescence(generator=generator, stage=STAGE, **arguments)
    strategy.start(grid, initial_arrays(), num_rounds=1)
    return contents


def test_targets_are_told_the_shares_and_nothing_of_who_has_them() -> None:
    contents = evaluated()
    assert len(contents) == 3
    for content in contents:
        assert list(content) == ["arrays", "config", keys.CODE]
        assert dict(content.config_records[keys.CODE]) == {
            keys.SHARES: pytest.approx([0.5, 0.3, 0.2])  # by place: the heaviest first
        }
        assert list(content.array_records["arrays"]) == list(seeded_state(0))


@pytest.mark.parametrize(
    "arguments", [{"fan_in": 2}, {"geodesic": "displacement"}], ids=["recursion", "displacement"]
)
def test_a_model_of_no_one_code_is_sent_without(arguments: dict[str, Any]) -> None:
    contents = evaluated(**arguments)
    assert len(contents) == 3 and all(keys.CODE not in content for content in contents)


# the node


def evaluate(samples: Tensor, shares: Any, **arguments: Any) -> Message:
    """Send a node with FastAdaptation the model and its shares; return its echo of the model."""
    mod = FastAdaptation(
        generator,
        lambda context: samples,
        adaptation=ADAPTATION,
        ternarization=TERNARIZATION,
        **arguments,
    )
    app = ClientApp(mods=[mod])

    @app.evaluate()
    def echo(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    return ask(app, shares)


def ask(app: ClientApp, shares: Any) -> Message:
    content = RecordDict({"arrays": initial_arrays()})
    if shares is not None:
        content[keys.CODE] = ConfigRecord({keys.SHARES: shares})
    (reply,) = InProcessGrid(app, nodes=1).send_and_receive([Message(content, 11, "evaluate")])
    return reply


def state(reply: Message) -> dict[str, Tensor]:
    assert not reply.has_error(), reply.error
    found: dict[str, Tensor] = reply.content.array_records["arrays"].to_torch_state_dict()
    return found


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("ternarize", [True, False])
def test_the_mod_hands_on_the_architecture_that_the_app_knows(method: str, ternarize: bool) -> None:
    found = state(evaluate(few(2), list(CODE.shares), weights=method, ternarize=ternarize))
    assert list(found) == list(seeded_state(0))
    assert all(value.shape == seeded_state(0)[name].shape for name, value in found.items())


def test_the_mod_uses_the_weights() -> None:
    def made(samples: Tensor, shares: Any, **arguments: Any) -> dict[str, Tensor]:
        return state(evaluate(samples, shares, ternarize=False, **arguments))

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    without = made(few(2), None)
    assert same(made(few(2), list(CODE.shares), weights="shares"), without)
    assert not same(made(few(2), list(CODE.shares)), without)
    assert same(made(few(2, 1), list(CODE.shares)), made(few(2, 1), None))  # one says nothing


@pytest.mark.parametrize(
    "shares",
    [[], [0.5, -0.5], [1.0, 0.0], [float("nan"), 0.5], [2.0], [1, 2], "all", [1e-4] * 5000, 0.5],
)
def test_shares_that_are_no_code_are_named(shares: Any) -> None:
    reason = str(evaluate(few(0), shares).error.reason)
    assert "the message to node 11 has shares" in reason


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights='best' is not one of fitted, radius"):
        FastAdaptation(generator, lambda context: few(0), weights="best")


@pytest.mark.parametrize("shares", [list(CODE.shares), None])
def test_a_target_reports_its_own_barycenter(shares: list[float] | None) -> None:
    app = ClientApp()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = target_evaluate(
            message,
            context,
            generator=generator,
            few=few(2, 40),
            held_out=few(2, 30),
            adaptation=ADAPTATION,
        )
        return Message(content, reply_to=message)

    content = ask(app, shares).content
    metrics = content.metric_records[keys.METRICS]
    steps = [name.split("/")[0] for name in metrics if name.endswith("/energy")]
    pictures = list(content.array_records[keys.SAMPLES])
    assert steps == ["few", *pictures]
    own = ["reweighted"] * bool(shares)
    assert pictures == ["barycenter", *own, "adapted"]
    assert ("weigh-seconds" in metrics) is bool(shares)
    if shares:
        energy = [metrics[f"{step}/energy"] for step in ("barycenter", "reweighted")]
        assert isinstance(energy[0], float) and isinstance(energy[1], float)
        assert energy[1] < energy[0] / 4


# the mathematics


def test_a_start_whose_weights_hardly_differ_is_the_generator_itself() -> None:
    network = start()
    assert own_start(network, CODE, generate(network, 1)) is network
    assert own_start(network, CODE, few(2), method="shares") is network
    own = own_start(network, CODE, few(2, 40))  # cells of a fresh network are hard to tell apart
    assert isinstance(own, Reweighted) and own.generator is network
    assert own.weights[2] > 0.8


def test_folded_weights_are_in_the_architecture_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FOLDING", Distillation(300, 64, 1e-2))
    torch.manual_seed(0)
    network = MLPGenerator(SHAPE, latent_dim=4, width=32).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    own = reweighted(network, CODE, [0.0, 0.0, 1.0])
    assert isinstance(own, Reweighted)

    plain = folded(own)

    assert type(plain) is MLPGenerator and not plain.training
    made, wanted, old = (generate(g, 1000, seed=2) for g in (plain, own, network))
    assert energy_distance(made, wanted) < energy_distance(old, wanted) / 10
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_folding_leaves_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FOLDING", Distillation(2, 8))
    network = MLPGenerator(SHAPE, latent_dim=4, width=8).eval()
    network.net[0].requires_grad_(False)
    plain = folded(reweighted(network, CODE, [0.0, 0.0, 1.0]))
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in network.named_parameters() if p.requires_grad}
    moved = dict(plain.named_parameters())
    assert {n for n, p in network.named_parameters() if not moved[n].equal(p)} == trained
