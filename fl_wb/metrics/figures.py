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

import torch
from torch import Tensor, nn

from fl_wb.generators.latents import Draw
from fl_wb.generators.sampling import Labels, check_real, driven, generate, generate_rows
from fl_wb.metrics.features import Features
from fl_wb.metrics.sample_sets import Samples, SampleSet, as_set, kid_kernel, over_pairs, rows_of
from fl_wb.transport import wasserstein1

LOWER_IS_BETTER = ("w1", "frechet", "kid", "energy")
HIGHER_IS_BETTER = ("density", "coverage", "memorization", RIGHT := "right-labels", "accuracy")

DRAWS = 20  # held-out sets that the memorization ratio is averaged over


def evaluate(
    generator: nn.Module,
    samples: Tensor,
    *,
    few: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    n: int | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    labels: Labels = None,
    latents: str | Draw = "normal",
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
    labels, latents : optional
        As in `fl_wb.generators.sampling.generate`.

    Returns
    -------
    dict[str, float]
        As `compare` returns it.
    """
    generator = driven(generator, latent_dim, labels, latents)
    made = generate(generator, 2, seed=seed, latent_dim=latent_dim)
    for name, real in (("real", samples), ("few", few)):
        if real is not None:
            check_real(real, made, f"the {name} samples")
    count = len(samples) if n is None else n
    rows, generated = generate_rows(generator, count, seed=seed, latent_dim=latent_dim)
    wanted = None if labels is None else rows[:, -1].long()
    return compare(generated, samples, few=few, features=features, labels=wanted)


def compare(
    generated: Tensor,
    samples: Tensor,
    *,
    few: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
) -> dict[str, float]:
    """Compare generated samples (n, ...) with held-out real ones (m, ...); see `evaluate`.

    Those of a conditional generator have ``labels`` (n,), the ones that it was asked for.

    Returns
    -------
    dict[str, float]
        ``w1``, ``energy``: exact Wasserstein-1 and unbiased energy distance of flattened samples;
        ``frechet``, ``kid``, ``density``, ``coverage``: of features; ``memorization``: nan without
        ``few``. Lower is better for the first four, higher for the last three (density and
        memorization are about 1 at best). Where there are labels, and features of a classifier
        (`train_features`), ``right-labels``: the share that it takes for what was asked for.

    Raises
    ------
    ValueError
        If a set is empty, shapes differ or values are not finite.
    """
    return Reference(samples, few=few, features=features).compare(generated, labels)


class Reference:
    """Held-out real samples (m, ...) that several sets are compared with.

    What a comparison needs of the real samples alone is computed once. The arguments are those of
    `evaluate`.

    Raises
    ------
    ValueError
        As `compare`.
    """

    def __init__(
        self,
        samples: Tensor,
        *,
        few: Tensor | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._shape, self._few, self._map = samples.shape, few, features
        self._check("real", samples)
        if few is not None:
            self._check("few", few)
        self._real = SampleSet(samples)
        self._features = self._features_of(samples, self._real)

    def compare(self, generated: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Compare generated samples (n, ...) with the real ones; see `compare`."""
        self._check("generated", generated)
        x, y = SampleSet(generated), self._real
        fx, fy = self._features_of(generated, x), self._features
        figures = {
            "w1": wasserstein1(x.rows, y.rows),
            "frechet": frechet_distance(fx, fy),
            "kid": kernel_distance(fx, fy),
            "energy": energy_distance(x, y),
            "density": density(fx, fy),
            "coverage": coverage(fx, fy),
            "memorization": math.nan if self._few is None else memorization(x, self._few, y),
        }
        if labels is not None and isinstance(self._map, Features) and self._map.classifies:
            right = self._map.classify(generated) == labels.cpu()
            figures[RIGHT] = float(right.double().mean())
        return figures

    def _features_of(self, samples: Tensor, flattened: SampleSet) -> SampleSet:
        return flattened if self._map is None else SampleSet(self._map(samples))

    def _check(self, name: str, samples: Tensor) -> None:
        if len(samples) == 0 or samples.shape[1:] != self._shape[1:]:
            raise ValueError(
                f"the {name} samples have shape {tuple(samples.shape)}, the real ones "
                f"{tuple(self._shape)}: all must be of one shape, and none empty"
            )
        if not bool(torch.isfinite(samples).all()):
            raise ValueError(f"the {name} samples are not finite")


def energy_distance(x: Samples, y: Samples) -> float:
    """Return the energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of two sample sets.

    The means over pairs leave out a sample's distance to itself, so the estimate is unbiased, and
    may be a little below zero for samples of one distribution. nan if a set has fewer than two
    samples. Reference: Szekely and Rizzo, 2013.
    """
    x, y = as_set(x), as_set(y)
    cross = over_pairs(x.rows, y.rows, lambda d: d.mean(1)).mean()
    return float(2 * cross - x.distance - y.distance)


def frechet_distance(x: Samples, y: Samples) -> float:
    """Return the Frechet distance of the normal distributions fitted to features (n, d).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), with means m and unbiased covariances C. Also
    right where covariances are singular, as with fewer samples than features. One sample has
    covariance zero. Reference: Heusel et al., 2017.
    """
    (mean_x, root_x), (mean_y, root_y) = as_set(x).moments, as_set(y).moments
    # With C = R'R for both, the trace of (C_x C_y)^(1/2) is the sum of the singular values of R_x
    # R_y': no matrix root.
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    value = (
        (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross
    )
    return max(float(value), 0.0)  # equal sets may come out at -1e-15


def kernel_distance(x: Samples, y: Samples) -> float:
    """Return KID, the unbiased MMD^2 of features (n, d) with the kernel (x'y / d + 1)^3.

    Reference: Binkowski et al., 2018. It may be a little below zero for samples of one
    distribution. nan if a set has fewer than two samples.
    """
    x, y = as_set(x), as_set(y)
    cross = over_pairs(x.rows, y.rows, lambda k: k.mean(1), kid_kernel).mean()
    return float(x.kernel + y.kernel - 2 * cross)


def density(generated: Samples, samples: Samples) -> float:
    """Return the density: how many real neighbourhoods a generated sample is in, over k.

    Reference: Naeem et al., 2020. The neighbourhood of a real sample reaches to its k-th (fifth)
    nearest real neighbour. About 1 for samples of the real distribution; more if they crowd where
    real samples are dense. nan if there is one real sample.
    """
    x, y = as_set(generated).rows, as_set(samples)
    radii, k = y.radii
    inside = over_pairs(x, y.rows, lambda d: (d <= radii).sum(1)).sum()
    return float(inside / (k * len(x))) if k else math.nan


def coverage(generated: Samples, samples: Samples) -> float:
    """Return the coverage: the share of real neighbourhoods that hold a generated sample.

    Reference and neighbourhoods as for `density`. In [0, 1]. It needs some 300 samples of each, and
    grows with the number of generated ones. nan if there is one real sample.
    """
    x, y = as_set(generated).rows, as_set(samples)
    radii, k = y.radii
    nearest = over_pairs(y.rows, x, lambda d: d.amin(1))
    return float((nearest <= radii).double().mean()) if k else math.nan


def memorization(generated: Samples, few: Tensor, samples: Samples) -> float:
    """Return how near generated samples are to the few of training, relative to unseen ones.

    The mean distance of a generated sample to its nearest of the ``few``, over the same for equally
    many of the held-out ``samples``, averaged over fixed random choices of these. About 1 if
    nothing was memorised, 0 for copies. nan where even the held-out samples are copied.
    """
    x, few, y = as_set(generated).rows, rows_of(few), as_set(samples).rows
    size = min(len(few), len(y))  # equally many on both sides, or the larger set would be nearer
    rng = torch.Generator().manual_seed(0)
    few_sets = [torch.randperm(len(few), generator=rng)[:size] for _ in range(DRAWS)]
    other_sets = [torch.randperm(len(y), generator=rng)[:size] for _ in range(DRAWS)]

    def nearest(real: Tensor, sets: list[Tensor]) -> Tensor:
        return over_pairs(x, real, lambda d: torch.stack([d[:, s].amin(1) for s in sets], 1)).mean()

    seen, unseen = nearest(few, few_sets), nearest(y, other_sets)
    return float(seen / unseen) if unseen > 0 else math.nan
