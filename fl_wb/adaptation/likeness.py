"""How much likelier than a generator a target makes each of the generator's samples.

Ours. A few samples say little of where others are, but much by the shape of what the generator
makes: from each of them a random walk goes from one of the generator's samples to one of its
nearest, and so spreads over what is alike before it comes to what is not, as in label propagation
(Zhu and Ghahramani, "Learning from labeled and unlabeled data with label propagation", 2002). How
far it goes, and how sharply near and far are parted then, the few samples say themselves: by how
likely it makes each of them from where the others start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fl_wb.picks import spread_out

WALKED = 2000
"""Of a generator's samples, where all pairs are compared."""

OWN, DRAWS = 1000, 200
"""Of a generator's samples, that say how far these are from each other; and draws of them."""

STRANGE = 1.7
"""Measured, of digits, 6 to 100 samples and 8,000 of a generator: 1.1 to 1.6 times as far where it
has their classes, 1.9 to 2.1 times where it has none of them."""

STARTS = 300
"""Of the few samples, from which walks start."""

NEAREST, FIRST = 10, 20
"""Neighbours to which a step goes, and the first one, from a sample that is none of these."""

ALIKE = 3
"""Samples of the walks whose ratios any other has."""

DOUBLINGS = 8
"""Walks of 1, 2, 4, ... steps."""

SHARPER = tuple((level, power) for level in (1, 2, 4) for power in (2, 4))
"""(m, p): where a walk comes r times as often as by chance, r^p / (r^p + m^p) is likely."""

CERTAIN = 2.5
"""Power of what the walks say: what they hardly reach is mostly something else."""

BALANCING = 10
"""Rounds that give each of the few samples its share again, which certainty takes from some."""

DOUBT, FEW = 5.0, 300.0
"""The generator's own shares count as if so much more likely, in log, and of n samples by FEW / n^2
more: of ten or fewer, some are alike by chance. With 6 in all for ten samples of a class, which was
all that a generator made, four of twenty targets got a gate."""

STRAYS = 0.05
"""Share of the few samples that may be anything: the likelihood of none is 0."""

BLUR = 0.05
"""Deviation of the Gaussian through which images are compared, of their side: the same stroke
elsewhere by a pixel of many is far by its pixels. Digits of 8x8 hardly see it, MNIST's do."""


