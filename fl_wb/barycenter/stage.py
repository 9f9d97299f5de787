"""One stage of the barycenter: several generators merged into one, on a named geodesic.

W1(nu_{k-1}, mu_k) has many minimisers: every point of every W1 geodesic. A stage therefore
names its geodesic, and the weights go into the position on it, never into the critics' losses,
where the heavier measure alone would be optimal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from fl_wb.barycenter.teachers import (
    Measure,
    Pool,
    displacement_pool,
    latents,
    mixture_pool,
    pool_size,
    samples_of,
)
from fl_wb.generators.code import Code
from fl_wb.generators.copies import copy_of
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import fingerprint
from fl_wb.settings import Settings, at_least, one_of
from fl_wb.training.distillation import Distillation, distill
from fl_wb.training.statistics import settle
from fl_wb.training.wgan import Progress, Regularizer, Sampler, Training, resample, train_wgan

CRITICS_POOL = 8192
"""Samples of each measure that a stage's critics see, at most: drawn once, as from a data set."""

ENERGY = 2.5
"""Weight of the energy distance within the cells. Of ten sources of digits, half of it or the same
on the whole samples left half as much energy distance again, twice of it cost coverage."""

GEODESICS = ("two_critics", "mixture", "displacement")
STARTS = ("distilled", "previous")

VERSION = 3
"""Of the algorithm: a store's results of another one are not taken for its own."""


@dataclass
class Stage(Settings):
    """How a stage merges generators.

    Attributes
    ----------
    geodesic
        ``mixture``: one critic against samples of all measures in proportion to their weights,
        which keeps samples sharp. ``two_critics``: the paper's saddle problem of two measures, one
        critic each at equal weights. ``displacement``: one critic against (1-t) x + t T(x), T the
        optimal coupling of two batches, which morphs samples.
    start
        ``previous``: nu_{k-1}, as in the paper. ``distilled``: a point of the geodesic, as pairs of
        latents and samples (`fl_wb.barycenter.teachers`), distilled into one generator first
        (ours).
    fidelity
        Weight in the generator's WGAN loss of E||G(z) - x|| over these pairs, which bounds
        W1(G, mixture) from above; 0 for the paper's loss. The critic sharpens, this holds the
        place on the geodesic.
    distillation
        How the distilled start is made.
    training
        The WGAN-GP that follows.
    """

    geodesic: Annotated[str, one_of(*GEODESICS)] = "mixture"
    start: Annotated[str, one_of(*STARTS)] = "distilled"
    fidelity: Annotated[float, at_least(0)] = 1.0
    distillation: Distillation = field(
        default_factory=lambda: Distillation(iterations=2500, batch_size=200, lr=1e-2)
    )
    training: Training = field(default_factory=lambda: Training(iterations=0, warmup=100))

    @property
    def iterations(self) -> int:
        """Of the distillation and the WGAN together."""
        distilled = self.distillation.iterations if self.start == "distilled" else 0
        return distilled + self.training.iterations


