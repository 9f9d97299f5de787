"""Which of many samples are taken, where some must do."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_out(n: int, k: int, seed: int = 0) -> Tensor:
    """Return k of n indices in their order, one at random of each of k parts as equal as can be.

    Fair where samples are sorted by classes, and where classes come in turn.
    """
    ends = torch.arange(k + 1) * n // max(k, 1)
    chance = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ends[:-1] + (chance * ends.diff()).long()
