"""Generators of points in the plane whose measures are known, for the tests of the mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_wb.generators.networks import MLPCritic
from fl_wb.training.wgan import Progress


class Gaussian(nn.Module):
    """Exactly N(mean, std^2 I) at the start: an affine map plus a network whose output is zero."""

    def __init__(self, mean: Sequence[float], std: float = 0.5) -> None:
        super().__init__()
        dim, self.latent_dim = len(mean), max(4, len(mean))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.affine = nn.Linear(self.latent_dim, dim)
            self.residual = nn.Sequential(
                nn.Linear(self.latent_dim, 64),
                nn.ReLU(),
                nn.Linear(64, 64),
                nn.ReLU(),
                nn.Linear(64, dim),
            )
        with torch.no_grad():
            self.affine.weight.copy_(std * torch.eye(dim, self.latent_dim))
            self.affine.bias.copy_(torch.tensor(mean))
            self.residual[-1].weight.zero_()
            self.residual[-1].bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        samples: Tensor = self.affine(z) + self.residual(z)
        return samples


def critic() -> nn.Module:
    """Make a small critic of points in the plane."""
    return MLPCritic((2,), width=64)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same state, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(call: int) -> Progress:
    """Make a callback that raises `Killed` when it is called for the given time."""
    calls = 0

    def callback(done: int, total: int, losses: dict[str, float]) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed

    return callback
