"""How far a few samples bear out the generator from which an adaptation starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_wb.picks import spread_out
from fl_wb.transport import energy_distance

COMPARED = 1000
"""Of a generator's samples, where all pairs are compared: more would cost seconds."""

ANCHOR = 5.0
"""Weight of the anchor up to `ANCHORED` samples, where the start fits them."""

ANCHORED = 100
"""The anchor weighs less with more samples than these, as a prior does beside more data."""

STRANGE = 3.0
"""A start fits unless so many times more of its samples are far from the few than by chance."""

JUDGED = 100
"""Of so many samples or more, one in `FOLD` is left out, to judge by.

Of fewer, each is worth more as a sample to learn from, and those left out can mislead.
"""

FOLD = 10


def leave_out(samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return samples to learn from and, on the CPU, up to `COMPARED` of others to judge by."""
    out = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    out[spread_out(len(samples), len(samples) // FOLD, seed)] = True
    return samples[~out], samples[out][:COMPARED].cpu()


def choose_anchor(pool: Tensor, samples: Tensor) -> float:
    """Weight of the anchor where the start already fits the few samples, else 0.

    It fits if ED(pool, samples) is below 3% of the samples' mean pairwise distance (measured: 0
    to 0.8% for a target of the sources' classes, 9 to 16% for one of other classes), or no
    larger than for equally many of the start's own samples in nine of ten draws: with very few,
    chance alone makes more of it. And not more than `STRANGE` times as many of its samples are far
    from all of the few as there are from equally many of its own: a target that has some of the
    start's classes has its samples where the start has, but leaves much of that empty (measured:
    as many as by chance for all ten classes, 1.6 times for eight, 3.4 to 4.3 for four or six).
    """
    flat = samples.flatten(1)
    spread = torch.pdist(flat).mean().item() if len(samples) > 1 else 0.0
    some, rest = pool.tensor_split([min(COMPARED, len(pool) // 2)])
    whole = max(len(rest) // len(samples), 1)  # a last one of a few samples is far by chance
    draws = rest.split(len(samples))[: min(whole, 20)]
    distances = torch.stack([energy_distance(some, draw) for draw in draws])
    chance = distances.quantile(0.9).item()  # the largest of them is often an outlier's
    if energy_distance(some, samples).item() > max(0.03 * spread, chance):
        return 0.0
    strangers = torch.stack([_far(some, draw) for draw in draws]).mean().item()
    if _far(some, samples).item() > STRANGE * strangers:
        return 0.0
    return ANCHOR * min(1.0, ANCHORED / len(samples))


def worse(made: Tensor, before: Tensor, unseen: Tensor) -> bool:
    """Whether samples are farther from unseen ones than before, by two standard errors."""
    unseen = unseen.flatten(1)
    away, was = (torch.cdist(unseen, x.flatten(1)).mean(1) for x in (made, before))
    error = 2 * (away - was).std() / len(unseen) ** 0.5
    lost = energy_distance(made, unseen) - energy_distance(before, unseen)
    return bool(lost > 2 * error)


def _far(made: Tensor, few: Tensor) -> Tensor:
    """Return the share of `made` that is farther from all of the few than nine in ten of these."""
    if len(few) < 2:
        return torch.zeros(())
    few = few.flatten(1)
    among = torch.cdist(few, few).fill_diagonal_(torch.inf).amin(1).quantile(0.9)
    return (torch.cdist(made.flatten(1), few).amin(1) > among).float().mean().cpu()
