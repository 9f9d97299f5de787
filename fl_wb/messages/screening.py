"""Screening: which of several generators make samples unlike what most of the others make.

A generator with finite weights can still be useless or hostile: collapsed, inverted, noise, dimmed,
with a mark on its samples. To see that takes no labels and no reference data, only the samples of
all: by the sliced Wasserstein distance (Bonneel, Rabin, Peyre, Pfister, JMIV 2015), the
distribution of a sample's own values, and medians, which hold as long as fewer than half of the
generators are hostile, also if these agree among each other. The time is linear in their number.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FEWEST = 4  # with three, no majority says who is far from whom
COLLAPSED = 4  # times less spread than is typical; one digit among sources of many has 0.6 of it
REFERENCES = 32  # sets that each is compared with; of more hostile than honest with no luck at all
VALUES = 2.5  # thresholds; real digits of one class have 6 times what is typical, see hostile.py
FLOOR = 0.1  # least scale of a coordinate, in units of the mean one


def outliers(
    samples: Sequence[Tensor], *, threshold: float, projections: int = 256, seed: int = 0
) -> list[tuple[int, str]]:
    """Return the sets that are unlike most of the others: (index, why), in the order given.

    A set is *far* if the median of its distances to the others is more than `threshold` times
    what is typical, the median of that over all sets; of many others, `REFERENCES` drawn at random
    stand for all. Every coordinate is first divided by its scale, so that those count in which most
    sets agree: sources of different classes are far from each other in an image's middle, noise and
    negatives are far from all in its margins.

    A set is *collapsed* if its samples' mean distance from their mean is `COLLAPSED` times less
    than is typical.

    A set has *other values* if a sample's own coordinates, sorted and averaged over the set, are
    more than `VALUES` thresholds further from those that are typical than is typical. Whatever an
    image shows, it has about so much ink and so dark: half the ink, or a mark on most samples of a
    set, is not far in any direction, but it is in this. All three are free of the data's own scale.

    Parameters
    ----------
    samples : sequence of Tensor
        One set (n, ...) of each generator, all of one shape.
    threshold : float
        What is further than this many times the typical is far; more than 1.
    projections, seed : int
        Random directions of the sliced distance, and their seed.

    Raises
    ------
    ValueError
        If the sets differ in shape, or the threshold would flag the typical.
    """
    if not threshold > 1:
        raise ValueError(f"threshold={threshold} must be more than 1: typical sets have 1")
    finite = [k for k, part in enumerate(samples) if part.isfinite().all()]
    if len(finite) < len(samples):  # one nan would be in every set's scale
        others = [samples[k] for k in finite]
        found = outliers(others, threshold=threshold, projections=projections, seed=seed)
        strange = set(range(len(samples))) - set(finite)
        why = {k: "its samples are not finite" for k in strange}
        return sorted((why | {finite[k]: text for k, text in found}).items())
    if len(samples) < FEWEST:
        return []
    _check_shapes(samples)
    scale = _scale(samples)
    theta = _directions(len(scale), projections, seed) / scale[:, None]
    ordered = torch.stack([(_rows(part) @ theta).sort(dim=0).values.float() for part in samples])
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    references = drawn[:REFERENCES].tolist()
    far = []
    for index, part in enumerate(ordered):
        distances = [(part - ordered[k]).abs().mean().item() for k in references if k != index]
        far.append(statistics.median(distances))
    spread = [_spread(_rows(part)) for part in samples]
    values = torch.stack([_rows(part).sort(dim=1).values.mean(dim=0) for part in samples])
    other = (values - values.quantile(0.5, dim=0)).abs().mean(dim=1).tolist()
    return list(_unlike(far, spread, other, threshold))


def _unlike(
    far: Sequence[float], spread: Sequence[float], other: Sequence[float], threshold: float
) -> Iterator[tuple[int, str]]:
    typical_far, typical_spread, typical_other = map(statistics.median, (far, spread, other))
    for index, (distance, width, value) in enumerate(zip(far, spread, other, strict=True)):
        if distance > threshold * typical_far:
            times = distance / typical_far if typical_far else float("inf")
            yield (
                index,
                f"its samples are {times:.1f} times further from the others' than is typical",
            )
        elif COLLAPSED * width < typical_spread:
            share = width / typical_spread
            yield index, f"its samples have {share:.2f} of the spread that is typical"
        elif value > VALUES * threshold * typical_other:
            times = value / typical_other if typical_other else float("inf")
            yield index, f"its samples' values differ {times:.1f} times more than is typical"


def _spread(rows: Tensor) -> float:
    return float((rows - rows.mean(dim=0)).norm(dim=1).mean())


def _scale(samples: Sequence[Tensor]) -> Tensor:
    """Return the typical scale (d,) of each coordinate.

    That is the median over the sets of the root mean square distance from the centre, which is
    the median of the sets' means, and `FLOOR` of its mean at least.
    """
    centre = torch.stack([_rows(part).mean(dim=0) for part in samples]).quantile(0.5, dim=0)
    each = torch.stack([(_rows(part) - centre).square().mean(dim=0).sqrt() for part in samples])
    scale = each.quantile(0.5, dim=0)
    floor = FLOOR * scale.mean()
    # Where most sets are one and the same point there is no scale, and none is needed.
    return scale.clamp(min=floor) if floor > 0 else torch.ones_like(scale)


def _directions(dimension: int, number: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(dimension, number, generator=rng, dtype=torch.float64)
    norms: Tensor = theta.norm(dim=0)
    return theta / norms


def _rows(part: Tensor) -> Tensor:
    return part.detach().cpu().flatten(1).double()


def _check_shapes(samples: Sequence[Tensor]) -> None:
    shapes = {tuple(part.shape) for part in samples}
    if len(shapes) != 1:
        raise ValueError(f"sets of one shape are needed, not {sorted(shapes)}")
