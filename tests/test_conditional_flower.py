"""Conditional generators and other latents in Flower: uploads, label counts, mods and targets."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.adaptation import Adaptation
from fl_wb.barycenter import Stage
from fl_wb.clients import FastAdaptation
from fl_wb.clients.source import source_train
from fl_wb.clients.target import target_evaluate
from fl_wb.generators.networks import make_critic, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.metrics import Evaluation, train_features
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training
from tests.test_conditional import PLACES, Dreamer, Line, Points, of_label
from tests.toys import ADAPTATION, SHAPE, TERNARIZATION, TRAINING

STAGE = Stage(distillation=Distillation(iterations=400, batch_size=64, lr=1e-2))
TINY = Stage(distillation=Distillation(iterations=3, batch_size=8))
COUNTS = {11: [10, 5, 0], 12: [0, 15, 10]}
SHIFT = {11: -3.0, 12: 3.0}


def sources(network: Any, counts: dict[int, Any] | None = None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = context.node_id
        said = {} if counts is None or node not in counts else {"label-counts": counts[node]}
        metrics = MetricRecord({"num-examples": 1, **said})
        state = network(SHIFT[node]).state_dict()
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def start(app: ClientApp, network: Any, rounds: int = 1, **arguments: Any) -> Result:
    strategy = AdaptiveCoalescence(
        fraction_evaluate=0, generator=lambda: network(0.0), **{"stage": STAGE, **arguments}
    )
    arrays = ArrayRecord(network(0.0).state_dict())
    return strategy.start(grid=InProcessGrid(app, 2), initial_arrays=arrays, num_rounds=rounds)


def loaded(network: nn.Module, result: Result) -> nn.Module:
    network.load_state_dict(result.arrays.to_torch_state_dict())
    return network.eval()


def test_label_counts_say_which_node_teaches_which_label() -> None:
    nu = loaded(Points(), start(sources(Points, COUNTS), Points, labels=3))

    left = [(of_label(nu, k)[:, 0] < PLACES[k, 0]).float().mean().item() for k in range(3)]
    assert left[0] > 0.97
    assert left[2] < 0.03
    assert left[1] == pytest.approx((1 / 3) / (1 / 3 + 3 / 5), abs=0.04)


def test_nodes_that_say_nothing_teach_all_labels() -> None:
    nu = loaded(Points(), start(sources(Points), Points, labels=3))

    for label in range(3):
        left = (of_label(nu, label)[:, 0] < PLACES[label, 0]).float().mean().item()
        assert left == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([1, 2], "are no list of 3 numbers"),
        (7, "are no list of 3 numbers"),
        ([1, -1, 1], "counts of labels must be >= 0"),
        ([0, 0, 0], "not all of them 0"),
        ([float("inf"), 1.0, 1.0], "are no list of 3 numbers"),
        ([float("nan"), 1.0, 1.0], "are no list of 3 numbers"),
        ([1e300, 1.0, 1.0], "are no list of 3 numbers"),
    ],
)
def test_counts_that_are_none_drop_the_upload(
    counts: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = sources(Points, COUNTS | {12: counts})
    result = start(app, Points, labels=3, stage=TINY)

    assert result.train_metrics_clientapp[1]["uploads-merged"] == 1
    assert result.train_metrics_clientapp[1]["uploads-dropped"] == 1
    assert "dropped the upload of node 12: its 'label-counts'" in caplog.text
    assert reason in caplog.text


def test_new_counts_alone_merge_anew(tmp_path: Any) -> None:
    first = start(sources(Points, COUNTS), Points, labels=3, stage=TINY, store=tmp_path)
    again = start(sources(Points, COUNTS), Points, labels=3, stage=TINY, store=tmp_path)
    other = start(
        sources(Points, COUNTS | {12: [5, 5, 5]}), Points, labels=3, stage=TINY, store=tmp_path
    )

    states = [result.arrays.to_torch_state_dict() for result in (first, again, other)]
    key = "net.0.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_uniform_latents_keep_each_nodes_share() -> None:
    stage = Stage(distillation=Distillation(iterations=1000, batch_size=128, lr=1e-2))
    result = start(sources(Line), Line, latents="uniform", stage=stage)
    made = generate(loaded(Line(0.0), result), 4000, latents="uniform")

    assert (made[:, 0] < 0.5).float().mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, r"takes no latents \(4, 3\): .*label.* if it wants a label, too, set labels"),
        ({"labels": 0}, "labels=0 must be from 1"),
        ({"labels": 3, "latents": "gamma"}, "latents='gamma' is not one of normal, uniform"),
        ({"labels": 3, "geodesic": "displacement"}, "conditional generators merge with"),
    ],
)
def test_what_does_not_fit_is_said_before_anybody_trains(
    arguments: dict[str, Any], reason: str
) -> None:
    app = ClientApp()  # that would fail if it were asked
    with pytest.raises(ValueError, match=reason):
        start(app, Points, **arguments)


class InTurn(Points):
    """Makes all labels in turn."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(z, torch.arange(len(z)) % 3)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Dreamer, "other samples of the same latents when it is called again.*see labels="),
        (InTurn, r"what its place in the batch says .*labels="),
    ],
)
def test_a_generator_that_draws_its_labels_is_refused(network: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        start(ClientApp(), network)


def digits(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures that are told apart by where they are bright, and their labels."""
    labels = torch.arange(n) % 3
    rng = torch.Generator().manual_seed(seed)
    images = torch.full((n, *SHAPE), -0.9)
    images[torch.arange(n), 0, labels] = 0.9
    return images + 0.05 * torch.randn(n, *SHAPE, generator=rng), labels


def network() -> nn.Module:
    return make_generator("mlp", SHAPE, latent_dim=4, width=16, labels=3)


def seeded() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network()


def ask(app: ClientApp, message_type: str, model: nn.Module) -> RecordDict:
    """Send a model to one node, and return what it answers."""
    grid = InProcessGrid(app, 1)
    content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, message_type)])
    assert not reply.has_error(), reply.error
    return reply.content


def source(settings: Training) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = source_train(
            message,
            context,
            generator=network,
            critic=lambda: make_critic("mlp", SHAPE, width=32),
            samples=lambda: digits(90),
            settings=settings,
            labels=3,
        )
        return Message(content, reply_to=message)

    return app


def test_a_source_learns_its_labels_and_says_how_often_it_has_them() -> None:
    settings = Training(iterations=150, batch_size=32, critic_steps=3, generator_lr=3e-3)
    content = ask(source(settings), "train", seeded())

    assert content.metric_records["metrics"]["label-counts"] == [30, 30, 30]
    trained = network()
    trained.load_state_dict(content.array_records["arrays"].to_torch_state_dict())
    features = train_features(*digits(300))
    for label in range(3):
        made = of_label(trained.eval(), label, 200)
        assert (features.classify(made) == label).float().mean() > 0.9


def test_the_mod_adapts_to_labelled_samples() -> None:
    seen: list[dict[str, Tensor]] = []
    app = ClientApp(
        mods=[
            FastAdaptation(
                network,
                lambda context: digits(12),
                labels=3,
                adaptation=ADAPTATION,
                ternarization=TERNARIZATION,
                reply_key="own",
            )
        ]
    )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        seen.append(message.content.array_records["arrays"].to_torch_state_dict())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    content = ask(app, "evaluate", seeded())
    assert list(seen[0]) == list(network().state_dict())
    packed = content["own"]["ternary"]
    made = ternary.unpack(packed, network())
    for name, value in made.state_dict().items():
        assert torch.equal(seen[0][name], value), name
    assert b'"labels": 3' in packed


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (lambda c: digits(4)[0], "with labels=3, samples must return a pair of Tensors"),
        (lambda c: (digits(4)[0], torch.tensor([0, 1, 2, 3])), "one integer label each, from 0"),
        (lambda c: (digits(4)[0][:2], digits(4)[1]), "2 samples need one integer label each"),
    ],
)
def test_the_mod_names_labels_that_are_none(samples: Any, reason: str) -> None:
    mod = FastAdaptation(network, samples, labels=3)
    with pytest.raises((TypeError, ValueError), match=reason):
        mod.few(Context(1, 11, {}, RecordDict(), {}), seeded())


def test_a_target_reports_right_labels_and_what_augmentation_is_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("fl_wb.metrics.augmentation")  # its function has the same name
    monkeypatch.setattr(module, "STEPS", 300)  # of 1500: these are easily told apart
    features, (few, labels) = train_features(*digits(300)), digits(12, 1)
    held_out, theirs = digits(60, 2)
    app = ClientApp()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = target_evaluate(
            message,
            context,
            generator=network,
            few=few,
            held_out=held_out,
            labels=3,
            few_labels=labels,
            held_out_labels=theirs,
            adaptation=ADAPTATION,
            ternarization=TERNARIZATION,
            features=features,
            evaluation=Evaluation(bank=True),
        )
        return Message(content, reply_to=message)

    figures = dict(ask(app, "evaluate", seeded()).metric_records["metrics"])
    for step in ("barycenter", "adapted", "ternary"):
        assert 0 <= figures[f"{step}/right-labels"] <= 1
    assert figures["bank/energy"] > 0
    assert figures["few/accuracy"] > 0.9
    assert figures["real/accuracy"] > 0.9
    assert {name for name in figures if name.endswith("accuracy")} == {
        "few/accuracy",
        "ternary/accuracy",
        "real/accuracy",
    }


def test_the_mod_of_uniform_latents_gets_its_own_weights() -> None:
    seen: list[dict[str, Tensor]] = []
    few = generate(Line(3.0), 40, latents="uniform", seed=2)
    start_of = start(sources(Line), Line, latents="uniform")
    mod = FastAdaptation(
        lambda: Line(0.0),
        lambda context: few,
        latents="uniform",
        adaptation=Adaptation(training=TRAINING),
        ternarize=False,
    )
    app = ClientApp(mods=[mod])

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        seen.append(message.content.array_records["arrays"].to_torch_state_dict())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    grid = InProcessGrid(app, 1)
    code = ConfigRecord({"shares": [0.5, 0.5]})
    content = RecordDict({"arrays": start_of.arrays, "fl-wb.code": code})
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(content, node, "evaluate")])
    assert not reply.has_error(), reply.error
    own = Line(0.0)
    own.load_state_dict(seen[0])
    made = generate(own.eval(), 2000, latents="uniform")
    assert (made[:, 0] > 0.5).float().mean() > 0.85
