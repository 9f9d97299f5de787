"""Optimal transport on samples: exact W1, couplings, displacement interpolation.

Samples are flattened to rows; the ground cost is Euclidean. Exact transport is POT's network
simplex (Bonneel et al., 2011; Flamary et al., JMLR 2021).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LONG = 1024
"""Numbers of a sample from which on ``torch.pdist`` takes several times as long as a product."""

ITERATIONS = 10_000_000  # of the network simplex, which POT would else end short of the optimum


def wasserstein1(x: Tensor, y: Tensor) -> float:
    """Exact Wasserstein-1 distance of two sample sets with Euclidean ground cost.

    Parameters
    ----------
    x, y : Tensor
        Samples (n, ...) and (m, ...), uniformly weighted; flattened to rows.

    Returns
    -------
    float
        W1 in the units of the samples.

    Raises
    ------
    ValueError
        If a set is empty, the samples differ in size, or a value is not finite.
    """
    a, b = _rows(x), _rows(y)
    if not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"two non-empty sets of samples of one size are needed, not {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    cost = torch.cdist(a, b).numpy()
    if not np.isfinite(cost).all():
        raise ValueError("samples must be finite")
    import ot  # here: it takes seconds that a strategy and most clients need not pay

    value = ot.emd2(ot.unif(len(a)), ot.unif(len(b)), cost, numItermax=ITERATIONS)
    return float(value)


def coupling(x: Tensor, y: Tensor) -> Tensor:
    """Optimal one-to-one coupling of two equally large batches for the squared cost.

    The squared cost makes the plan the one of McCann's interpolation; W1 plans are not unique.

    Returns
    -------
    Tensor
        Indices (n,): x[i] goes to y[index[i]].
    """
    # Between uniform measures on n points each, the simplex ends in a vertex: a permutation.
    cost = torch.cdist(_rows(x), _rows(y)).square().numpy()
    import ot  # see `wasserstein1`

    plan = ot.emd(ot.unif(len(cost)), ot.unif(len(cost)), cost, numItermax=ITERATIONS)
    return torch.from_numpy(plan.argmax(axis=1))


def displacement(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Displacement interpolation (1-t) x + t T(x) of two batches (McCann, 1997).

    Parameters
    ----------
    x, y : Tensor
        Batches (n, ...) of the same shape; T is their optimal coupling (`coupling`).
    t : float
        Position on the geodesic, 0 at x and 1 at y.
    """
    return torch.lerp(x, y[coupling(x, y).to(y.device)], t)


def energy_distance(x: Tensor, y: Tensor, cells: Tensor | None = None) -> Tensor:
    """Energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of two batches, differentiable.

    Unbiased: a sample's distance to itself is left out (Szekely and Rizzo, 2013). Not transport,
    but like it a distance of measures that needs no critic. `fl_wb.metrics.energy_distance` is
    the same number for large sets.

    Parameters
    ----------
    x, y : Tensor
        Samples (n, ...) and (m, ...); flattened to rows.
    cells : Tensor, optional
        (n,) integers, where n = m and x[i] and y[i] are of cell i: the mean over the cells, each
        by its number of samples, of the distance within it.

    Returns
    -------
    Tensor
        Scalar, in the units of the samples.
    """
    x, y = x.flatten(1), y.flatten(1)
    if cells is None:
        return 2 * torch.cdist(x, y).mean() - _spread(x) - _spread(y)
    same = (cells.unsqueeze(1) == cells).to(x.dtype)
    size = same.sum(1, keepdim=True)  # of each sample's cell
    across = (torch.cdist(x, y) * same / size).sum() / len(x)
    others = same / (size - 1).clamp(min=1)
    pair = others[*torch.triu_indices(len(x), len(x), 1, device=x.device)]
    return 2 * across - sum(2 * (_pairs(rows) * pair).sum() / len(x) for rows in (x, y))


def _spread(rows: Tensor) -> Tensor:
    return _pairs(rows).sum() / max(len(rows) * (len(rows) - 1) / 2, 1)


def _pairs(rows: Tensor) -> Tensor:
    """Return the distances of all pairs, as ``torch.pdist``, of long rows by a matrix product."""
    if rows.shape[1] <= LONG:
        return torch.pdist(rows)
    rows = rows - rows.detach().mean(0)  # it rounds by how far from zero they are
    squares, kind = rows.square().sum(1), torch.finfo(rows.dtype)
    squared = squares.unsqueeze(1) + squares - 2 * rows @ rows.T
    pairs = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    rounding = float(squares.detach().mean()) * kind.eps + kind.tiny  # where it has a kink
    return squared[*pairs].clamp(min=rounding).sqrt()


def _rows(samples: Tensor) -> Tensor:
    # The network simplex works in float64; rounding the costs earlier would only lose digits.
    rows = samples.detach().cpu().double()
    return rows.flatten(1) if rows.dim() > 1 else rows.reshape(-1, 1)
