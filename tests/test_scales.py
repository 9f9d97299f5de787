"""Weights that a normalisation follows are no longer than they were, and nothing else has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl_wb.barycenter import recursive_barycenter
from fl_wb.barycenter.scales import rescale, scales
from fl_wb.barycenter.stage import Stage
from fl_wb.generators.latents import Latents
from fl_wb.training.distillation import Distillation
from fl_wb.training.statistics import settle

Z = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))


def _grown(network: nn.Module, times: float) -> dict[str, torch.Tensor]:
    """Make a network's matrices longer, with the statistics of what they make; return what was."""
    norms = scales(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1 or name.endswith("0.bias"):
                parameter.mul_(times)
    settle(network, Latents(4))
    return norms


@pytest.mark.parametrize(
    ("norm", "free"),
    [(nn.BatchNorm1d(32), True), (nn.LayerNorm(32), True), (nn.Identity(), False)],
)
def test_only_a_normalised_layer_gets_its_length_back(norm: nn.Module, free: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 32), norm, nn.ReLU(), nn.Linear(32, 2)).eval()
    norms = _grown(network, 5.0)
    before, last = network(Z).detach(), network[3].weight.clone()
    long = network[0].weight.clone()
    rescale(network, norms, Latents(4))
    assert (network[0].weight.norm() / norms["0"]).item() == pytest.approx(1.0 if free else 5.0)
    assert network[0].weight.equal(long) is not free and network[3].weight.equal(last)
    assert not network.training and not network[3].training
    # a LayerNorm's epsilon cannot be made up for
    near = 1e-3 if isinstance(norm, nn.LayerNorm) else 1e-5
    torch.testing.assert_close(network(Z), before, atol=near, rtol=near)
    if isinstance(norm, nn.BatchNorm1d):  # the true statistics, still
        inside = network[0](Z)
        torch.testing.assert_close(norm.running_mean, inside.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(norm.running_var, inside.var(0), atol=0, rtol=0.2)


def test_convolutions_too_and_what_is_frozen_or_has_not_grown_stays() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 36, bias=False),
        nn.Unflatten(1, (4, 3, 3)),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 1, 2),
        nn.BatchNorm2d(1),
    ).eval()
    norms = _grown(network, 4.0)
    network[5].bias.requires_grad_(False)  # of which a part is frozen
    with torch.no_grad():
        network[7].weight.mul_(0.1)  # shorter than it was
    settle(network, Latents(4))
    before = network(Z).detach()
    kept = [network[k].weight.clone() for k in (5, 7)]
    rescale(network, norms, Latents(4))
    for k in (0, 3):
        torch.testing.assert_close(network[k].weight.norm(), norms[str(k)])
    assert all(network[k].weight.equal(was) for k, was in zip((5, 7), kept, strict=True))
    torch.testing.assert_close(network(Z), before, atol=1e-5, rtol=1e-5)


def test_a_frozen_normalisation_needs_the_length() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    norms = _grown(network, 3.0)
    network[1].requires_grad_(False)
    before = network(Z).detach()
    rescale(network, norms, Latents(4))
    assert network(Z).equal(before)


def test_a_merged_generator_is_as_easily_moved_as_its_sources() -> None:
    def source(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)]
        network = nn.Sequential(*layers).eval()
        network.latent_dim = 4
        settle(network, Latents(4))
        return network

    stage = Stage(distillation=Distillation(iterations=300, batch_size=64, lr=1e-2))
    sources = [source(0), source(1)]
    nu = recursive_barycenter(sources, stage=stage)
    length = sources[0][0].weight.norm().item()
    assert nu[0].weight.norm().item() == pytest.approx(length, rel=1e-4)