@dataclass(frozen=True)
class Merge:
    """What all stages of one barycenter share.

    Attributes
    ----------
    settings
        How a stage merges.
    critic
        Makes a fresh critic.
    dim
        Dimension of the latents.
    seed
        Of all randomness.
    store
        Of finished stages and checkpoints.
    device
        Where to train.
    """

    settings: Stage
    critic: Callable[[], nn.Module]
    dim: int
    seed: int
    store: StageStore
    device: torch.device

    def run(
        self, measures: Sequence[Measure], initial: nn.Module | None, callback: Progress | None
    ) -> tuple[nn.Module, str]:
        """Merge measures; returns the merged generator and its key in the store.

        The student starts as ``initial``, or else as the first measure's generator.
        """
        student = self.placed(initial if initial is not None else measures[0].generator())
        if not any(parameter.requires_grad for parameter in student.parameters()):
            student.requires_grad_(True)  # handed over as a network that only generates
        critics = self._critics()
        key = self._key(measures, student, critics)
        finished = self.store.get(key)
        if finished is not None:
            try:
                student.load_state_dict(finished)
                return student, key
            except RuntimeError:
                self.store.set_aside(key, f"Stage {key[:12]} holds another network")
        student = self._trained(measures, student, critics, key, callback)
        self.store.put(key, student.state_dict(), {"settings": json.dumps(asdict(self.settings))})
        return student, key

    def placed(self, generator: nn.Module) -> nn.Module:
        """Copy a generator to the device, in the mode in which it is sampled."""
        return copy_of(generator).to(self.device).eval()

    def _trained(
        self,
        measures: Sequence[Measure],
        student: nn.Module,
        critics: list[nn.Module],
        key: str,
        callback: Progress | None,
    ) -> nn.Module:
        """Distil and train, in the mode in which the nodes go on from what comes out."""
        seed, settings = int(key[:15], 16), self.settings
        start = self.store.checkpoint(f"{key}-start")
        training = self.store.checkpoint(key)
        student.train()
        rng = torch.Generator(self.device).manual_seed(seed)
        pool = self._pool([self._on_device(measure) for measure in measures], rng)
        if settings.start == "distilled":
            distill(
                student,
                pool.pairs(),
                settings.distillation,
                energy=ENERGY,
                seed=seed,
                callback=callback,
                checkpoint=start,
            )
        if settings.training.iterations:
            reals = [resample(pool.samples(min(settings.training.reals, CRITICS_POOL), rng))]
            if settings.geodesic == "two_critics":
                reals = [self._samples(self._on_device(measure), rng) for measure in measures]
            student = train_wgan(
                student,
                critics,
                reals,
                settings.training,
                latent_dim=self.dim,
                seed=seed,
                regularizer=_near(pool, settings.fidelity),
                callback=callback,
                checkpoint=training,
            ).generator
        settle(student, self.dim, seed=seed)
        start.clear()
        training.clear()
        return student.eval()

    def _on_device(self, measure: Measure) -> Measure:
        return Measure(
            lambda: self.placed(measure.generator()).requires_grad_(False),
            measure.weight,
            measure.digest,
        )

    def _pool(self, measures: Sequence[Measure], rng: torch.Generator) -> Pool:
        settings = self.settings
        wanted = max(settings.distillation.iterations * settings.distillation.batch_size, 1)
        if settings.start == "previous":  # then a critic's samples are all that is needed
            wanted = max(settings.training.reals, 1)
        if settings.geodesic != "displacement":
            code = Code([measure.weight for measure in measures])
            return mixture_pool(measures, code, self.dim, wanted, rng)
        t = measures[1].weight / (measures[0].weight + measures[1].weight)
        batch = settings.distillation.batch_size
        return displacement_pool(measures, t, self.dim, wanted, batch, rng)

    def _samples(self, measure: Measure, rng: torch.Generator) -> Sampler:
        generator = measure.generator()
        wanted = min(self.settings.training.reals, CRITICS_POOL)
        size = pool_size(generator, self.dim, wanted, self.device)
        return resample(samples_of(measure, generator, latents(size, self.dim, rng)))

    def _critics(self) -> list[nn.Module]:
        # Fresh in every stage, from the seed alone: the caller's random state neither decides
        # the result nor is moved by it.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return [
                self.critic() for _ in range(2 if self.settings.geodesic == "two_critics" else 1)
            ]

    def _key(
        self, measures: Sequence[Measure], student: nn.Module, critics: list[nn.Module]
    ) -> str:
        """Name all that a stage depends on, what the network's code does included."""
        z = torch.linspace(-2, 2, 4 * self.dim).reshape(4, self.dim).to(self.device)
        with torch.no_grad():
            does = student(z).cpu()
        total = math.fsum(measure.weight for measure in measures)
        went_in = {
            "version": VERSION,
            "measures": [[measure.digest, measure.weight / total] for measure in measures],
            "start": fingerprint(student, z),
            "critics": [fingerprint(copy_of(critic).cpu().eval(), does) for critic in critics],
            "settings": asdict(self.settings),
            "seed": self.seed,
            "device": self.device.type,
        }
        return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()


def _near(pool: Pool, weight: float) -> Regularizer | None:
    """Regularizer weight * E||G(z) - x|| over the pairs of a pool."""
    if not weight:
        return None
    pairs = pool.pairs()

    def term(generator: nn.Module, _: Tensor, fakes: Tensor, rng: torch.Generator) -> Tensor:
        z, x, _ = pairs(len(fakes), rng)
        distance: Tensor = (generator(z) - x).flatten(1).norm(dim=1).mean()
        return weight * distance

    return term
