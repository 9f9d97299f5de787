"""What a small slip in the mathematics would undo; `python -m tests.mutants` makes these slips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.mixture import Mixture, fitting
from fl_wb.generators.sampling import generate
from fl_wb.ternary import Ternarization, ternarize
from fl_wb.training.wgan import Training
from fl_wb.transport import energy_distance
from tests.points import Gaussian, same

LEFT, RIGHT = (-4.0, 0.0), (4.0, 0.0)


class Witness(nn.Module):
    """A critic that tells in `sides` whether it saw samples left and right of 0."""

    sides: list[set[bool]]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.index = len(self.sides)  # the training has a copy, which writes to the same place
        self.sides.append(set())

    def forward(self, x: Tensor) -> Tensor:
        self.sides[self.index] |= set((x[:, 0] > 0).tolist())
        scores: Tensor = self.layer(x).squeeze(1)
        return scores


def test_two_critics_are_one_for_each_measure():
    Witness.sides = []
    recursive_barycenter(
        [Gaussian(LEFT), Gaussian(RIGHT)],
        geodesic="two_critics",
        stage=Stage(start="previous", fidelity=0, training=Training(iterations=2, warmup=2)),
        critic=Witness,
    )
    # the generator starts as one of the sources, so that its critic sees no other side
    assert sorted(map(len, filter(None, Witness.sides))) == [1, 2]


class Blind(nn.Module):
    """A critic to which all samples are alike, at no penalty: it moves no generator."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score + 0 * x.sum(1)

    def input_gradient(self, x: Tensor) -> Tensor:
        return 0 * self.score + torch.tensor([1.0, 0.0]).expand_as(x)


def test_fidelity_alone_leads_to_the_teacher():
    stage = Stage(
        start="previous",
        training=Training(iterations=100, batch_size=32, critic_steps=1, generator_lr=3e-2, ema=0),
    )

    def merged(fidelity: float) -> nn.Module:
        return recursive_barycenter(
            [Gaussian(LEFT), Gaussian(RIGHT)],
            [0.75, 0.25],
            geodesic="displacement",
            stage=replace(stage, fidelity=fidelity),
            critic=Blind,
        )

    assert same(merged(0.0), Gaussian(LEFT))
    mean = generate(merged(1.0), 1000).mean(0)
    torch.testing.assert_close(mean, torch.tensor([-2.0, 0.0]), atol=0.3, rtol=0)


def test_the_energy_weight_of_a_ternarization_counts():
    torch.manual_seed(1)
    layers = (nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 16))
    generator = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
    settings = Ternarization(iterations=100, batch_size=64, lr=1e-2, planes=1)

    def apart(energy: float) -> float:
        ternary = ternarize(generator, settings=replace(settings, energy=energy), latent_dim=16)
        drawn = [
            generate(g, 1500, seed=k, latent_dim=16) for k, g in enumerate((generator, ternary))
        ]
        return energy_distance(*drawn).item()

    assert apart(5.0) < 0.6 * apart(0.0)


def test_the_latent_is_turned_before_its_weight_is_ternarized():
    rng = torch.Generator().manual_seed(0)
    three = torch.randint(-1, 2, (300, 6), generator=rng).float()
    hidden, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))
    generator = nn.Linear(6, 300, bias=False)
    with torch.no_grad():
        generator.weight.copy_(three @ hidden)

    ternary = ternarize(generator, iterations=0, latent_dim=6)

    # W W^T, the samples' covariance, is what no rotation changes: .83 alike without one
    before, after = (g.weight.detach() @ g.weight.detach().T for g in (generator, ternary))
    assert (before * after).sum() > 0.9 * before.norm() * after.norm()


@pytest.mark.parametrize(("declared", "made"), [(1, 1), (3, 3), (4, 3), (10**6, 3)])
def test_no_stranger_s_arrays_make_more_generators_than_the_limit(declared: int, made: int):
    calls = 0

    def generator() -> nn.Module:
        nonlocal calls
        calls += 1
        assert calls <= 3
        return Gaussian(LEFT)

    mixture = fitting({"shares": (declared,)}, generator, most=3)

    assert isinstance(mixture, Mixture) and len(mixture.generators) == made
