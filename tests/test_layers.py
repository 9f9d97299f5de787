"""What layers that derive something from their weights or batches keep through a merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.latents import Latents
from fl_wb.generators.sampling import generate
from fl_wb.metrics import energy_distance
from fl_wb.training.distillation import Distillation
from fl_wb.training.statistics import hold, settle
from fl_wb.training.wgan import Training
from tests.points import same


class Normalised(nn.Module):
    """A generator of points with one kind of normalisation, away from the origin."""

    def __init__(self, kind: str, shift: float) -> None:
        super().__init__()
        self.latent_dim = 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(10 * shift) % 7)
            first, last = nn.Linear(4, 32), nn.Linear(32, 2)
        between: nn.Module = nn.Identity()
        if kind == "spectral":
            first, last = (nn.utils.parametrizations.spectral_norm(f) for f in (first, last))
        elif kind == "batch":
            between = nn.BatchNorm1d(32)
        elif kind == "batch statistics":
            between = nn.BatchNorm1d(32, track_running_stats=False)
        else:
            between = nn.Sequential(
                nn.Unflatten(1, (4, 8)), nn.InstanceNorm1d(4, affine=True), nn.Flatten()
            )
        self.net = nn.Sequential(first, between, nn.ReLU(), last)
        self.scale = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.shift = nn.Parameter(torch.tensor([shift, 0.0]))
        with torch.no_grad():
            for _ in range(40):
                self(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.net(z) + self.shift


@pytest.mark.parametrize("kind", ["batch", "spectral", "instance", "batch statistics"])
@pytest.mark.parametrize("wgan", [0, 20])
def test_train_mode_and_eval_mode_agree_after_a_merge(kind: str, wgan: int):
    stage = Stage(
        distillation=Distillation(iterations=400, batch_size=64, lr=1e-2),
        training=Training(iterations=wgan, warmup=5),
    )
    sources = [Normalised(kind, -4.0).eval(), Normalised(kind, 4.0).eval()]
    nu = recursive_barycenter(sources, [1, 30 if kind == "batch statistics" else 1], stage=stage)
    calm = generate(nu, 4000, seed=1)
    nu.train()
    with torch.no_grad():
        z = torch.randn(4000, 4, generator=torch.Generator().manual_seed(2))
        for _ in range(15):  # as a client's first steps would
            excited = torch.cat([nu(part) for part in z.split(200)])
    assert abs(energy_distance(calm, excited)) < 0.05
    assert nu.scale.item() == 3.0 and not nu.scale.requires_grad and nu.shift.requires_grad
    if kind == "spectral":
        for layer in (nu.net[0], nu.net[3]):
            assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() < 1.02


def test_statistics_are_those_of_all_batches_however_slowly_they_move():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=1e-4)).eval()
    settle(network, Latents(4))
    linear, norm = network
    torch.testing.assert_close(norm.running_mean, linear.bias.detach(), atol=0.05, rtol=0)
    var = linear.weight.detach().square().sum(1)
    torch.testing.assert_close(norm.running_var, var, atol=0, rtol=0.1)
    assert not norm.training and norm.momentum == 1e-4


def test_statistics_after_a_long_training_are_of_more_latents() -> None:
    def error(trained: int) -> float:
        network = nn.Sequential(nn.Linear(4, 200, bias=False), nn.BatchNorm1d(200)).eval()
        settle(network, Latents(4), trained, seed=1)
        linear, norm = network
        deviations = norm.running_mean / linear.weight.detach().norm(dim=1)
        return float(deviations.square().mean().sqrt())

    assert error(131_072) < 0.6 * error(0) < 0.6 * 0.04


@pytest.mark.parametrize("convolutional", [False, True])
def test_held_statistics_become_true_and_all_that_is_made_stays(convolutional: bool) -> None:
    # Prepare: statistics that are far from those of what is made
    shape, layer, norm = (
        ((4, 3, 3), nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6))
        if convolutional
        else ((36,), nn.Linear(36, 6), nn.BatchNorm1d(6))
    )
    head = [nn.Unflatten(1, shape)] if convolutional else []
    network = nn.Sequential(*head, layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    z = torch.randn(5000, 36, generator=torch.Generator().manual_seed(3))
    network.eval()(z)
    for value in (norm.running_mean, norm.weight, norm.bias):
        nn.init.uniform_(value, 0.5, 2)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    before = network(z).detach()

    # Execute
    held = hold(network.train())
    settle(network, Latents(36), held=held)

    # Assert
    assert held == [norm] and not norm.training and network.training
    torch.testing.assert_close(network.eval()(z), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.train()(z), before, atol=0.3, rtol=0.1)


class Bent(nn.BatchNorm1d):
    """Its weights are not those of an affine map of what it normalises."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.square()


