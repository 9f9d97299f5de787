"""Screening: which of several generators make samples far from what most of the others make.

A generator with finite weights can still be useless or hostile: collapsed, inverted, noise. Its
samples then lie far from everybody else's, in a distance that needs no labels and no reference
data: the sliced Wasserstein distance (Bonneel, Rabin, Peyre, Pfister, JMIV 2015).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 4  # with three, no majority says who is far from whom


def outliers(
    samples: Sequence[Tensor], *, threshold: float, projections: int = 256, seed: int = 0
) -> list[tuple[int, float]]:
    """Return the sets that are too far from the others: (index, how far), in the order given.

    How far a set is: the median of its distances to all other sets, divided by the median of
    that over all sets. Both medians hold as long as fewer than half of the sets are hostile,
    also if these agree among each other. One is typical, whatever the scale of the data.

    Parameters
    ----------
    samples : sequence of Tensor
        One set (n, ...) of each generator, all of one shape.
    threshold : float
        What is further than this is an outlier; more than 1.
    projections : int
        Random directions of the sliced distance.
    seed : int
        Of the directions.

    Raises
    ------
    ValueError
        If the sets differ in shape, or the threshold would flag the typical.
    """
    if not threshold > 1:
        raise ValueError(f"threshold={threshold} must be more than 1: typical sets have 1")
    if len(samples) < FEWEST:
        return []
    distances = sliced_wasserstein(samples, projections=projections, seed=seed)
    typical = [
        statistics.median(distances[i, j].item() for j in range(len(samples)) if j != i)
        for i in range(len(samples))
    ]
    scale = statistics.median(typical)
    if scale == 0:  # most sets are the same: whatever differs is infinitely far
        return [(i, float("inf")) for i, value in enumerate(typical) if value > 0]
    return [(i, value / scale) for i, value in enumerate(typical) if value > threshold * scale]


def sliced_wasserstein(
    samples: Sequence[Tensor], *, projections: int = 256, seed: int = 0
) -> Tensor:
    """Return the sliced W1 distances (k, k) of k sets of equally many samples.

    SW1(mu, nu) is the mean over directions theta of W1 of the projections <theta, x>, which on
    the line is the mean difference of the sorted values.

    Parameters
    ----------
    samples : sequence of Tensor
        Sets (n, ...) of one shape; flattened to rows.
    projections : int
        Random directions, uniform on the sphere.
    seed : int
        Of the directions.

    Raises
    ------
    ValueError
        If the sets differ in shape.
    """
    shapes = {tuple(part.shape) for part in samples}
    if len(shapes) != 1:
        raise ValueError(f"sets of one shape are needed, not {sorted(shapes)}")
    rows = torch.stack([part.detach().cpu().flatten(1).double() for part in samples])
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(rows.shape[2], projections, generator=rng, dtype=torch.float64)
    ordered = (rows @ (theta / theta.norm(dim=0))).sort(dim=1).values
    return torch.stack([(ordered - part).abs().mean(dim=(1, 2)) for part in ordered])
