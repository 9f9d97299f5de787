"""A generator of several measures, with other weights: one number a cell, and perhaps a gate.

Ours; not in the paper. A generator that learned a mixture by its code (`fl_wb.generators.code`) is
a whole family of barycenters: moving its latents until the cells have other shares changes the
weights, as well as it knows the cells. A `fl_wb.generators.gate` weighs what no cell tells apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_wb.generators.code import Code, code_of
from fl_wb.generators.gate import Gate
from fl_wb.generators.sampling import latents_of


class Reweighted(nn.Module):
    """What `reweighted` returns; shares, weights and gate are part of its state dict."""

    shares: Tensor
    weights: Tensor
    gate: Gate | None

    def __init__(
        self,
        generator: nn.Module,
        shares: Sequence[float],
        weights: Sequence[float],
        latent_dim: int | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        self.latents = latents_of(generator, latent_dim)
        self.latent_dim = self.latents.dim
        self.generator = generator
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float64))
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.gate = gate

    @property
    def code(self) -> Code:
        """What the cells are, in the generator inside."""
        return code_of(tuple(self.shares.tolist()))

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to samples (n, ...)."""
        if self.gate is not None:
            z = self.gate.choose(z)
        samples: Tensor = self.generator(self.code.recode(z, self.weights.tolist(), self.latents))
        return samples


def reweighted(
    generator: nn.Module,
    code: Code,
    weights: Sequence[float] | Tensor,
    *,
    latent_dim: int | None = None,
    gate: Gate | None = None,
) -> Reweighted:
    """Return a generator of the same cells with other weights: sum_k w_k mu_k.

    Parameters
    ----------
    generator : nn.Module
        Learned from a mixture by this code; shared, not copied.
    code : Code
        Its cells, and the shares that they have in the generator.
    weights : sequence of float, or Tensor (K,)
        w_k >= 0, of any sum. A cell of weight 0 is forgotten.
    latent_dim : int, optional
        For a generator without the attribute.
    gate : Gate, optional
        Through which latents go before they are shared out among the cells.

    Raises
    ------
    ValueError
        If there is not one weight a cell, one is negative or not finite, or all are 0; or the gate
        is of other latents.
    """
    values = torch.as_tensor(weights, dtype=torch.float64).tolist()
    if (
        len(values) != len(code)
        or not all(0 <= w < float("inf") for w in values)
        or not any(values)
    ):
        raise ValueError(
            f"{len(code)} weights >= 0 are needed, not all of them 0, and not {values[:20]}"
        )
    dim = latents_of(generator, latent_dim).dim
    if gate is not None and gate.latent_dim != dim:
        raise ValueError(f"a gate of {gate.latent_dim} latent coordinates for a generator of {dim}")
    return Reweighted(generator, code.shares, values, dim, gate)
