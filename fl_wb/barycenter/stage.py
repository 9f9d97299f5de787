"""The settings of a stage, which merges several generators into one on a named geodesic.

W1(nu_{k-1}, mu_k) has many minimisers: every point of every W1 geodesic. A stage therefore
names its geodesic, and the weights go into the position on it, never into the critics' losses,
where the heavier measure alone would be optimal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from torch import nn

from fl_wb.settings import Settings, above, at_least, one_of
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training

log = logging.getLogger("flwr")

GEODESICS = ("two_critics", "mixture", "displacement")
STARTS = ("distilled", "previous")

FEW = 10
"""Measures that are learned in the distillation's iterations; more take more."""

LONGEST = 2.8
"""Times as many iterations as a stage has at most."""

VERSION = 6
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
        How the distilled start is made; its iterations are those of ten measures or fewer, its
        batches small if the generators are convolutional (see `of_measures`).
    training
        The WGAN-GP that follows.
    budget
        Seconds that all stages of a barycenter may take together: where they would take longer, the
        iterations are fewer. How many depends on the machine and on what else it does; the log says
        it, and with as many the same generator is made again anywhere.
    """

    geodesic: Annotated[str, one_of(*GEODESICS)] = "mixture"
    start: Annotated[str, one_of(*STARTS)] = "distilled"
    fidelity: Annotated[float, at_least(0)] = 1.0
    distillation: Distillation = field(
        default_factory=lambda: Distillation(iterations=2500, lr=1e-2)
    )
    training: Training = field(default_factory=lambda: Training(iterations=0, warmup=100))
    budget: Annotated[float, above(0)] | None = None

    def __post_init__(self) -> None:
        """Check all fields, and that two critics, if they are named, are trained."""
        super().__post_init__()
        if self.geodesic == "two_critics" and not self.training.iterations:
            raise ValueError(
                "geodesic='two_critics' must have training.iterations of 1 or more, not 0: without "
                "a WGAN no critic is trained, and it would be the mixture"
            )

    @classmethod
    def quick(cls) -> Stage:
        """Return settings with the small batches of convolutional generators, for any."""
        return cls(distillation=Distillation(iterations=2500, batch_size=32, lr=1e-2))

    def of_result(self) -> dict[str, Any]:
        """Return what the result depends on: not the budget, which shows in the iterations."""
        return {k: v for k, v in asdict(self).items() if k != "budget"}

    @property
    def iterations(self) -> int:
        """Of the distillation and the WGAN together."""
        distilled = self.distillation.iterations if self.start == "distilled" else 0
        return distilled + self.training.iterations

    def of_measures(self, n: int, generator: nn.Module) -> Stage:
        """Return the settings of a stage that merges n measures: longer, where these are many.

        Ten of digits are learned as well in `iterations` as two are; of forty, each with a quarter
        of the latents, a generator covers a tenth less unless it takes twice as long. Where nobody
        set the size of a batch, it becomes that which suits the measures' generator.
        """
        longer = min(max(n / FEW, 1.0) ** 0.75, LONGEST)
        distillation = self.distillation
        suited = replace(
            distillation,
            iterations=round(longer * distillation.iterations),
            batch_size=distillation.batch(generator),
        )
        return replace(self, distillation=suited)

    def shortened(self, share: float) -> Stage:
        """Return these settings with that share of their iterations, one at least of each kind."""

        def of(iterations: int) -> int:
            return max(round(iterations * share), min(iterations, 1))

        return replace(
            self,
            distillation=replace(self.distillation, iterations=of(self.distillation.iterations)),
            training=replace(self.training, iterations=of(self.training.iterations)),
        )

    def within(self, budget: float, seconds: float) -> Stage:
        """Return these settings with as many iterations as so long lasts, of what takes `seconds`.

        In steps of a factor of the root of two, so that a second call mostly finds as many.
        """
        settings, share = replace(self, budget=None), budget / max(seconds, 1e-9)
        if share >= 1:
            return settings
        few = settings.shortened(2 ** (math.floor(2 * math.log2(share)) / 2))
        log.info(
            "a budget of %.3g s a stage: %s of %s iterations",
            budget,
            f"{few.iterations:,}",
            f"{settings.iterations:,}",
        )
        return few


def stage_of(
    stage: Stage | None,
    geodesic: str | None,
    start: str | None,
    iterations: int | None,
    budget: float | None,
) -> Stage:
    """Return the settings of a stage, with those that were given apart in place of its own."""
    settings = stage or Stage()
    training = settings.training
    if geodesic == "two_critics" and not training.iterations:
        training = replace(training, iterations=Training().iterations)
    settings = replace(
        settings,
        training=training,
        geodesic=geodesic or settings.geodesic,
        start=start or settings.start,
        budget=settings.budget if budget is None else budget,
    )
    if iterations is None:
        return settings
    if settings.start == "distilled":
        distillation = replace(settings.distillation, iterations=iterations)
        return replace(settings, distillation=distillation)
    return replace(settings, training=replace(settings.training, iterations=iterations))


def key_of(settings: Stage, **went_in: object) -> str:
    """Name a stage by all that its result depends on."""
    named = {"version": VERSION, "settings": settings.of_result(), **went_in}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def check_conditional(settings: Stage) -> None:
    """Raise ValueError for a stage that would lose the labels: only a distillation knows them."""
    if (settings.geodesic, settings.start) != ("mixture", "distilled"):
        raise ValueError(
            "conditional generators merge with geodesic='mixture' and start='distilled' alone, "
            f"not {settings.geodesic!r} and {settings.start!r}"
        )
