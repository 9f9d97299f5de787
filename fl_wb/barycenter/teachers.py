"""What a stage learns: points of a geodesic, as pairs of a latent and its sample.

Ours; not in the paper. The exact mixture of K measures is one map of the latent
(`fl_wb.generators.code`); the displacement interpolation of two is the optimal coupling of their
batches. Pairs are drawn once, measure by measure: a generator is alive only meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fl_wb.barycenter.alignment import nearest_turn
from fl_wb.generators.code import Code
from fl_wb.generators.latents import Latents, frequencies
from fl_wb.generators.sampling import Labels, in_batches
from fl_wb.persistence.tensor_files import digest
from fl_wb.training.distillation import Pairs
from fl_wb.training.wgan import Regularizer
from fl_wb.transport import displacement, energy_distance

PAIRS = 131_072
"""Pairs of a pool, at most. Half as many cost forty sources of digits some coverage, ten none."""

BYTES = 256 << 20
"""Of a pool, at most."""

POWER = 0.75
"""What denser pairs a measure has, moves its borders outwards: of ten sources of digits, one of
weight 1/100 came out with 1.7 times its share by the root, .14 by the share itself, 1.4 by this."""

OF_A_BRANCH, OF_A_LABEL = 24, 20
"""Pairs in a batch, at least, of each branch of the code, or label: with fewer, an energy distance
within it says little. Forty sources of digits, with five of each, lost a tenth of their coverage.
"""

COMPARED = 1000
"""Pairs by which it is seen whether a stage has learned them."""

ALIGNED = 2048
"""Samples, at most, by which a measure is turned towards the student."""

BATCH = 500
"""Latents that a generator is called with at a time."""


@dataclass(frozen=True)
class Measure:
    """A measure of a merge: what makes its generator, its weight, and a name of its state.

    Of a conditional generator also how often it has each label (`Latents.labels`); one that it
    has never is not learned from it. Empty: as the latents of the merge say.
    """

    generator: Callable[[], nn.Module]
    weight: float
    digest: str
    labels: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, generator: nn.Module, weight: float, name: str = "", labels: tuple[float, ...] = ()
    ) -> Measure:
        """Return the measure of a generator that is there already."""
        return cls(lambda: generator, weight, name or digest(generator.state_dict()), labels)


def label_frequencies(
    counts: Sequence[Sequence[float]] | None, n: int, labels: Labels
) -> list[tuple[float, ...]]:
    """Return how often each of n generators has each label; empty if nobody says."""
    if counts is None:
        return [()] * n
    found = [frequencies(each) for each in counts]
    number = len(frequencies(labels))
    if len(found) != n or any(len(each) != number for each in found):
        raise ValueError(
            f"label_counts must be {number} counts of each of {n} generators, not "
            f"{[len(each) for each in found]}"
        )
    return found


class UselessMeasures(ValueError):
    """Generators that fail, or make what nothing can be learned from: why, by digest."""

    def __init__(self, why: Mapping[str, str]) -> None:
        super().__init__(dict(why))
        self.why = dict(why)

    def __str__(self) -> str:
        """Say why."""
        return "; ".join(sorted(set(self.why.values())))


@dataclass(frozen=True)
class Pool:
    """Latents (n, latent_dim), what each should become (n, ...), where it is, its weight (n,).

    That is, of which label, or of which of a few where there are many, and on which branch of the
    code. Across labels, too much distance between them would make up for too little within them.
    """

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

    @torch.no_grad()
    def far(self, generator: nn.Module) -> float:
        """Return the energy distance of what it makes, of the mean distance within the pool."""
        some = torch.randperm(len(self.z), generator=torch.Generator().manual_seed(0))[:COMPARED]
        z, x = self.z[some.to(self.z.device)], self.x[some.to(self.x.device)]
        within = torch.pdist(x.flatten(1)).mean().clamp(min=1e-12)
        return (energy_distance(generator(z), x) / within).item()

    def near(self, weight: float) -> Regularizer | None:
        """Regularizer weight * E||G(z) - x|| over pairs."""
        if not weight:
            return None
        pairs = self.pairs()

        def term(generator: nn.Module, _: Tensor, fakes: Tensor, rng: torch.Generator) -> Tensor:
            z, x, _ = pairs(len(fakes), rng)
            distance: Tensor = (generator(z) - x).flatten(1).norm(dim=1).mean()
            return weight * distance

        return term


@torch.no_grad()
def mixture_pool(
    measures: Sequence[Measure],
    latents: Latents,
    wanted: int,
    batch: int,
    rng: torch.Generator,
    student: nn.Module,
) -> Pool:
    """Draw pairs of the exact mixture, of each measure by a power of its share (`POWER`).

    If what is learned of a measure has an error as 1 / pairs, its root would make the mixture's
    error, sum_k lambda_k / pairs_k, the least. A measure's latents are turned so that its map is
    near to what `student`, in eval mode, makes in its cell already (`nearest_turn`). Where there
    are labels, each has its own mixture: of the measures that have it, by how much of it they have.

    Raises
    ------
    UselessMeasures
        Of all measures that are of no use: many of them cost no more than one.
    """
    code = Code([measure.weight for measure in measures])
    parts_of = [share**POWER for share in code.shares]
    labels = max(min(len(latents.labels), batch // OF_A_LABEL), 1)  # of which distances are taken
    branches = code.branches(max(int(math.log2(batch / labels / OF_A_BRANCH)), 0))
    often = [measure.labels or latents.labels for measure in measures]
    parts: list[tuple[Tensor, ...]] = []
    useless: dict[str, str] = {}
    for k, measure in enumerate(measures):
        generator = measure.generator()
        try:
            if not parts:
                size = pool_size(measure, generator, latents.width, wanted, rng.device)
            n = max(round(size * parts_of[k] / math.fsum(parts_of)), 2)
            inner = replace(latents, labels=often[k]).draw(n, rng)
            z = _embedded(code, k, inner, latents, often)
            if latents.plain and not useless:
                inner = _turned(measure, generator, inner, student, z)
            x = samples_of(measure, generator, inner)
        except UselessMeasures as found:
            useless |= found.why
            continue
        where = branches[k].to(x.device) * labels + inner[:, -1].long() % labels  # 0 without labels
        weight = torch.full((len(inner),), code.shares[k] / len(inner), device=rng.device)
        parts.append((z, x, where, weight))
    if useless:
        raise UselessMeasures(useless)
    return Pool(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _turned(
    measure: Measure, generator: nn.Module, inner: Tensor, student: nn.Module, z: Tensor
) -> Tensor:
    """Turn a measure's latents so that its map is near to what the student makes at latents z."""
    some = inner[:ALIGNED]
    made = samples_of(measure, generator, some)
    try:
        there = _in_batches(student, z[:ALIGNED])
    except Exception:  # a stranger's, too, where it starts as the first measure's generator
        return inner
    return inner @ nearest_turn(some, made, there).T


