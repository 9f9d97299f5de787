"""The exact mixture of several generators as ONE generator: adapted, ternarized, sent as any other.

Ours; not in the paper. `fl_wb.generators.code` says which generator a latent is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fl_wb.generators.code import Code, code_of
from fl_wb.generators.sampling import latents_of

_SHARES = "shares"


class Mixture(nn.Module):
    """A generator of sum_k lambda_k mu_k, mu_k the measure of the k-th of several generators.

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
        self.latents = latents_of(generators[0], latent_dim)
        self.latent_dim = self.latents.dim
        self.generators = nn.ModuleList(generators)
        shares = torch.tensor([1.0] * len(generators) if weights is None else list(weights))
        self.register_buffer(_SHARES, shares / shares.sum())

    @property
    def code(self) -> Code:
        """Which latents are whose."""
        return code_of(tuple(self.shares.tolist()))

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to samples (n, ...)."""
        return self.code.mix(list(self.generators), z, self.latents)


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
