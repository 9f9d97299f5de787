"""Sample sets and sums over their pairs, for the metrics; a matrix of pairs is never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

NEIGHBOURS = 5  # Naeem et al. chose it; it must not differ between results that are compared
ENTRIES = 1 << 22  # of a distance matrix held at a time: 32 MiB


class SampleSet:
    """Samples as rows of float64, and what is needed of them again and again."""

    def __init__(self, samples: Tensor) -> None:
        self.rows = rows_of(samples)

    @cached_property
    def distance(self) -> float:
        """Mean distance of two of them."""
        return _mean_of_pairs(self.rows, distances)

    @cached_property
    def kernel(self) -> float:
        """Mean of KID's kernel of two of them."""
        return _mean_of_pairs(self.rows, kid_kernel)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and a root R (min(n, d), d) of the covariance R'R."""
        mean, scale = self.rows.mean(0), math.sqrt(max(len(self.rows) - 1, 1))
        return mean, torch.linalg.qr((self.rows - mean) / scale, mode="r").R

    @cached_property
    def radii(self) -> tuple[Tensor, int]:
        """Distance (n,) of each to its k-th nearest other, and k: NEIGHBOURS or all others."""
        k = min(NEIGHBOURS, len(self.rows) - 1)
        return over_pairs(self.rows, self.rows, lambda d: d.kthvalue(k + 1).values), k


Samples = Tensor | SampleSet


def as_set(samples: Samples) -> SampleSet:
    """Return the set of samples, which may be one already."""
    return samples if isinstance(samples, SampleSet) else SampleSet(samples)


def rows_of(samples: Tensor) -> Tensor:
    """Flatten samples to rows of float64: distances of near-equal ones lose half of the digits."""
    return samples.detach().cpu().double().reshape(len(samples), -1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (n, m) of rows."""
    return torch.cdist(x, y)


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (n, m) of rows (Binkowski et al., 2018)."""
    return (x @ y.T / x.shape[1] + 1).pow(3)


def over_pairs(
    x: Tensor,
    y: Tensor,
    reduce: Callable[[Tensor], Tensor],
    pairs: Callable[[Tensor, Tensor], Tensor] = distances,
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
