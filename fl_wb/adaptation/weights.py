"""Weights of a target's own barycenter, fitted to a few samples: no training.

Ours, but for the inverse radii (Dedeoglu et al., arXiv 2101.09225). A generator that learned K
measures by their code (`fl_wb.generators.code`) is a family of barycenters, one for each point w of
the simplex. How likely sum_k w_k mu_k makes a sample is linear in w, with a coefficient that the
cells of the sample's nearest neighbours say, so that the likeliest w is a convex programme's, which
needs no labels and no densities: of a mixture whose parts are known, by expectation maximisation
(Dempster, Laird and Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fl_wb.adaptation.likeness import doubt
from fl_wb.adaptation.samples import check_samples
from fl_wb.generators.code import Code
from fl_wb.generators.copies import copy_of, trainable_copy
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import device_of, in_batches, latents_of, sampling
from fl_wb.training.distillation import Distillation, distill, pairs_of
from fl_wb.transport import wasserstein1

WEIGHTS = ("fitted", "radius", "uniform", "shares")

CELL = 250
"""Samples of each cell, at most: more of them fitted no better."""

CELLS = 6400
"""Samples of all cells together, at most: all pairs with the few are compared."""

BYTES = 64 << 20
"""Of these samples, at most."""

NEAREST = 10
"""Samples of the cells that are compared with each of the few."""

PRIORS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""So many samples are imagined, beside the few, that are as the shares say."""

STRAYS = 0.02
"""Share of the few samples that any cell may have made."""

ROUNDS = 100
"""Of expectation maximisation."""

FOLDING = Distillation(1500, 128)

MANY = 1000
"""Of more samples to fit to, so many are drawn."""


def fit_weights(
    generator: nn.Module,
    code: Code,
    samples: Tensor,
    *,
    method: str = "fitted",
    without: Collection[int] = (),
    seed: int = 0,
    latent_dim: int | None = None,
) -> Tensor:
    """Return the weights of a generator's cells that suit a few samples best.

    Parameters
    ----------
    generator : nn.Module
        Learned from a mixture by this code; left alone.
    code : Code
        Its cells and their shares.
    samples : Tensor
        A few real samples (n, ...), n >= 1, of the shape that the generator makes.
    method : {"fitted", "radius", "uniform", "shares"}
        ``fitted``: the likeliest, shrunk towards the code's shares as far as makes each sample
        likely by the others; one sample says nothing.
        ``radius``: the paper's inverse radii, w_k in proportion to 1 / W1(mu_k, samples), exactly.
        ``uniform``: all equal. ``shares``: the code's own.
    without : collection of int
        Cells that get a weight of 0 by every method: sources to forget.
    seed : int
        Of the cells' samples.
    latent_dim : int, optional
        For a generator without the attribute.

    Returns
    -------
    Tensor
        Weights (K,) >= 0, of sum 1, in float64 on the CPU.

    Raises
    ------
    ValueError
        If there is no such method, there are no samples, or no such cells are to be forgotten, or
        all. As by `check_samples`, too, and TypeError, where the samples say anything.
    """
    if method not in WEIGHTS:
        raise ValueError(f"method={method!r} is not one of {', '.join(WEIGHTS)}")
    if not len(samples):
        raise ValueError("there are no samples to fit weights to: one at least is needed")
    if none := [k for k in without if not 0 <= k < len(code)]:
        raise ValueError(f"without={none} must be cells, from 0 to {len(code) - 1}")
    kept = torch.tensor([k not in without for k in range(len(code))])
    if not kept.any():
        raise ValueError(f"all {len(code)} cells are to be forgotten: none is left to sample")
    weights = torch.tensor(code.shares, dtype=torch.float64) * kept
    weights = weights / weights.sum() if without else weights
    if method == "uniform":
        return kept.double() / kept.sum()
    if method == "shares" or kept.sum() == 1:
        return weights
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=rng)[:MANY] if len(samples) > MANY else None
    cells = cell_samples(generator, code, rng, latent_dim)
    check_samples(samples, cells.flatten(0, 1))
    samples = samples if order is None else samples[order.to(samples.device)]
    cells = cells[kept].flatten(2)
    if method == "radius":
        few = samples.flatten(1)
        radii = torch.tensor([wasserstein1(cell, few) for cell in cells], dtype=torch.float64)
        inverse = 1 / radii.clamp(min=1e-12)
        weights[kept] = inverse / inverse.sum()
    else:
        few = samples.detach().flatten(1).cpu().float()
        weights[kept] = likeliest_weights(cells, few, weights[kept])
    return weights


def folded(generator: Reweighted, *, seed: int = 0) -> nn.Module:
    """Distil a reweighted generator into one of the architecture inside, whose weights say all.

    For those who know that architecture alone; where a `Reweighted` will do, it costs nothing. Its
    gate is left out: neighbouring latents become samples that are far apart, which no generator
    follows (measured).
    """
    student = trainable_copy(generator.generator).eval()
    if generator.weights.equal(generator.shares):
        return student
    teacher = copy_of(generator).eval()
    assert isinstance(teacher, Reweighted)
    teacher.gate = None
    distill(student, pairs_of(teacher, generator.latents), FOLDING, seed=seed)
    return student


def likeliest_weights(cells: Tensor, samples: Tensor, shares: Tensor) -> Tensor:
    """Return the weights (K,) by which a mixture of cells makes samples (n, d) likeliest, shrunk.

    Averaged over the shares themselves and `PRIORS`, by the likelihood of each sample given the
    others.

    Parameters
    ----------
    cells : Tensor
        Samples (K, m, d) of each.
    samples, shares : Tensor
        (n, d), and (K,) of sum 1.
    """
    n, (k, m, _) = len(samples), cells.shape
    if n == 1:
        return shares
    near = torch.cdist(samples, cells.flatten(0, 1)).topk(min(NEAREST, k * m), largest=False)
    closeness = (-(near.values / near.values[:, -1:].clamp(min=1e-12)).square()).exp().double()
    # how likely each cell makes each sample, but for a factor of the sample
    likely = torch.zeros(n, k, dtype=torch.float64).scatter_add_(1, near.indices // m, closeness)
    likely = likely / likely.sum(1, keepdim=True)
    likely = (likely + STRAYS / k) / (1 + STRAYS)
    found, likelihoods = [shares], [(likely @ shares).log().sum() + doubt(n)]
    for prior in PRIORS:
        weights = shares
        for _ in range(ROUNDS):
            part = weights * likely
            part = part / part.sum(1, keepdim=True)
            weights = (part.sum(0) + prior * shares) / (n + prior)
        others = (part.sum(0) - part + prior * shares) / (n - 1 + prior)
        likelihoods.append((others * likely).sum(1).log().sum())
        found.append(weights)
    return torch.stack(likelihoods).softmax(0) @ torch.stack(found)


@torch.no_grad()
def cell_samples(
    generator: nn.Module, code: Code, rng: torch.Generator, latent_dim: int | None = None
) -> Tensor:
    """Return equally many samples (K, m, ...) of each cell, on the CPU."""
    law, device, k = latents_of(generator, latent_dim), device_of(generator), len(code)
    with sampling(generator):
        size = generator(law.some(2).to(device))[0].numel()
        m = max(min(CELL, CELLS // k, BYTES // (4 * size * k)), 2)
        cell = torch.arange(k).repeat_interleave(m)
        z = code.embed(cell, law.draw(len(cell), rng), latents=law)
        parts = [generator(part.to(device)).cpu() for part in in_batches(z, 1000)]
    samples: Tensor = torch.cat(parts).float().unflatten(0, (k, m))
    return samples
