"""Weights of a target's own barycenter, fitted to a few samples: no training.

Ours, but for the inverse radii (Dedeoglu et al., arXiv 2101.09225). A generator that learned K
measures by their code (`fl_wb.generators.code`) is a family of barycenters, one for each point w of
the simplex. The energy distance of sum_k w_k mu_k and the samples Y is a squared norm,
||sum_k w_k mu_k - Y||^2 with <mu, nu> = -E|X - X'| (Sejdinovic et al., "Equivalence of
distance-based and RKHS-based statistics in hypothesis testing", Annals of Statistics, 2013), so
that the best w is the point of the measures' hull that is nearest to Y: a convex programme.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

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
"""Samples of all cells together, at most: all pairs are compared."""

BYTES = 64 << 20
"""Of these samples, at most."""

FOLDS = 10
"""In which samples are left out, to see how much of a fit to the others they bear out."""

PRIOR = 40
"""Of n samples, PRIOR / n more are imagined that are the shares' own: a few say too little."""

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
        ``fitted``: least energy distance, shrunk towards the code's shares as samples that were
        left out ask for; one sample says nothing.
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
        If there is no such method, there are no samples, or all cells are to be forgotten.
    """
    if method not in WEIGHTS:
        raise ValueError(f"method={method!r} is not one of {', '.join(WEIGHTS)}")
    if not len(samples):
        raise ValueError("there are no samples to fit weights to: one at least is needed")
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
    if len(samples) > MANY:
        samples = samples[torch.randperm(len(samples), generator=rng)[:MANY].to(samples.device)]
    cells = cell_samples(generator, code, rng, latent_dim)[kept]
    if method == "radius":
        few = samples.flatten(1)
        radii = torch.tensor([wasserstein1(cell, few) for cell in cells], dtype=torch.float64)
        inverse = 1 / radii.clamp(min=1e-12)
        weights[kept] = inverse / inverse.sum()
    else:
        few = samples.detach().flatten(1).cpu().float()
        weights[kept] = nearest_weights(cells, few, weights[kept])
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


def nearest_weights(cells: Tensor, samples: Tensor, shares: Tensor) -> Tensor:
    """Return the weights (K,) of least energy distance to samples (n, d), shrunk.

    Parameters
    ----------
    cells : Tensor
        Samples (K, m, d) of each.
    samples, shares : Tensor
        (n, d), and (K,) of sum 1.
    """
    if len(samples) == 1:
        return shares
    k, m, _ = cells.shape
    rows = cells.flatten(0, 1)
    between = torch.cdist(rows, rows).view(k, m, k, m).mean((1, 3), dtype=torch.float64)
    away = torch.cdist(samples, rows).view(len(samples), k, m).mean(2, dtype=torch.float64)
    within = torch.cdist(samples, samples).double()

    def fitted(seen: Tensor) -> Tensor:
        return _nearest(between, away[seen].mean(0), within[seen][:, seen].mean())

    return shrunk(fitted, between, away, shares)


def shrunk(
    fitted: Callable[[Tensor], Tensor],
    between: Tensor,
    away: Tensor,
    shares: Tensor,
    *,
    power: int = 2,
    prior: int = PRIOR,
) -> Tensor:
    """Return weights (K,) that were fitted to samples, put back to the shares as these ask for.

    By a power of the part of the way back that serves samples best which a fit has not seen. The
    energy distance is quadratic in that part, so that it has a closed form; by the part itself,
    what of strangers comes back costs more (measured) than it insures.

    Parameters
    ----------
    fitted : callable
        The weights (K,) fitted to some of the samples: those of a mask (n,).
    between, away : Tensor
        Mean distances between cells (K, K), and from each sample to each cell (n, K).
    shares : Tensor
        (K,) of sum 1.
    power : int
        See above.
    prior : int
        See `PRIOR`.
    """
    fold = torch.arange(len(away)) % FOLDS
    imagined = prior / len(away) ** 2
    slope = curvature = 0.0
    for left_out in fold.unique():
        weights = fitted(fold != left_out)
        back, unseen = shares - weights, away[fold == left_out]
        apart = -(back @ between @ back).item()
        slope += ((between @ weights - unseen) @ back).sum().item() + imagined * len(unseen) * apart
        curvature += (1 + imagined) * len(unseen) * apart
    part = min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    return torch.lerp(fitted(fold >= 0), shares, part**power)


@torch.no_grad()
def cell_samples(
    generator: nn.Module, code: Code, rng: torch.Generator, latent_dim: int | None = None
) -> Tensor:
    """Return equally many samples (K, m, d) of each cell, on the CPU."""
    law, device, k = latents_of(generator, latent_dim), device_of(generator), len(code)
    with sampling(generator):
        size = generator(law.some(2).to(device))[0].numel()
        m = max(min(CELL, CELLS // k, BYTES // (4 * size * k)), 2)
        cell = torch.arange(k).repeat_interleave(m)
        z = code.embed(cell, law.draw(len(cell), rng), latents=law)
        parts = [generator(part.to(device)).flatten(1).cpu() for part in in_batches(z, 1000)]
    return torch.cat(parts).float().view(k, m, -1)


def _nearest(between: Tensor, away: Tensor, within: Tensor) -> Tensor:
    """Return the weights of the point of the hull that is nearest to the samples.

    The least w'Qw on the simplex, Q the products <mu_k - Y, mu_l - Y>, is up to its sum the least
    w'Qw + (sum w - 1)^2 of w >= 0 (Lawson and Hanson, "Solving Least Squares Problems", 1974).
    """
    products = away.unsqueeze(1) + away - between - within
    values, vectors = torch.linalg.eigh(products)
    root = (values.clamp(min=0).sqrt() * vectors).T
    system = torch.cat([root, torch.ones(1, len(away), dtype=root.dtype)]).numpy()
    found = torch.from_numpy(nnls(system, np.eye(len(system))[-1])[0])
    return found / found.sum()