def _embedded(
    code: Code, k: int, inner: Tensor, latents: Latents, often: Sequence[tuple[float, ...]]
) -> Tensor:
    """Return the rows of the mixture that stand for rows of measure k: label by label."""
    cell = torch.full((len(inner),), k, device=inner.device)
    if not latents.labels:
        return code.embed(cell, inner, latents=latents)
    rows = inner.clone()
    for label in inner[:, -1].unique():
        here = inner[:, -1] == label
        weights = [s * o[int(label)] for s, o in zip(code.shares, often, strict=True)]
        rows[here] = code.embed(cell[here], inner[here], weights, latents)
    return rows


def displacement_pool(
    measures: Sequence[Measure],
    t: float,
    latents: Latents,
    wanted: int,
    batch: int,
    rng: torch.Generator,
) -> Pool:
    """Draw pairs of McCann's interpolation of two measures, coupled batch by batch."""
    one, other = (measure.generator() for measure in measures)
    size = pool_size(measures[0], one, latents.width, wanted, rng.device)
    parts: list[tuple[Tensor, Tensor]] = []
    for n in [batch] * math.ceil(size / batch):
        z = latents.draw(n, rng)
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
    UselessMeasures
        If it fails, or makes samples that are not finite.
    """
    try:
        x = _in_batches(generator, z)
    except Exception as error:  # what a stranger's numbers do inside a network, nobody knows
        why = f"the generator fails to generate: {error}"
        raise UselessMeasures({measure.digest: why}) from error
    if not x.isfinite().all():
        raise UselessMeasures({measure.digest: "the generator makes samples that are not finite"})
    return x


def _in_batches(generator: nn.Module, z: Tensor) -> Tensor:
    return torch.cat([generator(part) for part in in_batches(z, BATCH)])


def pool_size(
    measure: Measure, generator: nn.Module, width: int, wanted: int, device: torch.device
) -> int:
    """Return how many pairs of a measure's samples are drawn: no more than fit a pool."""
    sample = samples_of(measure, generator, torch.zeros(2, width, device=device))[0]
    bytes_each = 4 * (width + sample.numel())
    return max(min(wanted, PAIRS, BYTES // int(bytes_each)), 1)


def look_at(
    measure: Measure, generator: nn.Module, latents: Latents, device: torch.device, seed: int
) -> None:
    """Raise UselessMeasures if a measure is of no use, by as many samples as a pool has."""
    size = pool_size(measure, generator, latents.width, PAIRS, device)
    rng = torch.Generator(device).manual_seed(seed)
    samples_of(measure, generator, latents.draw(size, rng))
