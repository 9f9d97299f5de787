"""The exact mixture of several generators, as ONE map of the latent.

Ours; not in the paper. With u = Phi(z_0) and the unit interval cut into parts of lengths lambda_1,
..., lambda_K: where u lies in part k, generator k is used at z_0' = Phi^-1((u - start of the part)
/ lambda_k), the other coordinates unchanged. For z ~ N(0, I), z' is again N(0, I) in every part, so
the push-forward is sum_k lambda_k mu_k itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fl_wb.generators.sampling import latent_dim_of

Map = Callable[[Tensor], Tensor]
"""Latents (n, latent_dim) to samples (n, ...)."""

_SHARES = "shares"


def mix(maps: Sequence[Map], shares: Sequence[float], z: Tensor) -> Tensor:
    """Evaluate the mixture of maps at latents z (n, latent_dim).

    Parameters
    ----------
    maps : sequence of callable
        Latents to samples; one that gets no latent is not called.
    shares : sequence of float
        lambda_k >= 0, one each, of sum 1.
    z : Tensor
        Latents (n, latent_dim); left alone.

    Returns
    -------
    Tensor
        Samples (n, ...).
    """
    part, inner = _place(z, shares)
    z = _placed(z, inner)
    where = [(part == k).nonzero().squeeze(1) for k in range(len(maps))]
    # few networks expect an empty batch, which a small share soon brings
    made = [made_of(z[rows]) for made_of, rows in zip(maps, where, strict=True) if len(rows)]
    unordered = torch.cat(made)
    return torch.empty_like(unordered).index_copy(0, torch.cat(where), unordered)


def favor_small_parts(z: Tensor, shares: Sequence[float]) -> Tensor:
    """Move latents z ~ N(0, I) so that part k of the mixture gets more of them if it is small.

    Parts get latents in proportion to sqrt(lambda_k); within a part they are distributed as
    before. If what is learned of a part has an error as 1 / latents, these proportions make the
    mixture's error, sum_k lambda_k / latents_k, the least.

    Parameters
    ----------
    z : Tensor
        Latents (n, latent_dim); left alone.
    shares : sequence of float
        lambda_k > 0 of sum 1, as for `mix`.

    Returns
    -------
    Tensor
        Latents (n, latent_dim); z itself where all shares are equal.
    """
    if len(set(shares)) == 1:
        return z
    roots = [math.sqrt(share) for share in shares]
    part, inner = _place(z, [root / sum(roots) for root in roots])
    return _placed(
        z, inner.new_tensor(_starts(shares))[part] + inner * inner.new_tensor(shares)[part]
    )


def _starts(shares: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(shares)][:-1]


def _place(z: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return which part (n,) each latent lies in, and how far into it (n,), from 0 to 1."""
    # float64: a float's Phi has too few digits for the inverse in the tails
    u = torch.special.ndtr(z[:, 0].double())
    starts = u.new_tensor(_starts(shares))
    part = torch.bucketize(u, starts[1:], right=True)
    return part, (u - starts[part]) / u.new_tensor(shares)[part]


def _placed(z: Tensor, u: Tensor) -> Tensor:
    """Return the latents with Phi(z_0) = u (n,)."""
    # Phi rounds to 0 or 1 in the far tails, where its inverse is infinite
    first = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).to(z.dtype)
    return torch.cat([first.unsqueeze(1), z[:, 1:]], dim=1)


class Mixture(nn.Module):
    """The mixture as a generator: adapted, ternarized and sent as any other.

    Parameters
    ----------
    generators : sequence of nn.Module
        Of one latent dimension and one shape of samples.
    weights : sequence of float, optional
        lambda_k > 0, of any sum; equal if None. They are part of the state dict.
    latent_dim : int, optional
        For generators without the attribute.
    """

    shares: Tensor

    def __init__(
        self,
        generators: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        latent_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim_of(generators[0], latent_dim)
        self.generators = nn.ModuleList(generators)
        shares = torch.tensor([1.0] * len(generators) if weights is None else list(weights))
        self.register_buffer(_SHARES, shares / shares.sum())

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to samples (n, ...)."""
        shares = self.shares.double()
        return mix(list(self.generators), (shares / shares.sum()).tolist(), z)


def states_as_mixture(states: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Return the state dict of a `Mixture` of generators with these states, without making it."""
    state = {_SHARES: (weights / weights.sum()).float()}
    for k, part in enumerate(states):
        state |= {f"generators.{k}.{name}": value for name, value in part.items()}
    return state


def fitting(
    shapes: Mapping[str, Sequence[int]],
    generator: Callable[[], nn.Module],
    most: int | None = None,
) -> nn.Module:
    """Make the network that arrays are of: a generator, or a mixture of as many as there are.

    Parameters
    ----------
    shapes : mapping
        Shape of each array by its name.
    generator : callable
        Factory of one generator.
    most : int, optional
        Make no more generators than that, whatever a stranger's arrays say.
    """
    if _SHARES not in shapes:
        return generator()
    number = math.prod(shapes[_SHARES])
    return Mixture([generator() for _ in range(number if most is None else min(number, most))])
