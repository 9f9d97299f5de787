"""Ternarization: three values a weight, thresholds that learn, and what training buys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import generate
from fl_wb.ternary import Ternarization, Ternary, pack, ternarizable, ternarize, unpack
from fl_wb.ternary.ternarization import _fold_statistics, mean_above
from fl_wb.transport import energy_distance
from tests.points import same


def trained(name: str = "mlp", width: int = 16) -> nn.Module:
    """Make a generator whose batch statistics are not the initial ones."""
    torch.manual_seed(0)
    generator = make_generator(name, (1, 8, 8), latent_dim=8, width=width)
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # so that the images use their range
        generator.train()(torch.randn(500, 8))
    return generator.eval()


def quick(iterations: int = 3, **fields: float) -> Ternarization:
    """Make settings of few iterations."""
    return Ternarization(iterations, **fields)


class Layers(nn.Module):
    """One of each kind of layer."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8 * 4)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.across = nn.Conv1d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.table = nn.Embedding(3, 5)  # a matrix, but of no layer that is ternarized

    def forward(self, z: Tensor) -> Tensor:
        maps = self.up(self.linear(z).unflatten(1, (8, 4)))
        return self.norm(self.across(maps)) * self.scale + self.table.weight.sum()


class TiedWeights(nn.Module):
    """Two layers that share one weight."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.net[2].weight = self.net[0].weight

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


class SingleWeight(nn.Module):
    """A layer whose weight has no spread."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 2))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


def values(weight: Tensor) -> set[float]:
    return set(weight.detach().flatten().tolist())


# the closed form


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 2.0])
def test_the_mean_above_a_threshold_is_the_truncated_gaussian_s(ratio: float):
    tail, _ = quad(norm.pdf, ratio, np.inf)
    expected, _ = quad(lambda x: x * norm.pdf(x) / tail, ratio, np.inf)
    assert mean_above(torch.tensor(ratio)).item() == pytest.approx(expected, rel=1e-5)


def test_a_gaussian_weight_becomes_its_mean_magnitude_above_the_threshold():
    rng = torch.Generator().manual_seed(0)
    weight = 0.3 + 0.1 * torch.randn(400, 400, generator=rng)
    ternary = Ternary(weight)
    with torch.no_grad():
        ternary.threshold.fill_(0.8)
        result = ternary(weight)
    centred = weight - weight.mean()
    above = centred.abs() > 0.8 * centred.std(correction=0)
    assert result.sign().equal(centred.sign() * above)
    alpha = result.max().item()
    assert alpha == pytest.approx(centred[above].abs().mean().item(), rel=0.01)
    assert values(result) == {-alpha, 0.0, alpha}


def test_the_first_threshold_is_seven_tenths_of_the_mean_magnitude():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    centred = weight - weight.mean()
    threshold = Ternary(weight).threshold.item() * centred.std()
    assert threshold.item() == pytest.approx(0.7 * centred.abs().mean().item(), rel=1e-3)


def test_gradients_go_straight_to_weights_and_by_alpha_to_the_threshold():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 30, generator=rng, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(30, 30, generator=rng, dtype=torch.float64)
    ternary = Ternary(weight)

    result = ternary(weight)
    (upstream * result).sum().backward()

    assert weight.grad is not None and weight.grad.equal(upstream)
    signs, std = result.detach().sign(), weight.detach().std(correction=0)
    ratio, step = ternary.threshold.detach(), 1e-5
    slope = (mean_above(ratio + step) - mean_above(ratio - step)) / (2 * step)
    expected = (upstream * signs).sum() * std * slope
    torch.testing.assert_close(ternary.threshold.grad, expected, rtol=1e-5, atol=0)


# what ternarize returns


