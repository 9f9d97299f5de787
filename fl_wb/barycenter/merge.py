"""One stage of the barycenter: several generators merged into one, in as long as it says before."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import nn

from fl_wb.barycenter.scales import rescale, scales
from fl_wb.barycenter.stage import Stage, check_conditional, key_of
from fl_wb.barycenter.teachers import (
    Measure,
    Pool,
    UselessMeasures,
    displacement_pool,
    look_at,
    mixture_pool,
    pool_size,
    samples_of,
)
from fl_wb.generators.copies import copy_of, trainable_copy
from fl_wb.generators.latents import Latents
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import fingerprint
from fl_wb.training.distillation import distill
from fl_wb.training.statistics import learning, settle
from fl_wb.training.wgan import Progress, Sampler, resample, train_wgan

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's

CRITICS_POOL = 8192
"""Samples of each measure that a stage's critics see, at most: drawn once, as from a data set."""

TIMED = 20
"""Iterations that are done on copies first, so that it can be said how long a stage will take."""

ATTEMPTS = 3
"""A stage starts as somebody's upload, and some weights nothing can move: then as another's."""

MISSED = 0.1
"""Of the mean distance within what is learned: whoever is as far from it has learned nothing.
Stages of digits end at a hundredth or less."""


@dataclass(frozen=True)
class Merge:
    """What all stages of one barycenter share.

    Attributes
    ----------
    settings
        How a stage merges.
    critic
        Makes a fresh critic.
    latents
        What the generators, each of one tensor, are called with.
    seed
        Of all randomness.
    store
        Of finished stages and checkpoints.
    device
        Where to train.
    """

    settings: Stage
    critic: Callable[[], nn.Module]
    latents: Latents
    seed: int
    store: StageStore
    device: torch.device

    def __post_init__(self) -> None:
        """Refuse settings that a conditional generator cannot be merged with."""
        if self.latents.labels:
            check_conditional(self.settings)

    def run(
        self,
        measures: Sequence[Measure],
        initial: nn.Module | None,
        callback: Progress | None,
        name: str = "Stage",
    ) -> tuple[nn.Module, str]:
        """Merge measures; returns the merged generator and its key in the store.

        The student starts as ``initial``, or else as the first measure's generator. The log says
        how long what has this name will take.
        """
        student = self._student(measures, initial)
        critics = self._critics()
        key = self._key(measures, student, critics)
        finished = self.store.get(key)
        if finished is not None:
            try:
                student.load_state_dict(finished)
                return student, key
            except RuntimeError:
                self.store.set_aside(key, f"Stage {key[:12]} holds another network")
        self.announce(name, measures, student)
        student = self._learned(name, measures, student, critics, key, callback)
        self.store.put(key, student.state_dict(), {"settings": json.dumps(asdict(self.settings))})
        return student, key

    def seconds(self, measures: Sequence[Measure], initial: nn.Module | None = None) -> float:
        """Return how long a stage of these measures will train: some iterations of it say."""
        settings, ends = self.settings, (list[float](), list[float]())
        training = settings.training
        few = replace(
            settings,
            distillation=replace(settings.distillation, iterations=TIMED),
            training=replace(training, iterations=min(TIMED, training.iterations), warmup=0),
        )

        def told(done: int, total: int, losses: dict[str, float]) -> None:
            ends["distillation" in losses].append(perf_counter())

        student = self._student(measures, initial)
        once = replace(self, settings=few, store=StageStore())
        try:
            once._trained(measures[:2], student, self._critics(), f"{0:015}", told)
        except UselessMeasures as found:
            raise UselessMeasures(found.why | self.useless(measures, initial)) from found
        # a median: halfway, statistics are taken, which is done as often however long a stage is
        steps = [torch.tensor(end, dtype=torch.float64).diff().median() for end in ends]
        step, distilled = (0.0 if each.isnan() else each.item() for each in steps)
        distilling = distilled * (settings.iterations - training.iterations)
        return distilling + step * (training.iterations + training.warmup / training.critic_steps)

    def useless(
        self, measures: Sequence[Measure], initial: nn.Module | None = None
    ) -> dict[str, str]:
        """Return why measures are of no use, by digest: of all that a stage of them would find."""
        rng = torch.Generator(self.device).manual_seed(self.seed)
        try:
            student = self._student(measures, initial)
            self._pool([self._on_device(measure) for measure in measures], rng, student)
        except UselessMeasures as found:
            return found.why
        return {}

    def announce(self, name: str, measures: Sequence[Measure], initial: nn.Module | None) -> None:
        """Log how long a stage will train, unless it is over in no time."""
        if (iterations := self.settings.iterations) > 10 * TIMED:
            seconds = self.seconds(measures, initial)
            log.info("%s: about %.0f s (%s iterations)", name, seconds, f"{iterations:,}")

    def within(
        self, budget: float, measures: Sequence[Measure], initial: nn.Module | None
    ) -> Merge:
        """Return this with as many iterations as a stage of these measures can do in so long."""
        return replace(self, settings=self.settings.within(budget, self.seconds(measures, initial)))

    def _student(self, measures: Sequence[Measure], initial: nn.Module | None) -> nn.Module:
        student = initial if initial is not None else measures[0].generator()
        return trainable_copy(student).to(self.device).eval()

    def placed(self, generator: nn.Module) -> nn.Module:
        """Copy a generator to the device, in the mode in which it is sampled."""
        return copy_of(generator).to(self.device).eval()

    def alone(self, measure: Measure) -> nn.Module:
        """Return the generator of a measure that no stage merges, looked at as a stage would."""
        generator = self.placed(measure.generator())
        look_at(measure, generator, self.latents, self.device, self.seed)
        return generator

    def _learned(
        self,
        name: str,
        measures: Sequence[Measure],
        student: nn.Module,
        critics: list[nn.Module],
        key: str,
        callback: Progress | None,
    ) -> nn.Module:
        """Train, and where the start could not learn, again from another measure's generator."""
        best, least = student, math.inf
        for attempt in range(min(ATTEMPTS, len(measures))):
            if attempt:
                log.warning("%s: its start has learned nothing; it starts as another", name)
                student, key = self._student(measures[attempt:], None), f"{key}-{attempt}"
            student, far = self._trained(measures, student, critics, key, callback)
            if not least <= far:  # nor of a first one of which nothing can be said
                best, least = student, far
            if far <= MISSED or self.settings.iterations <= 10 * TIMED:
                break
        return best

    def _trained(
        self,
        measures: Sequence[Measure],
        student: nn.Module,
        critics: list[nn.Module],
        key: str,
        callback: Progress | None,
    ) -> tuple[nn.Module, float]:
        """Distil and train, in the mode in which the nodes go on from what comes out.

        And say how far that is from what was to be learned; see `Pool.far`.
        """
        seed, settings = int(key[:15], 16), self.settings
        start = self.store.checkpoint(f"{key}-start")
        training = self.store.checkpoint(key)
        rng = torch.Generator(self.device).manual_seed(seed)
        pool = self._pool([self._on_device(measure) for measure in measures], rng, student)
        norms = scales(student)
        learning(student)
        statistics = partial(settle, latents=self.latents, trained=len(pool.z), seed=seed)
        if settings.start == "distilled":
            distill(
                student,
                pool.pairs(),
                settings.distillation,
                seed=seed,
                callback=callback,
                checkpoint=start,
                statistics=statistics,
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
                latent_dim=self.latents.dim,
                seed=seed,
                regularizer=pool.near(settings.fidelity),
                callback=callback,
                checkpoint=training,
            ).generator
        if settings.training.iterations or settings.start == "previous":
            statistics(student)
        rescale(student, norms, self.latents, seed=seed)
        start.clear()
        training.clear()
        return student.eval(), pool.far(student)

    def _on_device(self, measure: Measure) -> Measure:
        return replace(
            measure, generator=lambda: self.placed(measure.generator()).requires_grad_(False)
        )

    def _pool(self, measures: Sequence[Measure], rng: torch.Generator, student: nn.Module) -> Pool:
        settings = self.settings
        batch = settings.distillation.batch(student)
        wanted = max(settings.distillation.iterations * batch, 1)
        if settings.start == "previous":  # then a critic's samples are all that is needed
            wanted = max(settings.training.reals, 1)
        if settings.geodesic != "displacement":
            return mixture_pool(measures, self.latents, wanted, batch, rng, student)
        t = measures[1].weight / (measures[0].weight + measures[1].weight)
        return displacement_pool(measures, t, self.latents, wanted, batch, rng)

    def _samples(self, measure: Measure, rng: torch.Generator) -> Sampler:
        generator = measure.generator()
        wanted = min(self.settings.training.reals, CRITICS_POOL)
        size = pool_size(measure, generator, self.latents.width, wanted, self.device)
        return resample(samples_of(measure, generator, self.latents.draw(size, rng)))

    def _critics(self) -> list[nn.Module]:
        # Fresh in every stage, from the seed alone: the caller's random state neither decides
        # the result nor is moved by it.
        number = 2 if self.settings.geodesic == "two_critics" else 1
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return [self.critic() for _ in range(number)]

    def _key(
        self, measures: Sequence[Measure], student: nn.Module, critics: list[nn.Module]
    ) -> str:
        """Name all that a stage depends on, what the network's code does included."""
        z = self.latents.some().to(self.device)
        with torch.no_grad():
            does = student(z).cpu()
        total = math.fsum(measure.weight for measure in measures)
        return key_of(
            self.settings,
            measures=[[m.digest, m.weight / total, *m.labels] for m in measures],
            start=fingerprint(student, z),
            critics=[fingerprint(copy_of(critic).cpu().eval(), does) for critic in critics],
            seed=self.seed,
            device=self.device.type,
        )
