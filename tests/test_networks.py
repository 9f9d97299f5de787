"""Generators and critics: shapes, errors, and how samples are drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.networks import CRITICS, GENERATORS, MLPCritic, make_critic, make_generator
from fl_wb.generators.sampling import (
    check_real,
    generate,
    input_gradient,
    latent_dim_of,
    sampling,
)
from tests.points import Gaussian, same

SHAPES = {
    "mlp": [(1, 8, 8), (3, 5, 7), (2,)],
    "conv": [(1, 28, 28), (3, 32, 32), (1, 8, 8)],
    "dcgan": [(1, 32, 32), (3, 16, 24)],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in GENERATORS for shape in SHAPES[name]]
)
def test_generators_make_samples_of_their_shape(name: str, shape: tuple[int, ...]):
    generator = make_generator(name, shape, latent_dim=6, width=4)

    samples = generator(torch.randn(5, 6))

    assert samples.shape == (5, *shape)
    assert samples.abs().max() <= 1
    samples.sum().backward()
    assert all(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in CRITICS for shape in SHAPES[name]]
)
def test_critics_score_each_sample_alone(name: str, shape: tuple[int, ...]):
    critic = make_critic(name, shape, width=4)
    samples = torch.randn(5, *shape)

    scores = critic(samples)

    assert scores.shape == (5,)
    # the gradient penalty is each sample's own: a critic that mixes a batch would break it
    torch.testing.assert_close(critic(samples[2:3]), scores[2:3])


@pytest.mark.parametrize("name", GENERATORS)
def test_width_sets_the_size(name: str):
    def size(width: int | None) -> int:
        network = make_generator(name, (1, 8, 8), width=width)
        return sum(p.numel() for p in network.parameters())

    assert size(4) < size(8) < size(None)


def test_the_compact_generator_has_as_many_parameters_as_it_says():
    network = make_generator("conv", (1, 28, 28), latent_dim=32)
    assert round(sum(p.numel() for p in network.parameters()), -3) == 419_000


@pytest.mark.parametrize("make", [make_generator, make_critic])
def test_an_unknown_name_is_answered_with_the_names(make):
    with pytest.raises(ValueError, match=r"'resnet': choose one of mlp.*dcgan"):
        make("resnet", (1, 8, 8))


@pytest.mark.parametrize(
    ("name", "shape", "multiple"),
    [("conv", (1, 30, 28), 4), ("conv", (2,), 4), ("dcgan", (1, 28, 28), 8)],
)
def test_images_that_a_network_cannot_make_are_refused(name, shape, multiple):
    with pytest.raises(ValueError, match=f"multiples of {multiple}"):
        make_generator(name, shape)


def test_the_latent_dimension_is_the_argument_or_the_attribute():
    assert latent_dim_of(make_generator("mlp", (2,), latent_dim=7)) == 7
    assert latent_dim_of(nn.Linear(3, 2), 3) == 3


@pytest.mark.parametrize("attribute", [None, 0, 2.0, "8"])
def test_an_unknown_latent_dimension_is_asked_for(attribute: object):
    generator = nn.Linear(3, 2)
    generator.latent_dim = attribute
    with pytest.raises(ValueError, match=r"Linear is unknown.*latent_dim="):
        latent_dim_of(generator)


def test_generate_depends_on_the_seed_alone():
    generator = Gaussian((1.0, -1.0))
    before = torch.get_rng_state()

    samples = generate(generator, 50, seed=3)

    assert torch.get_rng_state().equal(before)
    assert generate(generator, 50, seed=3).equal(samples)
    assert not generate(generator, 50, seed=4).equal(samples)
    torch.testing.assert_close(generate(generator, 50, seed=3, batch_size=7), samples)


def test_generate_draws_standard_normal_latents():
    identity = nn.Identity()
    samples = generate(identity, 20_000, latent_dim=2)
    torch.testing.assert_close(samples.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.T.cov(), torch.eye(2), atol=0.05, rtol=0)


def test_generate_leaves_the_generator_as_it_was():
    generator = make_generator("conv", (1, 8, 8), latent_dim=4, width=4)
    generator.train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}

    samples = generate(generator, 10)

    assert generator.training and not samples.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    generator.eval()
    assert generate(generator, 10).equal(samples)  # the batch's own statistics played no part
    assert not generator.training


def test_sampling_restores_the_mode_after_an_error():
    generator = Gaussian((0.0, 0.0)).train()
    with pytest.raises(RuntimeError), sampling(generator):
        generator(torch.zeros(1, 99))
    assert generator.training and torch.is_grad_enabled()


def test_a_state_dict_moves_between_equal_networks():
    one = make_generator("mlp", (1, 4, 4), width=8)
    other = make_generator("mlp", (1, 4, 4), width=8)
    assert not same(one, other)
    other.load_state_dict(one.state_dict())
    z: Tensor = torch.randn(3, 32)
    assert other(z).equal(one(z))


def test_the_written_out_gradient_is_that_of_autograd():
    torch.manual_seed(0)
    critic, x = MLPCritic((1, 8, 8)), torch.randn(16, 1, 8, 8)

    def penalty_and_its_gradients(network: nn.Module) -> list[torch.Tensor]:
        gradient = input_gradient(network, x)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
        return [gradient, penalty, *torch.autograd.grad(penalty, weights)]

    by_hand = penalty_and_its_gradients(critic)
    by_autograd = penalty_and_its_gradients(critic.net)  # a Sequential, which has no such method
    for ours, theirs in zip(by_hand, by_autograd, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_sampling_gives_every_part_its_own_mode_back():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    network.train()
    network[1].eval()
    with sampling(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, False, True]


class Alone(nn.Module):
    """A generator that one row alone is taken from, or that fails on it."""

    latent_dim = 4

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(z) if self.kind == "batch statistics" else (2 * z).squeeze()


@pytest.mark.parametrize("kind", ["batch statistics", "squeeze"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9])
def test_no_generator_is_called_with_one_row(kind: str, n: int):
    assert generate(Alone(kind), n, batch_size=4).shape == (n, 4)


def test_one_sample_is_the_first_of_its_latent():
    torch.testing.assert_close(
        generate(Alone("squeeze"), 1, seed=3), 2 * generate(nn.Identity(), 1, seed=3, latent_dim=4)
    )


@pytest.mark.parametrize(
    ("samples", "made", "should"),
    [
        ((0.0, 254.5), (-1.0, 0.9), r"x / 127.5 - 1\?"),  # bytes, resized
        ((0.0, 17.0), (0.0, 1.0), r"x / 127.5 - 1\?"),  # digits of 17 greys
        ((0.0, 1.0), (-0.99, 0.9), r"2 x - 1\?"),  # ToTensor alone, for a tanh
        ((-1.0, 1.0), (0.01, 0.99), r"\(x \+ 1\) / 2\?"),  # for a sigmoid
    ],
)
def test_samples_in_another_unit_are_said(
    samples: tuple[float, float], made: tuple[float, float], should: str
):
    with pytest.warns(UserWarning, match=f"should they be {should}"):
        check_real(torch.tensor(samples)[:, None], torch.tensor(made)[:, None])


@pytest.mark.parametrize(
    ("samples", "made"),
    [
        ((-1.0, 1.0), (-0.9, 0.9)),
        ((0.0, 1.0), (0.1, 0.8)),
        ((0.0, 1.0), (-0.3, 0.2)),  # untrained
        ((0.0, 2024.0), (-1.0, 1.0)),  # a column of a table
        ((0.0, 200.0), (-3.0, 150.0)),
        ((-2.1, 2.6), (-1.0, 1.0)),  # by ImageNet's mean and spread
    ],
)
def test_samples_that_may_be_meant_so_are_not(
    samples: tuple[float, float], made: tuple[float, float], recwarn: pytest.WarningsRecorder
):
    check_real(torch.tensor(samples)[:, None], torch.tensor(made)[:, None])
    assert not recwarn


@pytest.mark.parametrize("samples", [torch.arange(6).byte(), torch.ones(6, dtype=torch.bool)])
def test_samples_that_are_no_floating_numbers_are_refused(samples: Tensor):
    with pytest.raises(TypeError, match=r"and the generator makes floating ones from -1 to 1"):
        check_real(samples[:, None], torch.tensor([[-1.0], [1.0]]))
