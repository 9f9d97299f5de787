"""How far a generator's samples are from real ones, and whether they copy its training data.

No single figure can be trusted with a few hundred samples: W1 in pixels rewards blur, the Frechet
distance hardly punishes copies, KID is noisy below some 500 samples. Coverage and the energy
distance carry the verdict, with memorization always beside them.

Everything is computed on whole sets in closed form. torchmetrics' FID and KID agree where they
compute the same (a test compares them), but draw KID from random subsets, and take the root of a
product of covariances that is not symmetric, which loses digits where there are fewer samples than
features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_wb.features import Features, inception_features, train_features
from fl_wb.networks import generate
from fl_wb.transport import wasserstein1

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Evaluation",
    "Features",
    "compare",
    "coverage",
    "density",
    "energy_distance",
    "evaluate",
    "frechet_distance",
    "inception_features",
    "kernel_distance",
    "memorization",
    "train_features",
]

LOWER_IS_BETTER = ("w1", "frechet", "kid", "energy")
HIGHER_IS_BETTER = ("density", "coverage", "memorization")

NEIGHBOURS = 5  # Naeem et al. chose it; it must not differ between results that are compared
DRAWS = 20  # held-out sets that the memorization ratio is averaged over
ENTRIES = 1 << 22  # of a distance matrix held at a time: 32 MiB


@dataclass
class Evaluation:
    """How a target compares its generators with held-out samples.

    Attributes
    ----------
    samples
        That a generator draws; None: as many as are held out.
    draws
        Of so many samples, whose figures are averaged.
    bank
        Whether the raw variation bank, which needs no training, is evaluated too.
    snapshots
        How often the generator is evaluated during its adaptation, for a plot of convergence.
    """

    samples: int | None = None
    draws: int = 1
    bank: bool = False
    snapshots: int = 0


def evaluate(
    generator: nn.Module,
    samples: Tensor,
    *,
    few: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    n: int | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
) -> dict[str, float]:
    """Compare a generator with held-out real samples.

    Parameters
    ----------
    generator : nn.Module
        Maps latents (n, latent_dim) to samples.
    samples : Tensor
        Held-out real samples (m, ...). Some 300 or more, or the figures are mostly noise.
    few : Tensor, optional
        The few real samples (k, ...) that the generator was adapted to; needed for
        ``memorization``.
    features : callable, optional
        Maps samples (n, ...) to features (n, d), e.g. what `train_features` returns. Flattened
        samples if None.
    n : int, optional
        How many samples to generate; as many as there are real ones if None.
    seed : int
        Of the latents.
    latent_dim : int, optional
        For a generator without the attribute ``latent_dim``.

    Returns
    -------
    dict[str, float]
        As `compare` returns it.
    """
    count = len(samples) if n is None else n
    generated = generate(generator, count, seed=seed, latent_dim=latent_dim)
    return compare(generated, samples, few=few, features=features)


def compare(
    generated: Tensor,
    samples: Tensor,
    *,
    few: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Compare generated samples (n, ...) with held-out real ones (m, ...); see `evaluate`.

    Returns
    -------
    dict[str, float]
        ``w1``, ``energy``: exact Wasserstein-1 and unbiased energy distance of flattened samples;
        ``frechet``, ``kid``, ``density``, ``coverage``: of features; ``memorization``: nan without
        ``few``. Lower is better for the first four, higher for the last three (density and
        memorization are about 1 at best).

    Raises
    ------
    ValueError
        If a set is empty, shapes differ or values are not finite.
    """
    for name, tensor in (("generated", generated), ("real", samples), ("few", few)):
        if tensor is None:
            continue
        if len(tensor) == 0 or tensor.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"the {name} samples have shape {tuple(tensor.shape)}, the real ones "
                f"{tuple(samples.shape)}: all must be of one shape, and none empty"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} samples are not finite")
    x, y = _rows(generated), _rows(samples)
    fx, fy = (x, y) if features is None else (_rows(features(generated)), _rows(features(samples)))
    return {
        "w1": wasserstein1(x, y),
        "frechet": frechet_distance(fx, fy),
        "kid": kernel_distance(fx, fy),
        "energy": energy_distance(x, y),
        "density": density(fx, fy),
        "coverage": coverage(fx, fy),
        "memorization": math.nan if few is None else memorization(x, few, y),
    }


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of two sample sets.

    The means over pairs leave out a sample's distance to itself, so the estimate is unbiased, and
    may be a little below zero for samples of one distribution. nan if a set has fewer than two
    samples. Reference: Szekely and Rizzo, 2013.
    """
    x, y = _rows(x), _rows(y)
    cross = _map(x, y, lambda d: d.sum(1)).sum() / (len(x) * len(y))
    return float(2 * cross - _mean_of_pairs(x, _distances) - _mean_of_pairs(y, _distances))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance of the normal distributions fitted to features (n, d).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), with means m and unbiased covariances C. Also
    right where covariances are singular, as with fewer samples than features. One sample has
    covariance zero. Reference: Heusel et al., 2017.
    """
    (mean_x, root_x), (mean_y, root_y) = _moments(_rows(x)), _moments(_rows(y))
    # With C = R'R for both, the trace of (C_x C_y)^(1/2) is the sum of the singular values of R_x
    # R_y': no matrix root.
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    value = (
        (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross
    )
    return max(float(value), 0.0)  # equal sets may come out at -1e-15


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return KID, the unbiased MMD^2 of features (n, d) with the kernel (x'y / d + 1)^3.

    Reference: Binkowski et al., 2018. It may be a little below zero for samples of one
    distribution. nan if a set has fewer than two samples.
    """
    x, y = _rows(x), _rows(y)
    cross = _map(x, y, lambda k: k.sum(1), _kernel).sum() / (len(x) * len(y))
    return float(_mean_of_pairs(x, _kernel) + _mean_of_pairs(y, _kernel) - 2 * cross)


def density(generated: Tensor, samples: Tensor) -> float:
    """Return the density: how many real neighbourhoods a generated sample is in, over k.

    Reference: Naeem et al., 2020. The neighbourhood of a real sample reaches to its k-th (fifth)
    nearest real neighbour. About 1 for samples of the real distribution; more if they crowd where
    real samples are dense. nan if there is one real sample.
    """
    x, y = _rows(generated), _rows(samples)
    radii, k = _radii(y)
    return float(_map(x, y, lambda d: (d <= radii).sum(1)).sum() / (k * len(x))) if k else math.nan


def coverage(generated: Tensor, samples: Tensor) -> float:
    """Return the coverage: the share of real neighbourhoods that hold a generated sample.

    Reference and neighbourhoods as for `density`. In [0, 1]. It needs some 300 samples of each, and
    grows with the number of generated ones. nan if there is one real sample.
    """
    x, y = _rows(generated), _rows(samples)
    radii, k = _radii(y)
    return float((_map(y, x, lambda d: d.amin(1)) <= radii).double().mean()) if k else math.nan


def memorization(generated: Tensor, few: Tensor, samples: Tensor) -> float:
    """Return how near generated samples are to the few of training, relative to unseen ones.

    The mean distance of a generated sample to its nearest of the ``few``, over the same for equally
    many of the held-out ``samples``, averaged over fixed random choices of these. About 1 if
    nothing was memorised, 0 for copies. nan where even the held-out samples are copied.
    """
    x, few, y = _rows(generated), _rows(few), _rows(samples)
    size = min(len(few), len(y))  # equally many on both sides, or the larger set would be nearer
    rng = torch.Generator().manual_seed(0)
    few_sets = [torch.randperm(len(few), generator=rng)[:size] for _ in range(DRAWS)]
    other_sets = [torch.randperm(len(y), generator=rng)[:size] for _ in range(DRAWS)]
    seen = _map(x, few, lambda d: torch.stack([d[:, s].amin(1) for s in few_sets], 1)).mean()
    unseen = _map(x, y, lambda d: torch.stack([d[:, s].amin(1) for s in other_sets], 1)).mean()
    return float(seen / unseen) if unseen > 0 else math.nan


def _rows(samples: Tensor) -> Tensor:
    # float64, because distances of near-equal samples lose half of the digits.
    return samples.detach().cpu().double().reshape(len(samples), -1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _map(
    x: Tensor,
    y: Tensor,
    reduce: Callable[[Tensor], Tensor],
    pairs: Callable[[Tensor, Tensor], Tensor] = _distances,
) -> Tensor:
    """Reduce the (n, m) matrix of ``pairs`` along m, never holding all of it."""
    return torch.cat([reduce(pairs(part, y)) for part in x.split(max(ENTRIES // len(y), 1))])


def _mean_of_pairs(x: Tensor, pairs: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of pairs(x_i, x_j) over i != j."""
    if len(x) < 2:
        return math.nan
    total, step = 0.0, max(ENTRIES // len(x), 1)
    for start in range(0, len(x), step):
        block = pairs(x[start : start + step], x)
        block.diagonal(start).zero_()
        total += float(block.sum())
    return total / (len(x) * (len(x) - 1))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and a root R (min(n, d), d) of the covariance R'R."""
    mean = x.mean(0)
    root = torch.linalg.qr((x - mean) / math.sqrt(max(len(x) - 1, 1)), mode="r").R
    return mean, root


def _radii(samples: Tensor) -> tuple[Tensor, int]:
    """Distance (m,) of each sample to its k-th nearest other, and k: NEIGHBOURS or all others."""
    k = min(NEIGHBOURS, len(samples) - 1)
    return _map(samples, samples, lambda d: d.kthvalue(k + 1).values), k
