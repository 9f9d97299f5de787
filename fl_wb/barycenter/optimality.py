"""How near a barycenter is to the best there can be."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fl_wb.barycenter.recursion import check_weights
from fl_wb.transport import wasserstein1


def optimality_gap(
    samples: Tensor, sources: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Barycenter objective of samples of nu, and a lower bound of the least possible.

    The objective is sum_k lambda_k W1(nu, mu_k) with the weights normalised to one, by exact
    transport. The bound adds up triangle inequalities W1(nu, mu_i) + W1(nu, mu_j) >=
    W1(mu_i, mu_j) with c_ij = lambda_i lambda_j / max(Lambda - lambda_i, Lambda - lambda_j),
    which spends at most lambda_i on each measure; for K = 2 it is reached.

    Parameters
    ----------
    samples : Tensor
        Samples (n, ...) of the barycenter.
    sources : sequence of Tensor
        Samples (n_k, ...) of each source measure.
    weights : sequence of float, optional
        lambda_k > 0; equal if None.

    Returns
    -------
    objective, bound : float
        In the units of the samples.
    """
    lambdas = check_weights(weights, len(sources))
    lambdas = [w / sum(lambdas) for w in lambdas]
    objective = sum(w * wasserstein1(samples, s) for w, s in zip(lambdas, sources, strict=True))
    bound = sum(
        a * b / max(1 - a, 1 - b) * wasserstein1(sources[i], sources[j])
        for i, a in enumerate(lambdas)
        for j, b in enumerate(lambdas[:i])
    )
    return objective, float(bound)
