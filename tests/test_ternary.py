"""Ternarization: three values a weight, thresholds that learn, and what training buys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of
from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import generate
from fl_wb.ternary import Ternarization, pack, ternarizable, ternarization, ternarize, unpack
from fl_wb.ternary.planes import take_statistics
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


def quick(iterations: int = 3, planes: int = 1, **fields: float) -> Ternarization:
    """Make settings of few iterations."""
    return Ternarization(iterations, planes=planes, **fields)


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
    """Two of three layers share one weight."""

    def __init__(self, latent_dim: int = 4) -> None:
        super().__init__()
        self.latent_dim, d = latent_dim, latent_dim
        self.net = nn.Sequential(
            nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)
        )
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


def test_what_is_frozen_is_ternary_and_still_frozen():
    generator = Layers().eval()
    generator.up.requires_grad_(False)
    ternary = ternarize(generator, settings=quick())

    assert len(values(ternary.up.weight)) == 3
    assert {name for name, p in ternary.named_parameters() if not p.requires_grad} == {
        "up.weight",
        "up.bias",
    }


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


class Gain(nn.Module):
    """A network whose last layer is a gain."""

    latent_dim = 4

    def __init__(self, out: nn.Module, shape: tuple[int, ...], weight: float | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 12))
        self.out, self.shape = out, shape
        with torch.no_grad():
            out.weight.fill_(weight) if weight else out.weight.abs_()

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.body(z).unflatten(1, self.shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gain(nn.Linear(1, 1, bias=False), (12, 1), -2.5),
        lambda: Gain(nn.ConvTranspose1d(1, 1, 1), (1, 12), 0.3),
        lambda: Gain(nn.Conv2d(3, 2, 1), (3, 2, 2), 0.7),
        lambda: Gain(nn.Linear(12, 30), (12,)),
    ],
    ids=["one weight", "one of a convolution", "equal ones", "one sign"],
)
def test_layers_of_one_sign_or_no_spread_keep_the_spread(make: Callable[[], nn.Module]):
    torch.manual_seed(2)
    generator = make()
    ternary = ternarize(generator, settings=quick(100))
    before, after = (generate(g, 1000).flatten(1).std(0).mean() for g in (generator, ternary))
    assert 0.8 < (after / before).item() < 1.2
    if len(generator.out.weight.unique()) == 1:  # no training is needed
        start = ternarize(generator, settings=quick(0)).out.weight
        torch.testing.assert_close(start, generator.out.weight)


# normalisation


@pytest.mark.parametrize("make", [trained, lambda: trained("conv", 8)])
def test_normalisation_makes_up_for_other_activations(make: Callable[[], nn.Module]):
    teacher, z = make(), torch.randn(500, 8)
    for name, buffer in teacher.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)  # which are not those of its activations
    student = copy_of(teacher)
    with torch.no_grad():
        for _, layer in list(ternarizable(student))[:-1]:
            layer.weight.mul_(3)
        assert not torch.allclose(student(z), teacher(z), atol=0.1)
        take_statistics(student, teacher, z, seed=0)
        torch.testing.assert_close(student(z), teacher(z), atol=1e-3, rtol=0)


# what came of it


@pytest.mark.parametrize("lr", [100.0, 1e30])
def test_a_training_that_ruins_hands_back_the_start(lr: float):
    start = ternarize(trained(), settings=quick(0))
    assert same(ternarize(trained(), settings=quick(20, lr=lr)), start)


def test_a_ruined_generator_is_not_handed_back_silently(caplog: pytest.LogCaptureFixture):
    class Chaos(nn.Module):
        latent_dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 30)

        def forward(self, z: Tensor) -> Tensor:
            return (100 * self.layer(z)).sin()

    torch.manual_seed(0)
    ternarize(nn.Linear(4, 30), settings=quick(3), latent_dim=4)
    assert not caplog.records
    ternarize(Chaos(), settings=quick(3))
    (record,) = caplog.records
    assert "A ternary Chaos loses" in record.message


def test_a_generator_that_is_not_finite_is_refused():
    generator = nn.Sequential(nn.Linear(4, 3))
    generator[0].weight.data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="ternary Sequential makes samples"):
        ternarize(generator, settings=quick(), latent_dim=4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [TiedWeights, SingleWeight])
def test_odd_layers_stay_finite_and_pack(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    generator = make()
    ternary = ternarize(generator, settings=quick())
    samples = generate(ternary, 20)
    assert torch.isfinite(samples).all()
    assert generate(unpack(pack(ternary), make()), 20).equal(samples)


def test_what_layers_that_share_a_weight_have_learned_is_what_comes_back():
    torch.manual_seed(1)
    generator = TiedWeights(16)
    losses: list[float] = []

    ternary = ternarize(
        generator,
        settings=quick(300, energy=0, threshold_lr=1e-2),
        callback=lambda done, total, loss: losses.append(loss["distillation"]),
    )

    z = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    distance = (ternary(z) - generator(z)).abs().mean().item() * 4  # of 16 values: its root
    assert distance == pytest.approx(sum(losses[-20:]) / 20, rel=0.05)


@pytest.mark.parametrize("needed", [[2, 1, 1], [1, 2, 1]])
def test_a_shared_weight_gets_as_many_planes_as_any_of_its_layers_needs(
    monkeypatch: pytest.MonkeyPatch, needed: list[int]
):
    monkeypatch.setattr(ternarization, "planes_needed", lambda *_: needed)
    torch.manual_seed(0)
    ternary = ternarize(TiedWeights(16), settings=quick(planes=2))
    assert len(values(ternary.net[0].weight)) > 3 and len(values(ternary.net[4].weight)) == 3
    assert ternary.net[0].weight is ternary.net[2].weight


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
    settings = quick(30, lr=1e-12, threshold_lr=3e-2 if learns else 0.0)
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
