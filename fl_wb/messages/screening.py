"""Screening: which of several generators make samples unlike what most of the others make.

A generator with finite weights can still be useless or hostile: collapsed, inverted, noise. Its
samples then lie far from everybody else's, or all in one place, and to see that takes no labels
and no reference data, only the samples of all: by the sliced Wasserstein distance (Bonneel,
Rabin, Peyre, Pfister, JMIV 2015), and medians, which hold as long as fewer than half of the
generators are hostile, also if these agree among each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FEWEST = 4  # with three, no majority says who is far from whom
COLLAPSED = 4  # times less spread than is typical; one digit among sources of many has 0.6 of it
FLOOR = 0.1  # least scale of a coordinate, in units of the mean one


def outliers(
    samples: Sequence[Tensor], *, threshold: float, projections: int = 256, seed: int = 0
) -> list[tuple[int, str]]:
    """Return the sets that are unlike most of the others: (index, why), in the order given.

    A set is *far* if the median of its distances to all other sets is more than `threshold`
    times what is typical, the median of that over all sets. Every coordinate is first divided by
    its scale, so that those count in which most sets agree: sources of different classes are far
    from each other in an image's middle, noise and negatives are far from all in its margins.

    A set is *collapsed* if its samples' mean distance from their mean is `COLLAPSED` times less
    than is typical. Both tests are free of the data's own scale.

    Parameters
    ----------
    samples : sequence of Tensor
        One set (n, ...) of each generator, all of one shape.
    threshold : float
        What is further than this many times the typical is far; more than 1.
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
    rows = _rows(samples)
    distances = sliced_wasserstein(list(rows / _scale(rows)), projections=projections, seed=seed)
    others = ~torch.eye(len(rows), dtype=torch.bool)
    far = [statistics.median(distances[i, others[i]].tolist()) for i in range(len(rows))]
    spread = [(part - part.mean(dim=0)).norm(dim=1).mean().item() for part in rows]
    return list(_unlike(far, spread, threshold))


def _unlike(
    far: Sequence[float], spread: Sequence[float], threshold: float
) -> Iterator[tuple[int, str]]:
    typical_far, typical_spread = statistics.median(far), statistics.median(spread)
    for index, (distance, width) in enumerate(zip(far, spread, strict=True)):
        if distance > threshold * typical_far:
            times = distance / typical_far if typical_far else float("inf")
            yield (
                index,
                f"its samples are {times:.1f} times further from the others' than is typical",
            )
        elif COLLAPSED * width < typical_spread:
            share = width / typical_spread
            yield index, f"its samples have {share:.2f} of the spread that is typical"


def _scale(rows: Tensor) -> Tensor:
    """Return the typical scale of each coordinate: of sets (k, n, d), (d,).

    That is the median over the sets of the root mean square distance from the centre, which is
    the median of the sets' means, and `FLOOR` of its mean at least.
    """
    centre = rows.mean(dim=1).quantile(0.5, dim=0)
    scale = (rows - centre).square().mean(dim=1).sqrt().quantile(0.5, dim=0)
    floor = FLOOR * scale.mean()
    # Where most sets are one and the same point there is no scale, and none is needed.
    return scale.clamp(min=floor) if floor > 0 else torch.ones_like(scale)


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
    rows = _rows(samples)
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(rows.shape[2], projections, generator=rng, dtype=torch.float64)
    ordered = (rows @ (theta / theta.norm(dim=0))).sort(dim=1).values
    return torch.stack([(ordered - part).abs().mean(dim=(1, 2)) for part in ordered])


def _rows(samples: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(part.shape) for part in samples}
    if len(shapes) != 1:
        raise ValueError(f"sets of one shape are needed, not {sorted(shapes)}")
    return torch.stack([part.detach().cpu().flatten(1).double() for part in samples])
