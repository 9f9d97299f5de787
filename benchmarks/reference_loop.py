"""The reference loop: WGAN-GP against several critics, as research scripts commonly write it.

The yardstick of `benchmarks.speed`, and nothing else. Each critic, in each of its steps, gets fakes
generated anew, with the generator's graph kept (and so back-propagated through); one forward
pass each for real, fake and interpolated samples; Adam unfused. The gradient penalty is taken per
sample, as in `fl_wb.training.wgan`: the two loops differ in cost, not in what they minimise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import nn

from fl_wb.training.wgan import Sampler

PENALTY = 10.0


def reference_loop(
    generator: nn.Module,
    critics: Sequence[nn.Module],
    reals: Sequence[Sampler],
    *,
    iterations: int,
    batch_size: int,
    critic_steps: int = 5,
    latent_dim: int,
    lr: float = 1e-4,
    seed: int = 0,
    callback: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train copies of a generator and its critics; returns the generator."""
    generator = deepcopy(generator).train()
    critics = [deepcopy(critic).train() for critic in critics]
    betas = (0.5, 0.999)
    generator_adam = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas, fused=False)
    adams = [torch.optim.Adam(c.parameters(), lr=lr, betas=betas, fused=False) for c in critics]
    rng = torch.Generator().manual_seed(seed)

    def latents() -> torch.Tensor:
        return torch.randn(batch_size, latent_dim, generator=rng)

    for iteration in range(iterations):
        for _ in range(critic_steps):
            for critic, adam, real in zip(critics, adams, reals, strict=True):
                x, fake = real(batch_size, rng), generator(latents())
                mix = torch.rand(batch_size, *[1] * (x.dim() - 1), generator=rng)
                between = (mix * x + (1 - mix) * fake).detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
                norm = gradient.flatten(1).norm(dim=1)
                loss = critic(fake).mean() - critic(x).mean() + PENALTY * ((norm - 1) ** 2).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
        loss = -torch.stack([critic(generator(latents())).mean() for critic in critics]).mean()
        generator_adam.zero_grad()
        loss.backward()
        generator_adam.step()
        if callback:
            callback(iteration + 1, generator)
    return generator
