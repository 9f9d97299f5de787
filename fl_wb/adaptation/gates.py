"""A gate fitted to a few samples: which of what a generator makes they ask for, without labels.

Ours; not in the paper. Sources of several classes know no class apart, and a target with some of
them wants parts of what they make. These are found by clusters of the generator's samples: few
samples, widened by the generator's variation, fall into some of them more often than the
generator's own. What a cluster needs is then said of the latents (`fl_wb.generators.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from fl_wb.adaptation.variation import variation_bank
from fl_wb.adaptation.weights import fit_weights, shrunk
from fl_wb.generators.code import Code
from fl_wb.generators.gate import LOGS, Gate
from fl_wb.generators.reweighted import reweighted
from fl_wb.generators.sampling import device_of, latents_of, sampling

CLUSTERS = 60
"""Fewer are less pure, more copy more."""

LLOYD = 15
"""Iterations of k-means."""

POOL = 8000
"""Samples of the generator that are clustered."""

LATENTS = 32_000
"""From which the gate learns."""

COMPARED = 2000
"""Of the pool, where all pairs are compared."""

POWER, PRIOR = 4, 100
"""Of `fl_wb.adaptation.weights.shrunk`: of many small clusters, a fit loses more by samples that it
has not seen, and very few samples say less."""

WIDENED, WIDENED_LESS = 2000, 300
"""Widened samples that are counted, and in each of the fits that leave samples out."""

NOTICED = 0.3
"""Less of the latents than this would only be moved by chance."""

NEAR = 0.05
"""Weights that move no more of the latents than this are the shares, as far as anybody sees."""

WIDTH, ITERATIONS, BATCH, RATE = 32, 1500, 512, 5e-3


def own_start(
    generator: nn.Module,
    code: Code,
    samples: Tensor,
    *,
    method: str = "fitted",
    without: Collection[int] = (),
    seed: int = 0,
    latent_dim: int | None = None,
) -> nn.Module:
    """Return a target's own barycenter, for the arguments of `fit_weights`.

    Fitted, it has a gate, too, where samples ask for it. It shares the generator; where there is no
    gate, and the weights are next to the code's shares, it is the generator.
    """
    weights = fit_weights(
        generator, code, samples, method=method, without=without, seed=seed, latent_dim=latent_dim
    )
    shares = torch.tensor(code.shares, dtype=torch.float64)
    near = not without and (weights - shares).abs().sum().item() / 2 <= NEAR
    own = reweighted(generator, code, shares if near else weights, latent_dim=latent_dim)
    if method == "fitted":
        own.gate = fit_gate(own, samples, seed=seed, latent_dim=own.latent_dim)
    return generator if own.gate is None and near else own


def fit_gate(
    generator: nn.Module, samples: Tensor, *, seed: int = 0, latent_dim: int | None = None
) -> Gate | None:
    """Return the gate by which a generator makes what a few samples ask for; None if it does.

    Only of latents N(0, I), which a gate rolls and turns round.

    Parameters
    ----------
    generator : nn.Module
        Left alone.
    samples : Tensor
        A few real samples (n, ...), n >= 1, of the shape that it makes. One says nothing.
    seed : int
    latent_dim : int, optional
        For a generator without the attribute.
    """
    law, device = latents_of(generator, latent_dim), device_of(generator)
    if len(samples) == 1 or not law.plain:
        return None
    rng = torch.Generator().manual_seed(seed)
    z = law.draw(POOL, rng)
    few = samples.detach().to(device)
    with sampling(generator):
        pool = torch.cat([generator(part.to(device)) for part in z.split(1000)])
    centres = _clusters(pool.flatten(1), rng)
    cluster = _nearest(pool, centres)
    shares = _shares(cluster, len(centres))

    def widened(seen: Tensor) -> Tensor:
        if bool(seen.all()):
            bank = variation_bank(few, pool, size=WIDENED, seed=seed)
        else:
            some = pool[:COMPARED]
            bank = variation_bank(few[seen], some, near=100, step=8, size=WIDENED_LESS, seed=seed)
        return _shares(_nearest(bank, centres), len(centres))

    between, away = _distances(pool, cluster, few, len(centres))
    weights = shrunk(widened, between, away, shares, power=POWER, prior=PRIOR)
    if (weights - shares).abs().sum() / 2 <= NOTICED:
        return None
    ratio = torch.where(shares > 0, weights / shares, 0.0).clamp(max=math.exp(LOGS[1]))
    z = law.draw(LATENTS, rng)
    with sampling(generator):
        parts = [_nearest(generator(part.to(device)), centres) for part in z.split(1000)]
    return _learned(z.to(device), ratio[torch.cat(parts)].float().to(device), seed)


def _clusters(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Return centres (k, d) of rows (n, d), by Lloyd's algorithm from k of them."""
    centres = rows[torch.randperm(len(rows), generator=rng)[:CLUSTERS].to(rows.device)]
    for _ in range(LLOYD):
        near = torch.cdist(rows, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, near, rows)
        counts = near.bincount(minlength=len(centres)).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _nearest(samples: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(samples.flatten(1), centres).argmin(1).cpu()


def _shares(cluster: Tensor, k: int) -> Tensor:
    return cluster.bincount(minlength=k).double() / len(cluster)


def _distances(pool: Tensor, cluster: Tensor, few: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return mean distances between clusters (k, k), and of the few samples to them (n, k)."""
    rows, few = pool[:COMPARED].flatten(1).cpu(), few.flatten(1).cpu()
    inside = nn.functional.one_hot(cluster[: len(rows)], k).double()
    inside = inside / inside.sum(0).clamp(min=1)
    return (
        inside.T @ torch.cdist(rows, rows).double() @ inside,
        torch.cdist(few, rows).double() @ inside,
    )


def _learned(z: Tensor, ratio: Tensor, seed: int) -> Gate:
    """Learn a gate of latents (n, d) and how much likelier each is wanted (n,).

    E[ratio * softplus(-f) + softplus(f)] is least where exp f is the ratio.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(z.shape[1], WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        ).to(z.device)
    adam = torch.optim.Adam(network.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, ITERATIONS)
    rng = torch.Generator(z.device).manual_seed(seed)
    for _ in range(ITERATIONS):
        some = torch.randint(len(z), (BATCH,), generator=rng, device=z.device)
        wanted, logit = ratio[some], network(z[some]).squeeze(1)
        softplus = nn.functional.softplus
        loss = (wanted * softplus(-logit) + softplus(logit)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return Gate([torch.cat([x.weight, x.bias.unsqueeze(1)], 1) for x in linear])
