"""The law of what a generator is called with: its latents, and a label where it is conditional.

The mathematics knows generators of one tensor, whose rows come from one law. `Driven` makes such a
generator of any other: its rows are latents and, where there are labels, the label last, as a
float. A `code` cuts coordinates of known law alone, so a law also leads to uniform numbers and
back, coordinate by coordinate; of a law that can only draw, the quantiles are taken from draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

Draw = Callable[[int, torch.Generator], Tensor]
"""Draws n latents (n, latent_dim) with the given random generator."""

UNIFORM = {"uniform": (0.0, 1.0), "uniform(-1,1)": (-1.0, 1.0)}
"""The ends of the uniform laws, by name."""

NAMES = ("normal", *UNIFORM)

TAIL = 1e-9
"""Phi rounds to 0 or 1 in the far tails, where its inverse is infinite."""

DRAWS = 16_384
"""From which the quantiles of a law are taken that is given by its draws."""

BEYOND = 6.0
"""Standard errors beyond which a correlation of ranks is none of chance."""

MOST_LABELS = 100_000


@dataclass(frozen=True)
class Latents:
    """Rows that a generator is called with.

    Attributes
    ----------
    dim
        Coordinates of z.
    law
        Of z: "normal", N(0, I); "uniform", on (0, 1); "uniform(-1,1)"; or what draws it.
    labels
        How often each label is drawn, of sum 1, apart from z; empty without labels. Of n rows each
        has its share, but for less than one.
    """

    dim: int
    law: str | Draw = "normal"
    labels: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.dim + bool(self.labels)

    @property
    def plain(self) -> bool:
        """Whether rows are N(0, I)."""
        return self.law == "normal" and not self.labels

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw rows (n, width), on the random generator's device."""
        z = self._draw(n, rng)
        if not self.labels:
            return z
        # as evenly as n rows can be, in random order: chance would only add to the variance
        start = torch.rand(1, generator=rng, device=rng.device, dtype=torch.float64)
        u = (torch.arange(n, device=rng.device) + start) / n
        ends = torch.tensor(self.labels, dtype=torch.float64, device=rng.device).cumsum(0)
        label = torch.searchsorted(ends / ends[-1], u, right=True)
        label = label[torch.randperm(n, generator=rng, device=rng.device)]
        return torch.cat([z, label.unsqueeze(1).to(z.dtype)], 1)

    def some(self, n: int = 4) -> Tensor:
        """Return n rows, always the same ones."""
        if self.plain:
            return torch.linspace(-2, 2, n * self.dim).reshape(n, self.dim)
        return self.draw(n, torch.Generator().manual_seed(0))

    @cached_property
    def free(self) -> tuple[int, ...]:
        """Columns that a code may cut: of a continuous law, and independent of all others.

        Raises
        ------
        ValueError
            If there is none: nothing but draws is known of the law.
        """
        if isinstance(self.law, str):
            return tuple(range(self.dim))
        ordered = self._quantiles
        distinct = (ordered.diff(dim=0) > 0).double().mean(0) > 0.99
        draws = self._sample
        ranks = draws.argsort(0).argsort(0).double() / len(draws) - 0.5
        seen = torch.cat([ranks, ranks.abs()], 1).nan_to_num()
        together = torch.corrcoef(seen.T).reshape(2 * self.dim, -1).nan_to_num().abs()
        here = torch.arange(self.dim).repeat(2)
        together[here.unsqueeze(1) == here] = 0
        apart = together.view(2, self.dim, -1).amax((0, 2)) < BEYOND / len(draws) ** 0.5
        free = (distinct & apart).nonzero().flatten().tolist()
        if not free:
            raise ValueError(
                "no coordinate of these latents is continuous and independent of the others: "
                "several generators of them cannot be told apart by their latents, and not merged"
            )
        return tuple(free)

    def uniforms(self, z: Tensor) -> Tensor:
        """Map rows (n, width) to uniform numbers in float64; a label's column means nothing."""
        # float64: a float's Phi has too few digits for the inverse in the tails
        z = z.double()
        if self.law == "normal":
            phi: Tensor = torch.special.ndtr(z)
            return phi
        if isinstance(self.law, str):
            low, high = UNIFORM[self.law]
            return ((z - low) / (high - low)).clamp(0, 1)
        u = z.clone()
        known = self._quantiles.to(z.device)
        steps = torch.linspace(0, 1, len(known), dtype=z.dtype, device=z.device)
        for column in self.free:
            u[:, column] = _interpolated(z[:, column], known[:, column].contiguous(), steps)
        return u

    def rows(self, u: Tensor) -> Tensor:
        """Map uniform numbers (n, width) to rows in float64, the way back of `uniforms`."""
        u = u.clamp(TAIL, 1 - TAIL)
        if self.law == "normal":
            inverse: Tensor = torch.special.ndtri(u)
            return inverse
        if isinstance(self.law, str):
            low, high = UNIFORM[self.law]
            return low + (high - low) * u
        z = u.clone()
        known = self._quantiles.to(u.device)
        steps = torch.linspace(0, 1, len(known), dtype=u.dtype, device=u.device)
        for column in self.free:
            z[:, column] = _interpolated(u[:, column], steps, known[:, column].contiguous())
        return z

    @cached_property
    def _sample(self) -> Tensor:
        return self._draw(DRAWS, torch.Generator().manual_seed(0)).double()

    @cached_property
    def _quantiles(self) -> Tensor:
        return self._sample.sort(0).values

    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        if self.law == "normal":
            return torch.randn(n, self.dim, generator=rng, device=rng.device)
        if isinstance(self.law, str):
            low, high = UNIFORM[self.law]
            u = torch.rand(n, self.dim, generator=rng, device=rng.device)
            return low + (high - low) * u
        return _drawn(self.law, n, self.dim, rng)


