"""What a source's generator may tell of its samples: DP-SGD's parts, and what a source refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from opacus.accountants import utils as accounting
from torch import Tensor, nn

from fl_wb import client_app
from fl_wb.app.config import compose
from fl_wb.app.overrides import ConfigError
from fl_wb.app.schema import Config
from fl_wb.clients.source import HELD_OUT, _split
from fl_wb.clients.training import train_source
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import generate
from fl_wb.messages import keys
from fl_wb.metrics import memorization
from fl_wb.persistence import stage_store
from fl_wb.persistence.stage_store import StageStore
from fl_wb.training.privacy import (
    Mechanism,
    Privacy,
    gradients,
    mechanism,
    poisson,
    private_critic_steps,
)
from fl_wb.training.wgan import Training, train_wgan
from tests.points import Killed, kill_at, same
from tests.test_clients import ask, points, source
from tests.toys import TRAINING, critic, generator, seeded_state

PRIVATE = Privacy(epsilon=5.0)


@pytest.fixture(scope="module", autouse=True)
def remembered() -> Iterator[None]:
    """Look for the noise of the same training once: each time takes Opacus seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "get_noise_multiplier", cache(accounting.get_noise_multiplier))
        yield


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(samples: Tensor, by: Mechanism, *, fakes: int = 4, penalty: float = 0.0) -> Tensor:
    """Return how far one step of gradient descent, at rate 1, moves a critic's weights."""
    torch.manual_seed(0)
    network = critic()
    before = nn.utils.parameters_to_vector(network.parameters()).detach()
    descent = torch.optim.SGD(network.parameters(), lr=1.0)
    steps = private_critic_steps(by)
    steps(network, descent, lambda n, _: samples, [points(fakes)], penalty, rng())
    return nn.utils.parameters_to_vector(network.parameters()).detach() - before


def made(noise: float, clip: float) -> Mechanism:
    return Mechanism(0.5, 1, noise, 1.0, 1e-5, clip)


def test_each_samples_gradient_is_its_own() -> None:
    network, reals, fakes = critic(), points(3), points(5)
    found = gradients(network, reals, fakes, rng())
    partners = torch.randint(5, (3,), generator=rng())
    for k in range(3):
        loss = network(fakes[partners[k], None]) - network(reals[k, None])
        one = torch.autograd.grad(loss.sum(), list(network.parameters()))
        for whole, part in zip(found, one, strict=True):
            assert torch.allclose(whole[k], part, atol=1e-6)


def test_one_sample_moves_a_step_by_no_more_than_the_clipped_gradient() -> None:
    samples, clip = points(6), 0.01
    whole, without = (moved(s, made(0.0, clip)) for s in (samples, samples[:5]))
    assert float((whole - without).norm()) == pytest.approx(clip / 4, rel=1e-3)  # of 4 expected


def test_where_nothing_is_clipped_a_step_is_the_plain_gradient() -> None:
    samples = points(4)
    torch.manual_seed(0)
    network = critic()
    mean = [part.sum(0) / 4 for part in gradients(network, samples, points(4), rng())]
    expected = -nn.utils.parameters_to_vector(mean)
    assert torch.allclose(moved(samples, made(0.0, 1e6)), expected, atol=1e-6)


def test_the_noise_is_as_large_as_it_is_said_to_be_and_the_penalty_has_none() -> None:
    none = points(2)[:0]
    noise = moved(none, made(3.0, 2.0))
    assert float(noise.std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.1)
    penalty = moved(none, made(1e-9, 2.0), penalty=10.0)
    assert torch.allclose(moved(none, made(3.0, 2.0), penalty=10.0), noise + penalty, atol=1e-4)


def test_every_sample_is_drawn_by_itself() -> None:
    samples, generator = torch.arange(50.0)[:, None], rng()
    draws = [poisson(samples)(10, generator) for _ in range(2000)]
    sizes = torch.tensor([float(len(draw)) for draw in draws])
    assert float(sizes.mean()) == pytest.approx(10, abs=0.3)
    assert float(sizes.var()) == pytest.approx(50 * 0.2 * 0.8, rel=0.15)
    assert torch.bincount(torch.cat(draws).long().flatten()).min() > 300


