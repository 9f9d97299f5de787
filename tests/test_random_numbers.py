"""A training and its caller: copies, and random numbers that neither takes from the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fl_wb.adaptation import adapt
from fl_wb.barycenter import recursive_barycenter
from fl_wb.generators.copies import copy_of
from fl_wb.persistence import stage_store
from fl_wb.persistence.stage_store import StageStore
from fl_wb.ternary import ternarize
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.wgan import Training, resample, train_wgan
from tests.points import Killed, kill_at, same
from tests.toys import ADAPTATION, STAGE, TERNARIZATION

SHORT = Training(iterations=3, batch_size=8, critic_steps=2, warmup=2)


class Wrapped(nn.Module):
    """A generator whose hidden layer has its weight computed by ``norm``, and remembers it."""

    latent_dim = 4

    def __init__(self, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.hidden, self.drop = norm(nn.Linear(4, 8)), nn.Dropout(0.3)
        self.out = nn.Linear(8, 5)

    def forward(self, z: Tensor) -> Tensor:
        self.activation = self.drop(self.hidden(z).relu())
        samples: Tensor = self.out(self.activation)
        return samples


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def made(seed: int, factory: Callable[[], nn.Module]) -> nn.Module:
    with own_random_numbers(seed):
        return factory()


def test_random_numbers_inside_are_the_seeds_and_outside_the_callers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    outside = [torch.rand(2)]
    inside = []
    for _ in range(2):
        with own_random_numbers(5):
            inside.append(torch.rand(3))
    outside.append(torch.rand(2))
    assert torch.equal(inside[0], inside[1])
    assert torch.equal(torch.cat(outside), expected)


def test_a_copy_of_a_network_that_was_just_used_is_a_network_of_its_own() -> None:
    network = made(0, Wrapped)
    before = network(torch.ones(2, 4))
    copy = copy_of(network)
    copy(torch.zeros(2, 4)).sum().backward()
    assert same(copy, network)
    assert network.hidden.weight.grad is None
    before.sum().backward()  # the graph of the original is whole
    assert network.hidden.weight.grad is not None


@pytest.mark.parametrize("keep", [lambda h: [h], lambda h: {"last": (1, h)}, lambda h: [{0: [h]}]])
def test_a_network_that_keeps_activations_in_any_form_is_copied(
    keep: Callable[[Tensor], object],
) -> None:
    class Keeper(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            self.kept = keep(super().forward(z))
            self.kept_twice = [self.kept]
            self.kept_twice.append(self.kept_twice)
            return nn.functional.relu(super().forward(z))

    network = Keeper(4, 2)
    network(torch.ones(2, 4))
    copy = copy_of(network)
    assert same(copy, network)
    assert torch.equal(copy(torch.ones(2, 4)), network(torch.ones(2, 4)))


@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_normalised_weights_are_merged_and_adapted_and_dropout_follows_the_seed(
    norm: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepare
    monkeypatch.setattr("fl_wb.adaptation.fast_adaptation.POOL", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older ones are deprecated, and in wide use
        generators = [made(seed, lambda: Wrapped(norm)) for seed in (0, 1)]
    few, results = torch.arange(30.0).view(6, 5) / 30, []

    # Execute, at two states of the caller's random numbers
    for seed in (2, 3):
        torch.manual_seed(seed)
        merged = recursive_barycenter(generators, critic=critic, stage=STAGE)
        results.append((merged, adapt(merged, few, critic=critic, settings=ADAPTATION)))

    # Assert
    for one, other in zip(*results, strict=True):
        assert same(one, other)
    assert not same(*results[0])
    with pytest.raises(ValueError, match=r"weight of layer 'hidden' .* cannot be ternarized"):
        ternarize(merged)


def test_dropout_follows_the_seed_in_ternarization() -> None:
    found = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        found.append(ternarize(made(0, Wrapped), settings=TERNARIZATION))
    assert same(*found)


def test_dropout_is_resumed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_store, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    checkpoint = StageStore().checkpoint("key")
    arguments = (made(0, Wrapped), [made(1, critic)], [resample(torch.eye(5))], SHORT)
    unbroken = train_wgan(*arguments)
    with pytest.raises(Killed):
        train_wgan(*arguments, checkpoint=checkpoint, callback=kill_at(2))
    torch.manual_seed(9)
    resumed = train_wgan(*arguments, checkpoint=checkpoint)
    assert same(resumed.generator, unbroken.generator)
    assert same(resumed.critics[0], unbroken.critics[0])