class Named(nn.Module):
    """Calls one of its normalisations by keyword, and the other one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.idle = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(input=self.first(z))


def test_a_normalisation_that_is_never_called_stays_as_it_is() -> None:
    network = Named()
    idle = {name: value.clone() for name, value in network.idle.state_dict().items()}
    held = hold(network.train())
    settle(network, Latents(4), held=held)
    assert held == [network.norm, network.idle]
    assert all(torch.equal(value, idle[name]) for name, value in network.idle.state_dict().items())
    mean = network.first.bias.detach()
    torch.testing.assert_close(network.norm.running_mean, mean, atol=0.05, rtol=0)


def test_what_could_not_make_up_for_other_statistics_is_not_held() -> None:
    frozen, half_frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    frozen.weight.requires_grad_(False)
    half_frozen.bias.requires_grad_(False)
    norms = [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4, affine=True),
        frozen,
        half_frozen,
        Bent(4),
    ]
    norms += [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    norms[-1].weight = norms[-2].weight
    assert hold(nn.Sequential(*norms)) == []
    assert all(norm.training for norm in norms)


def test_the_second_half_of_a_distillation_sees_the_statistics_that_stay() -> None:
    modes: list[bool] = []

    class Watched(Normalised):
        def forward(self, z: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                modes.append(self.net[1].training)
            return super().forward(z)

    stage = Stage(
        distillation=Distillation(iterations=10, batch_size=50),
        training=Training(iterations=2, batch_size=50, warmup=1),
    )
    nu = recursive_barycenter([Watched("batch", -4.0), Watched("batch", 4.0)], stage=stage)
    assert modes[:10] == [True] * 5 + [False] * 5
    assert len(modes) > 10 and all(modes[10:])  # a WGAN that follows learns as any
    assert not nu.training and not nu.net[1].training


def averaged(stage: Stage) -> int:
    """Merge two sources; return of how many latents statistics were taken."""
    shown: list[int] = []

    class Counted(Normalised):
        def forward(self, z: Tensor) -> Tensor:
            if self.net[1].momentum is None:  # an average of all batches is being taken
                shown.append(len(z))
            return super().forward(z)

    recursive_barycenter([Counted("batch", -4.0), Counted("batch", 4.0)], stage=stage)
    return sum(shown)


def test_a_merge_takes_its_statistics_of_latents_by_the_pairs_it_has_learned() -> None:
    stage = Stage(distillation=Distillation(iterations=40, batch_size=1000))
    assert 9_000 < averaged(stage) <= 10_000  # once, after half of the iterations


@pytest.mark.parametrize(("start", "times"), [("previous", 1), ("distilled", 2)])
def test_a_merge_takes_its_statistics_after_a_wgan(start: str, times: int) -> None:
    stage = Stage(
        start=start,
        distillation=Distillation(iterations=2, batch_size=50),
        training=Training(iterations=2, batch_size=50, warmup=1),
    )
    assert averaged(stage) == times * 2560


@pytest.mark.parametrize("wgan", [0, 20])
def test_a_frozen_normalisation_keeps_its_statistics_too(wgan: int):
    sources = [Normalised("batch", shift) for shift in (-4.0, 4.0)]
    for source in sources:
        source.net[1].requires_grad_(False)
        source.net[1].load_state_dict(sources[0].net[1].state_dict())
    stage = Stage(
        distillation=Distillation(iterations=400, batch_size=64, lr=1e-2),
        training=Training(iterations=wgan, warmup=5),
    )
    nu = recursive_barycenter([source.eval() for source in sources], stage=stage)

    assert same(nu.net[1], sources[0].net[1])
    assert not any(p.requires_grad for p in nu.net[1].parameters())
    left = (generate(nu, 2000)[:, 0] < 0).float().mean().item()  # the others learned
    assert left == pytest.approx(0.5, abs=0.1)
