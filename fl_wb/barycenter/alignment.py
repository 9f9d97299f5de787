"""Turning a measure's latents, so that its map is near to another: one generator learns both.

Ours; not in the paper. N(0, I) looks the same from every side: z -> G(R z) makes the same measure
as G for every orthogonal R. Cells of a code whose maps are alike are one smooth map with few folds.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRM = 1e-2
"""Of the largest singular value: directions in which samples change less stay where they are."""


def nearest_turn(z: Tensor, samples: Tensor, wanted: Tensor) -> Tensor:
    """Orthogonal R (d, d) for which z -> G(R z) is nearest to another map, both taken as linear.

    The linear part of a map is E[G(z) z'], by Stein's lemma its mean Jacobian; A R is nearest to B
    for the orthogonal factor of A' B (orthogonal Procrustes).

    Parameters
    ----------
    z : Tensor
        Draws (n, d) of N(0, I).
    samples, wanted : Tensor
        What the two maps make of them, (n, ...). Where something is not finite, R is I.
    """
    a, b = ((x - x.mean(0)).flatten(1).T @ z / len(z) for x in (samples, wanted))
    cross = a.T @ b
    unturned = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    if not cross.isfinite().all():
        return unturned
    firm = FIRM * torch.linalg.matrix_norm(cross, 2).clamp(min=1e-20) * unturned
    left, _, right = torch.linalg.svd(cross + firm)
    turn: Tensor = left @ right
    return turn