@pytest.mark.parametrize(
    "make",
    [trained, lambda: trained("conv", 8), lambda: trained("dcgan", 4), Layers],
    ids=["mlp", "conv", "dcgan", "layers"],
)
def test_every_layer_s_weight_takes_three_values(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    generator = make()

    ternary = ternarize(generator, settings=quick())

    layers = dict(ternarizable(ternary))
    assert layers
    for name, layer in layers.items():
        alpha = layer.weight.max().item()
        assert alpha > 0 and values(layer.weight) == {-alpha, 0.0, alpha}, name
    # the same architecture, plain again, and what is no layer's weight is not ternary
    mine, theirs = (
        [(key, value.shape) for key, value in module.state_dict().items()]
        for module in (ternary, generator)
    )
    assert mine == theirs  # in the same order, too
    assert not ternary.training and all(p.requires_grad for p in ternary.parameters())
    for name, layer in layers.items():
        if layer.bias is not None:
            assert len(values(layer.bias)) > 3 or layer.bias.numel() <= 3, name


def test_what_is_not_a_layer_s_weight_stays_in_full_precision():
    torch.manual_seed(0)
    generator = Layers()
    names = {name for name, _ in ternarizable(generator)}
    ternary = ternarize(generator, settings=quick())
    assert names == {"linear", "up", "across"}
    for parameter in (ternary.norm.weight, ternary.linear.bias, ternary.table.weight):
        assert len(values(parameter)) > 3
    assert ternary.scale.item() != 2  # and learns


def test_the_argument_is_left_alone_and_the_seed_decides():
    generator = trained().train().requires_grad_(False)
    torch.manual_seed(3)
    rng = torch.get_rng_state()

    one = ternarize(generator, settings=quick(), seed=1)

    assert torch.get_rng_state().equal(rng)
    assert generator.training and not any(p.requires_grad for p in generator.parameters())
    assert same(generator, trained())
    torch.manual_seed(9)
    assert same(one, ternarize(generator, settings=quick(), seed=1))
    assert not same(one, ternarize(generator, settings=quick(), seed=2))


def test_iterations_and_latent_dimension_are_the_caller_s():
    done: list[tuple[int, int]] = []
    settings = quick(50)

    ternarize(
        nn.Sequential(nn.Linear(3, 2)),
        iterations=3,
        settings=settings,
        latent_dim=3,
        callback=lambda i, total, losses: done.append((i, total)),
    )

    assert done == [(1, 3), (2, 3), (3, 3)] and settings.iterations == 50


def test_statistics_are_folded_into_scale_and_shift():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    x = torch.randn(7, 5)
    before = norm(x)

    _fold_statistics(norm)

    torch.testing.assert_close(norm(x), before)
    assert norm.running_mean.eq(0).all() and len(values(norm.running_var)) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [TiedWeights, SingleWeight])
def test_odd_layers_stay_finite_and_pack(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    generator = make()
    ternary = ternarize(generator, settings=quick())
    samples = generate(ternary, 20)
    assert torch.isfinite(samples).all()
    assert generate(unpack(pack(ternary), make()), 20).equal(samples)


def test_a_generator_without_layers_is_refused():
    class Scale(nn.Module):
        latent_dim = 2

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, z: Tensor) -> Tensor:
            return z * self.scale

    with pytest.raises(ValueError, match="Scale has no linear or convolution layer"):
        ternarize(Scale())


# thresholds and training


def patterns(generator: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().sign() for _, layer in ternarizable(generator)]


@pytest.mark.parametrize("learns", [True, False])
def test_thresholds_move_with_their_rate_and_stay_without(learns: bool):
    # With the weights held still, only a threshold can change which weights are zero.
    settings = quick(30, lr=0.0, threshold_lr=3e-2 if learns else 0.0)
    before = ternarize(trained(), settings=quick(0))
    after = ternarize(trained(), settings=settings)
    moved = [
        not one.equal(other) for one, other in zip(patterns(before), patterns(after), strict=True)
    ]
    # the first weight was turned until next to nothing of it lies near its threshold
    assert moved[1:] == [learns] * 3 and (learns or not moved[0])


def test_training_beats_rounding():
    generator = trained(width=32)
    reference = generate(generator, 600, seed=5)

    rounded, learned = (ternarize(generator, settings=quick(n)) for n in (0, 150))

    def apart(ternary: nn.Module) -> float:
        return energy_distance(generate(ternary, 600, seed=6), reference).item()

    def distance(ternary: nn.Module) -> float:
        return (generate(ternary, 600, seed=5) - reference).flatten(1).norm(dim=1).mean().item()

    assert apart(learned) < apart(rounded) / 10
    assert distance(learned) < 0.8 * distance(rounded)
