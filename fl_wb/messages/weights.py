"""Weights that nodes give themselves, bounded: no node's word takes the whole model."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHARE = 3.0  # four times as much data as the others' mean is rare; a thousand times is a lie


def bounded_weights(
    weights: Sequence[float], max_share: float = MAX_SHARE, nodes: Sequence[int] | None = None
) -> list[float]:
    """Bound what one of several may weigh, and keep their sum finite.

    None keeps more than m / (m + K - 1) of the whole, for K nodes and m = `max_share`: that is
    m times the mean of the others, and so never more than m times an equal share. What is cut is
    the others', in the proportion of their weights.

    Parameters
    ----------
    weights : sequence of float
        Positive and finite, one of each upload.
    max_share : float
        1 or more; at 1 all nodes weigh the same.
    nodes : sequence of int, optional
        How many nodes each upload is of; one by default.

    Returns
    -------
    list of float
        The same numbers where none is too large and their sum is finite; else shares of 1.

    Raises
    ------
    ValueError
        If a weight is not positive and finite, or `max_share` is less than 1.
    """
    if not max_share >= 1:
        raise ValueError(f"max_share={max_share!r} must be 1 or more")
    wrong = [weight for weight in weights if not 0 < weight < float("inf")]
    if wrong:
        raise ValueError(f"weights must be positive and finite, not {wrong[0]!r}")
    if not weights:
        return []
    counts = list(nodes) if nodes is not None else [1] * len(weights)
    cap = max_share / (max_share + sum(counts) - 1)
    caps = [min(count * cap, 1.0) for count in counts]
    largest = max(weights)
    shares = _shares([weight / largest for weight in weights], [1.0] * len(weights))
    if all(share <= most * (1 + 1e-9) for share, most in zip(shares, caps, strict=True)):
        return list(weights) if sum(weights) < float("inf") else shares
    return _shares(shares, caps)


def _shares(weights: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Return shares of 1 in proportion to weights, none above its cap."""
    shares, full = [0.0] * len(weights), [False] * len(weights)
    while True:
        left = 1.0 - sum(most for most, capped in zip(caps, full, strict=True) if capped)
        open_ = [i for i, capped in enumerate(full) if not capped]
        total = sum(weights[i] for i in open_)
        for i in open_:  # weights so small that they are zero beside the largest share alike
            shares[i] = left * (weights[i] / total if total else 1 / len(open_))
        over = [i for i in open_ if shares[i] > caps[i]]
        if not over:
            return shares
        for i in over:
            shares[i], full[i] = caps[i], True