def test_epsilon_is_that_of_gaussian_mechanisms_where_every_step_sees_every_sample() -> None:
    # Mironov 2017: alpha T / (2 sigma^2) at order alpha; Balle et al. 2020: to epsilon at delta
    training = Training(iterations=30, critic_steps=2, warmup=4, batch_size=64)
    by = mechanism(PRIVATE, training, n=64)
    assert (by.rate, by.steps) == (1.0, 64)
    best = min(
        alpha * 64 / (2 * by.noise**2)
        + math.log1p(-1 / alpha)
        - (math.log(1e-5) + math.log(alpha)) / (alpha - 1)
        for alpha in [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    )
    assert by.epsilon == pytest.approx(best, rel=1e-6)
    assert 4.99 < by.epsilon <= 5.0


def test_fewer_samples_a_step_and_fewer_steps_take_less_noise() -> None:
    training = Training(iterations=30, batch_size=16)
    noise = mechanism(PRIVATE, training, n=100).noise
    assert mechanism(PRIVATE, training, n=1000).noise < noise
    assert mechanism(PRIVATE, Training(iterations=10, batch_size=16), n=100).noise < noise
    assert mechanism(Privacy(epsilon=1.0), training, n=100).noise > noise


@pytest.mark.parametrize("privacy", [Privacy(), Privacy(epsilon=1.0, delta=0.01)])
def test_no_promise_or_one_that_lets_a_sample_be_published_is_refused(privacy: Privacy) -> None:
    with pytest.raises(ValueError, match=r"delta less than 0.01: one in 100 samples"):
        mechanism(privacy, TRAINING, n=100)


def test_a_critic_that_mixes_samples_is_refused() -> None:
    def mixing() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 1))

    with pytest.raises(ValueError, match=r"cannot be trained with epsilon.*BatchNorm"):
        train_source(generator(), mixing, points(9), TRAINING, privacy=PRIVATE)


def test_a_private_training_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    training = Training(iterations=6, batch_size=8, critic_steps=2, warmup=1)
    steps, checkpoint = made(0.5, 1.0), StageStore().checkpoint("key")
    start, judge = generator(), critic()

    def train(**more: Any) -> nn.Module:
        found = train_wgan(
            start,
            [judge],
            [poisson(points(20))],
            training,
            critic_steps=private_critic_steps(steps),
            **more,
        )
        return found.generator

    with pytest.raises(Killed):
        train(checkpoint=checkpoint, callback=kill_at(3))
    assert same(train(checkpoint=checkpoint, seed=9), train())


def test_the_noise_is_nobodys_to_know() -> None:
    one, other = (
        train_source(generator(), critic, points(20), TRAINING, privacy=PRIVATE, seed=3)[0]
        for _ in range(2)
    )
    assert not same(one.critics[0], other.critics[0])


def test_a_private_source_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 0)  # the same noise in every test

    def near(n: int) -> Tensor:
        return torch.randn(n, 2, generator=rng(n)) * 0.1 + 0.8

    def start() -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        network.latent_dim = 2  # type: ignore[assignment]
        return network

    training = Training(
        iterations=150, batch_size=128, critic_steps=3, generator_lr=2e-3, critic_lr=0.01
    )
    privacy = Privacy(epsilon=20.0)
    trained, figures = train_source(
        start(), lambda: MLPCritic((2,), width=16), near(500), training, privacy=privacy
    )
    before, after = (generate(g, 500).mean(0) - 0.8 for g in (start(), trained.generator))
    assert float(after.norm()) < 0.5 * float(before.norm())
    assert 0 < figures["epsilon"] <= 20.0 and figures["delta"] == 1e-5


def refused(reply: Any) -> str:
    return str(reply.error.reason)


def test_epsilon_is_sent_and_not_spent_again_in_each_round() -> None:
    metrics = ask(source(lambda: points(20), privacy=PRIVATE), "train", times=2).content[
        keys.METRICS
    ]
    assert 4.9 < metrics["epsilon"] <= 5.0 and metrics["delta"] == 1e-5  # type: ignore[index]
    again = ask(source(lambda: points(20), privacy=PRIVATE, again=True), "train")
    assert "would spend epsilon again" in refused(again)
    with pytest.raises(ConfigError, match=r"client.privacy.epsilon=5.0 is not for strategy=fedavg"):
        compose("strategy=fedavg client.privacy.epsilon=5")


