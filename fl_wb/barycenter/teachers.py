"""What a stage learns: points of a geodesic, as pairs of a latent and its sample.

Ours; not in the paper. The exact mixture of K measures is one map of the latent
(`fl_wb.generators.code`); the displacement interpolation of two is the optimal coupling of their
batches. Pairs are drawn once, measure by measure: a generator is alive only meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.persistence.tensor_files import digest
from fl_wb.training.distillation import Pairs
from fl_wb.transport import displacement

PAIRS = 131_072
"""Pairs of a pool, at most. Half as many cost forty sources of digits some coverage, ten none."""

BYTES = 256 << 20
"""Of a pool, at most."""

OF_A_BRANCH = 24
"""Pairs in a batch, at least, of each branch of the code: with fewer, an energy distance within it
says little. Forty sources of digits, with five of each, lost a tenth of their coverage."""

BATCH = 500
"""Latents that a generator is called with at a time."""


@dataclass(frozen=True)
class Measure:
    """A measure of a merge: what makes its generator, its weight, and a name of its state."""

    generator: Callable[[], nn.Module]
    weight: float
    digest: str

    @classmethod
    def of(cls, generator: nn.Module, weight: float, name: str = "") -> Measure:
        """Return the measure of a generator that is there already."""
        return cls(lambda: generator, weight, name or digest(generator.state_dict()))


class UselessMeasure(ValueError):
    """A generator that fails, or makes what nothing can be learned from."""

    def __init__(self, digest: str, why: str) -> None:
        super().__init__(digest, why)  # both, so that it can be sent from another process
        self.digest, self.why = digest, why

    def __str__(self) -> str:
        """Say why."""
        return self.why


@dataclass(frozen=True)
class Pool:
    """Latents (n, latent_dim), what each should become (n, ...), where it is, its weight (n,)."""

    z: Tensor
    x: Tensor
    cell: Tensor
    weight: Tensor

    def pairs(self) -> Pairs:
        """Draw pairs as they come, with replacement."""

        def draw(n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
            index = torch.randint(len(self.z), (n,), generator=rng, device=rng.device)
            return self.z[index], self.x[index], self.cell[index]

        return draw

    def samples(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw n samples of the measure itself."""
        return self.x[torch.multinomial(self.weight, n, replacement=True, generator=rng)]


def mixture_pool(
    measures: Sequence[Measure],
    code: Code,
    dim: int,
    wanted: int,
    batch: int,
    rng: torch.Generator,
) -> Pool:
    """Draw pairs of the exact mixture, of each measure by the root of its share.

    If what is learned of a measure has an error as 1 / pairs, these proportions make the mixture's
    error, sum_k lambda_k / pairs_k, the least.
    """
    roots = [math.sqrt(share) for share in code.shares]
    branches = code.branches(max(int(math.log2(batch / OF_A_BRANCH)), 0))
    parts: list[tuple[Tensor, ...]] = []
    size = wanted
    for k, measure in enumerate(measures):
        generator = measure.generator()
        if not k:
            size = pool_size(generator, dim, wanted, rng.device)
        n = max(round(size * roots[k] / math.fsum(roots)), 2)
        inner = latents(n, dim, rng)
        x = samples_of(measure, generator, inner)
        cell = torch.full((len(inner),), k, device=rng.device)
        branch = torch.full_like(cell, int(branches[k]))
        weight = torch.full((len(inner),), code.shares[k] / len(inner), device=rng.device)
        parts.append((code.embed(cell, inner), x, branch, weight))
    return Pool(*(torch.cat(column) for column in zip(*parts, strict=True)))


def displacement_pool(
    measures: Sequence[Measure], t: float, dim: int, wanted: int, batch: int, rng: torch.Generator
) -> Pool:
    """Draw pairs of McCann's interpolation of two measures, coupled batch by batch."""
    one, other = (measure.generator() for measure in measures)
    size = pool_size(one, dim, wanted, rng.device)
    parts: list[tuple[Tensor, Tensor]] = []
    for n in [batch] * math.ceil(size / batch):
        z = latents(n, dim, rng)
        x, y = samples_of(measures[0], one, z), samples_of(measures[1], other, z)
        parts.append((z, displacement(x, y, t)))
    z, x = (torch.cat(column) for column in zip(*parts, strict=True))
    one_cell = torch.zeros(len(z), dtype=torch.long, device=rng.device)
    return Pool(z, x, one_cell, torch.ones(len(z), device=rng.device))


@torch.no_grad()
def samples_of(measure: Measure, generator: nn.Module, z: Tensor) -> Tensor:
    """Return what a measure's generator, perhaps a stranger's, makes of latents, without a graph.

    Raises
    ------
    UselessMeasure
        If it fails, or makes samples that are not finite.
    """
    try:
        x = torch.cat([generator(part) for part in z.split(BATCH)])
    except (RuntimeError, ArithmeticError, ValueError) as error:
        raise UselessMeasure(measure.digest, f"the generator fails to generate: {error}") from error
    if not x.isfinite().all():
        raise UselessMeasure(measure.digest, "the generator makes samples that are not finite")
    return x


def latents(n: int, dim: int, rng: torch.Generator) -> Tensor:
    """Draw latents (n, dim)."""
    return torch.randn(n, dim, generator=rng, device=rng.device)


@torch.no_grad()
def pool_size(generator: nn.Module, dim: int, wanted: int, device: torch.device) -> int:
    """Return how many pairs of a generator's samples are drawn: no more than fit a pool."""
    bytes_each = 4 * (dim + generator(torch.zeros(2, dim, device=device))[0].numel())
    return max(min(wanted, PAIRS, BYTES // int(bytes_each)), 1)
