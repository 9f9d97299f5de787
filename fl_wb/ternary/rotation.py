"""Turning a generator's latent so that its first layer is nearly ternary.

N(0, I) looks the same from every side: z -> g(R z) makes the same measure as g for every orthogonal
R, and has the first weight W R in place of W. Which R suits three values best is the question of
iterative quantization (Gong and Lazebnik, CVPR 2011). That first weights are turned before they
are ternarized is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of
from fl_wb.generators.sampling import device_of
from fl_wb.training.random_numbers import own_random_numbers

STEPS = 50
"""Of the alternation; on the shipped generators the error changes little after 30."""


def turned(
    generator: nn.Module, project: Callable[[Tensor], Tensor], latent_dim: int, *, seed: int = 0
) -> nn.Module:
    """Return a generator of the same measure whose first weight is nearer to its projection.

    Parameters
    ----------
    generator : nn.Module
        In eval mode. Returned as it is unless its first linear layer is the only one that sees z,
        is finite, and gains by it.
    project : callable
        Maps a weight to the nearest that is wanted, e.g. one of three values.
    latent_dim : int
        Dimension of z.
    seed : int
        Of the rotation at the start.
    """
    copy = copy_of(generator)
    first = next((layer for layer in copy.modules() if isinstance(layer, nn.Linear)), None)
    if first is None or first.in_features != latent_dim or not first.weight.isfinite().all():
        return generator
    rng = torch.Generator(device_of(generator)).manual_seed(seed)
    with torch.no_grad():
        own = first.weight.float()  # half precision has no such decompositions
        rotation = nearest_rotation(own, project, rng)
        weight = own @ rotation
        if (project(weight) - weight).norm() >= (project(own) - own).norm():
            return generator
        first.weight.copy_(weight)
        z = torch.randn(64, latent_dim, generator=rng, device=rng.device)
        with own_random_numbers(seed):
            made = copy(z)
        with own_random_numbers(seed):
            wanted = generator(z @ rotation.T)
    # else z, or the layer, is used elsewhere too
    same = (made - wanted).norm() <= 1e-3 * (wanted - wanted.mean(0)).norm()
    return copy if same else generator


def nearest_rotation(
    weight: Tensor, project: Callable[[Tensor], Tensor], rng: torch.Generator
) -> Tensor:
    """Orthogonal R (d, d) for which W R, of W (n, d), is near project(W R).

    In turns, Q = project(W R) and the R that brings W nearest to Q (orthogonal Procrustes), from a
    random R: the distance ||W R - Q|| never grows if `project` is a nearest point.
    """
    d = weight.shape[1]
    start = torch.randn(d, d, generator=rng, device=weight.device, dtype=weight.dtype)
    rotation: Tensor = torch.linalg.qr(start).Q
    for _ in range(STEPS):
        left, _, right = torch.linalg.svd(weight.T @ project(weight @ rotation))
        rotation = left @ right
    return rotation