def test_a_source_sends_no_generator_that_memorised_more_than_it_may() -> None:
    # Execute
    content = ask(source(lambda: points(50), min_memorization=0.01), "train").content
    reply = ask(source(lambda: points(50), min_memorization=9.0), "train")

    # Assert: the figure is that of the samples it trained on, and of those it did not
    order = torch.randperm(50, generator=rng())
    unseen, seen = points(50)[order].split([50 // HELD_OUT, 50 - 50 // HELD_OUT])
    network = generator()
    network.load_state_dict(seeded_state(0))
    trained = train_source(network, critic, seen, TRAINING)[0].generator
    expected = memorization(generate(trained, 1000), seen, unseen)
    metrics = content.metric_records[keys.METRICS]
    assert metrics["memorization"] == pytest.approx(expected)
    assert metrics[keys.WEIGHT] == 40
    assert re.search(
        rf"memorization={expected:.3g} of .* at least min_memorization=9", refused(reply)
    )


def test_a_private_source_measures_and_does_not_tell() -> None:
    app = source(lambda: points(50), min_memorization=0.01, privacy=PRIVATE)
    assert "memorization" not in ask(app, "train").content.metric_records[keys.METRICS]


def test_a_private_source_does_not_tell_it_when_it_refuses_either() -> None:
    app = source(lambda: points(50), min_memorization=9.0, privacy=PRIVATE)
    assert "uploads nothing: memorization of its generator must be" in refused(ask(app, "train"))


def test_one_sample_less_moves_no_other_out_of_a_private_training() -> None:
    data = points(200)
    seen, _ = _split(data, 0.5, 0, private=True)
    fewer, _ = _split(data[:-1], 0.5, 0, private=True)
    assert 120 < len(seen) < 199
    assert set(seen.tolist()) - {199} == set(fewer.tolist())


def test_memorization_of_too_few_samples_cannot_be_measured() -> None:
    reply = ask(source(lambda: points(9), min_memorization=0.5), "train")
    assert "min_memorization=0.5 cannot be measured with 9 samples" in refused(reply)


@pytest.mark.parametrize(
    ("n", "privacy", "warned"), [(499, None, True), (500, None, False), (20, PRIVATE, False)]
)
def test_a_source_of_few_samples_warns(
    n: int,
    privacy: Privacy | None,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fl_wb.clients.source.log.propagate", True)
    ask(source(lambda: points(n), privacy=privacy), "train")
    assert (f"This source has {n} samples: of fewer than 500" in caplog.text) == warned


LIMITS: list[tuple[str, dict[str, Any], tuple[float | None, float | None]]] = [
    ("", {}, (None, None)),
    ("client.privacy.epsilon=3 client.min_memorization=0.8", {}, (3.0, 0.8)),
    ("client.privacy.epsilon=3", {"epsilon": 10}, (3.0, None)),
    ("client.privacy.epsilon=30", {"epsilon": 10, "min-memorization": 0.9}, (10.0, 0.9)),
    ("client.min_memorization=0.5", {"epsilon": 1.5, "min-memorization": 0.9}, (1.5, 0.9)),
]


@pytest.mark.parametrize(("words", "node", "expected"), LIMITS)
def test_a_nodes_own_limits_stand_whatever_the_run_says(
    words: str, node: dict[str, Any], expected: tuple[float | None, float | None]
) -> None:
    config, context = compose(words), Context(7, 11, node, RecordDict(), {})
    found = client_app._privacy(config, context).epsilon
    assert (found, client_app._min_memorization(config, context)) == expected


@pytest.mark.parametrize("limit", [client_app._privacy, client_app._min_memorization])
def test_a_limit_that_is_none_is_refused(limit: Callable[[Config, Context], Any]) -> None:
    context = Context(7, 11, {"epsilon": "low", "min-memorization": True}, RecordDict(), {})
    with pytest.raises(ValueError, match=r"node 11: .* must be more than 0"):
        limit(Config(), context)


def test_a_refused_private_source_spends_epsilon_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(1)
        return train_source(*args, **kwargs)

    monkeypatch.setattr("fl_wb.clients.source.train_source", counted)
    app = source(lambda: points(50), min_memorization=9.0, privacy=PRIVATE)
    reply = ask(app, "train", times=3)
    assert "uploads nothing: memorization of its generator must be" in refused(reply)
    assert len(trained) == 1


@pytest.mark.parametrize("key", ["min_memorization", "Epsilon", "epsilom", "Role"])
def test_a_misspelt_limit_of_a_node_is_refused(key: str) -> None:
    node = {"partition-id": 0, "num-partitions": 3, "site": "a", key: 1.0}
    context = Context(7, 11, node, RecordDict(), {})
    with pytest.raises(ValueError, match=rf"node 11: its node_config has '{key}': is .* meant"):
        client_app.place(context, compose(""))
    del node[key]
    assert client_app.place(Context(7, 11, node, RecordDict(), {}), compose("")).role == "source"