def likeness(made: Tensor, few: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how many times likelier a target makes a sample than the generator does.

    Averaged over what the walks may be, by likelihoods of each of the few samples given the others;
    1 everywhere is one of these, and is what one sample alone says.

    Parameters
    ----------
    made : Tensor
        Samples (N, ...) of the generator, of which the first `WALKED` are used.
    few : Tensor
        A few real samples (n, ...).

    Returns
    -------
    callable
        Maps the generator's samples (m, ...) to ratios (m,) >= 0, in float64 on the CPU.
    """
    rows, few = _rows(made[:WALKED]), _rows(few)
    if len(few) > STARTS:
        few = few[spread_out(len(few), STARTS)]
    n, steps = len(few), _steps(rows)
    first = _towards(few, rows, FIRST)
    starts = torch.cat([len(rows) * first, _towards(rows, rows, FIRST + 1, without=1).sum(0, True)])
    found, likelihoods = [torch.ones(len(rows))], [torch.tensor(doubt(n))]
    walks = starts.T
    for doubling in range(DOUBLINGS if n > 1 else 0):
        for _ in range(max(1, 2**doubling // 2)):
            walks = steps @ walks
        there = walks.T[:-1] / walks.T[-1].clamp(min=1e-3)  # times as often as by chance
        others = (there.sum(0) - there) / (n - 1)
        for level, power in SHARPER:
            seen = (first * _sharper(others, level, power)).sum(1)
            likelihoods.append(((1 - STRAYS) * seen + STRAYS).log().sum())
            found.append(_balanced(_sharper(there.mean(0), level, power).pow(CERTAIN), there))
    ratio = torch.stack(likelihoods).softmax(0) @ torch.stack(found)
    return lambda samples: (_towards(_rows(samples), rows, ALIKE) @ ratio).double()


def strange(made: Tensor, few: Tensor) -> bool:
    """Return whether a generator makes nothing like a few samples, which no part of it helps then.

    By distances to the nearest of its samples: the median of the few samples' is more than
    `STRANGE` times that of others of its own, and more than as few of these have by chance.

    Parameters
    ----------
    made : Tensor
        Samples (N, ...) of the generator.
    few : Tensor
        A few real samples (n, ...).
    """
    own, others = _rows(made).tensor_split([min(OWN, len(made) // 2)])
    away, among = (torch.cdist(x, others).amin(1) for x in (_rows(few), own))
    rng = torch.Generator().manual_seed(0)
    drawn = among[torch.randint(len(among), (DRAWS, min(len(few), STARTS)), generator=rng)]
    chance = drawn.median(1).values.quantile(0.99)
    return bool(away.median() > torch.maximum(STRANGE * among.median(), chance))


def doubt(n: int) -> float:
    """Return how much likelier the generator's own shares are than any others, in log."""
    return DOUBT + FEW / n**2


def _rows(samples: Tensor) -> Tensor:
    """Return samples (n, ...) as rows (n, d); images (n, channels, height, width) blurred."""
    samples = samples.detach().cpu().float()
    if samples.dim() == 4:
        height, width = (_blur(side) for side in samples.shape[2:])
        samples = height @ samples @ width.T
    return samples.flatten(1)


def _blur(side: int) -> Tensor:
    """Return the matrix (side, side) of a Gaussian blur along a side of so many pixels."""
    pixel = torch.arange(side)
    near = (-(pixel - pixel.unsqueeze(1)).square() / (2 * (BLUR * side) ** 2)).exp()
    return near / near.sum(1, keepdim=True)


def _sharper(there: Tensor, level: float, power: float) -> Tensor:
    """Part near from far (..., N), and put the mean back to 1."""
    likely = 1 / (1 + (level / there.clamp(min=1e-6)) ** power)
    return likely / likely.mean(-1, keepdim=True)


def _balanced(ratio: Tensor, there: Tensor) -> Tensor:
    """Scale ratios (N,) until as much of them is each sample's, of walks (n, N) that end there."""
    whose = there / there.sum(0).clamp(min=1e-9)
    for _ in range(BALANCING):
        ratio = ratio * ((whose @ ratio).clamp(min=1e-9).reciprocal() @ whose)
        ratio = ratio / ratio.mean()
    return ratio


def _steps(rows: Tensor) -> Tensor:
    """Return the chances (N, N) of each step, from column to row, of a walk among near rows.

    Sparse: 128 steps of all walks take 0.1 s, where squares of the matrix took 1.2 s.
    """
    near = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    distance, index = near.topk(min(NEAREST, len(rows) - 1), largest=False)
    radius = distance[:, -1].clamp(min=1e-12)
    closeness = (-distance.square() / (radius.unsqueeze(1) * radius[index])).exp()
    one_way = torch.zeros_like(near).scatter_(1, index, closeness)
    both = one_way + one_way.T
    return (both / both.sum(1, keepdim=True).clamp(min=1e-30)).T.to_sparse()


def _towards(samples: Tensor, rows: Tensor, k: int, *, without: int = 0) -> Tensor:
    """Return the shares (n, N) of the k rows nearest to each sample, but for the nearest ones."""
    distance, index = torch.cdist(samples, rows).topk(min(k, len(rows)), largest=False)
    distance, index = distance[:, without:], index[:, without:]
    closeness = (-(distance / distance[:, -1:].clamp(min=1e-12)).square()).exp()
    shares = closeness / closeness.sum(1, keepdim=True)
    return torch.zeros(len(samples), len(rows)).scatter_(1, index, shares)
