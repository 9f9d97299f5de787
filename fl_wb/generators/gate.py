"""A gate: which of its latents a generator uses more, and which less, than they come.

A small network says how much likelier than N(0, I) each latent is wanted. As in latent reweighting
of GANs (Issenhuth et al., "Latent reweighting, an almost free improvement for GANs", WACV 2022),
latents are resampled by what it says. Ours is that the generator stays a map of one latent: the
candidates are that latent's own coordinates, rolled, each of which is N(0, I) again, and which of
them is taken is decided by further digits of the first coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CANDIDATES = 16
"""Latents of which one is taken: fewer where the latent has too few coordinates to roll."""

DIGITS = 64
"""Of the first coordinate, what is left below 1 / DIGITS decides: so little moves no sample."""

LOGS = (-20.0, 3.4)
"""Of what a gate says, the ends: a latent is wanted at most 30 times as often as it comes."""


class Gate(nn.Module):
    """log of how much likelier a latent is wanted: two hidden layers, biases as a last column.

    Parameters
    ----------
    layers : sequence of Tensor
        (h, latent_dim + 1), (k, h + 1) and (1, k + 1). Kept to float16's digits, as buffers:
        whatever trains, rounds or counts a generator's weights leaves them alone.

    Raises
    ------
    ValueError
        If they do not follow each other, or are not finite.
    """

    first: Tensor
    second: Tensor
    third: Tensor

    def __init__(self, layers: Sequence[Tensor]) -> None:
        super().__init__()
        shapes = [tuple(layer.shape) for layer in layers]
        good = len(shapes) == 3 and all(len(shape) == 2 and shape[1] > 1 for shape in shapes)
        good = good and [shape[1] - 1 for shape in shapes[1:]] == [s[0] for s in shapes[:2]]
        if not good or shapes[2][0] != 1 or not all(layer.isfinite().all() for layer in layers):
            raise ValueError(f"these are no finite layers of a gate: {shapes}")
        for name, layer in zip(("first", "second", "third"), layers, strict=True):
            self.register_buffer(name, layer.detach().half().float())

    @property
    def latent_dim(self) -> int:
        """Dimension of the latents."""
        return self.first.shape[1] - 1

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (..., latent_dim) to the log of their likelihood ratio (...), in float64."""
        x = _affine(z.double(), self.first).relu()
        return _affine(_affine(x, self.second).relu(), self.third).squeeze(-1)

    @torch.no_grad()
    def choose(self, z: Tensor) -> Tensor:
        """Map latents z ~ N(0, I) (n, latent_dim) to such as are wanted."""
        candidates = torch.stack(_rolled(z), 1)
        odds = self(candidates).clamp(*LOGS).exp().cumsum(1)
        drawn = (DIGITS * z[:, :1].double()).frac().abs() * odds[:, -1:]
        taken = (odds < drawn).sum(1).clamp(max=odds.shape[1] - 1)
        return candidates[torch.arange(len(z), device=z.device), taken]


def _affine(x: Tensor, layer: Tensor) -> Tensor:
    return nn.functional.linear(x, layer[:, :-1].to(x), layer[:, -1].to(x))


def _rolled(z: Tensor) -> list[Tensor]:
    """Return the candidates: every roll of z, and of -z."""
    signed = ((sign, by) for sign in (1, -1) for by in range(z.shape[1]))
    return [sign * z.roll(by, 1) for sign, by in list(signed)[:CANDIDATES]]