class Driven(nn.Module):
    """A generator, anybody's, as one of rows of a known law.

    Parameters
    ----------
    generator : nn.Module
        Called with latents (n, dim), and labels (n,) of int64 where there are any.
    latents : Latents
    """

    def __init__(self, generator: nn.Module, latents: Latents) -> None:
        super().__init__()
        self.generator, self.latents = generator, latents

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (n, width) to samples (n, ...)."""
        if not self.latents.labels:
            samples: Tensor = self.generator(rows)
            return samples
        samples = self.generator(rows[:, :-1], rows[:, -1].long())
        return samples


def frequencies(labels: int | Sequence[float] | Tensor | None) -> tuple[float, ...]:
    """Return how often each label occurs, of sum 1: of their number, or of their counts.

    Raises
    ------
    ValueError
        If it is no positive number, or a count is negative or not finite, or all are 0.
    """
    if labels is None:
        return ()
    if isinstance(labels, int | np.integer):
        if not 0 < labels <= MOST_LABELS:
            raise ValueError(f"labels={labels} must be from 1 to {MOST_LABELS}")
        return (1 / int(labels),) * int(labels)
    counts = [float(count) for count in labels]
    total = math.fsum(counts)
    if not all(0 <= count < math.inf for count in counts) or not 0 < total < math.inf:
        raise ValueError(f"counts of labels must be >= 0, and not all of them 0: {counts[:20]}")
    return tuple(count / total for count in counts)


def mixed(
    parts: Sequence[tuple[float, tuple[float, ...]]], default: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """Return how often a mixture of parts, weight and labels each, has each label.

    Who does not say has them as by default, or equally often. Empty if nobody says.
    """
    said = [labels for _, labels in parts if labels]
    if not said:
        return ()
    most, usual = max(weight for weight, _ in parts), default or frequencies(len(said[0]))
    counts = [[weight / most * share for share in labels or usual] for weight, labels in parts]
    return frequencies([math.fsum(column) for column in zip(*counts, strict=True)])


def law_of(latents: str | Draw) -> str | Draw:
    """Return the law that is meant; ValueError if there is none of that name."""
    if callable(latents):
        return latents
    name = str(latents).replace(" ", "")
    if name not in NAMES:
        raise ValueError(f"latents={latents!r} is not one of {', '.join(NAMES)}, nor callable")
    return name


def _drawn(law: Draw, n: int, dim: int, rng: torch.Generator) -> Tensor:
    """Call what a user draws latents with, and check what comes."""
    z = law(n, rng)
    if not isinstance(z, Tensor) or z.shape != (n, dim) or not z.isfinite().all():
        what = f"{tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"latents, called with ({n}, torch.Generator), must return finite ones ({n}, {dim}), "
            f"not {what}"
        )
    return z.float().to(rng.device)


def _interpolated(x: Tensor, grid: Tensor, values: Tensor) -> Tensor:
    """Map x (n,) by the line through (grid, values), both of them rising."""
    right = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[right - 1], grid[right]
    share = ((x - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share)
