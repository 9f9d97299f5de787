"""Distillation: regress a generator on a known map of the latent.

Where a good generator is already known as a function z -> sample (the exact mixture of two
generators, a full-precision generator), matching it latent by latent is a plain regression:
it needs no critic and no balance, and at equal seconds it measured better than a WGAN loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # of all convolutions, transposed and lazy ones too

from fl_wb.generators.latents import Latents
from fl_wb.generators.sampling import device_of
from fl_wb.settings import Settings, above, at_least
from fl_wb.training.checkpoints import Checkpoint, TrainingState
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.statistics import hold
from fl_wb.training.wgan import Progress
from fl_wb.transport import energy_distance

OF_ANY, OF_CONVOLUTIONAL = 200, 32
"""Latents in a batch, by the network that learns. A step of a convolutional one takes as long as
its batch is large, and it learns by steps: of 3x32x32, batches of 32 made a better generator in
less time (``benchmarks.image_stages``)."""

Pairs = Callable[[int, torch.Generator], tuple[Tensor, ...]]
"""Draws n latents (n, latent_dim), the sample (n, ...) that each should become, and, if the latents
are those of several measures or labels, where each is (n,): see `fl_wb.barycenter.teachers`."""


def pairs_of(teacher: Callable[[Tensor], Tensor], latents: Latents) -> Pairs:
    """Pairs of a known map of the latent: z of this law and teacher(z), without a graph."""

    @torch.no_grad()
    def draw(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        z = latents.draw(n, rng)
        return z, teacher(z)

    return draw


@dataclass
class Distillation(Settings):
    """How a generator is distilled.

    Attributes
    ----------
    iterations
        Steps of Adam.
    batch_size
        Latents in a batch; None: as many as suit the network (`batch`).
    lr
        Learning rate at the start; a cosine takes it to zero. 3e-3 measured better than 1e-3 at
        the same seconds.
    """

    iterations: Annotated[int, at_least(0)] = 2000
    batch_size: Annotated[int, at_least(2)] | None = None
    lr: Annotated[float, above(0)] = 3e-3

    def batch(self, student: nn.Module) -> int:
        """Return how many latents are in a batch of this network: few, if it is convolutional."""
        convolutional = any(isinstance(part, _ConvNd) for part in student.modules())
        return self.batch_size or (OF_CONVOLUTIONAL if convolutional else OF_ANY)


def distill(
    student: nn.Module,
    pairs: Pairs,
    settings: Distillation,
    *,
    energy: float = 1.25,
    seed: int = 0,
    groups: Sequence[dict[str, object]] | None = None,
    callback: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    statistics: Callable[..., None] | None = None,
) -> None:
    """Train `student`, in place, to make of each latent z the sample x that it is paired with.

    The loss is E||student(z) - x||_1 / sqrt(d) + energy * ED(student(z), x), for samples of d
    values. Sharing z is a coupling, so the first term bounds a multiple of W1 between the two
    measures from above; it alone would shrink the samples of a student that cannot follow
    everywhere towards their median, which the second, a distance of the measures, sees. Where
    latents are of several measures or labels it is taken within each of them, and so sees, too,
    what a student makes at the border of two cells and neither measure has.

    Parameters
    ----------
    student : nn.Module
        A generator, trained in the mode that it is in: eval mode keeps normalisation statistics.
        Parameters that require no gradient stay as they are.
    pairs : callable
        `pairs_of` a teacher, say.
    settings : Distillation
    energy : float
        Weight of the energy distance in the loss.
    groups : optional
        Adam's parameter groups. Each may have its own ``lr``, and say at which share of the
        iterations it has decayed to zero (``until``, 1 by default).
    seed, callback, checkpoint
        As in `fl_wb.training.wgan.train_wgan`.
    statistics : callable, optional
        `fl_wb.training.statistics.settle` but for the generator, for a student in train mode. A
        batch's statistics make another sample of a latent than those of all latents, and it is
        sampled with these: so after half of the iterations its normalisations take them and keep
        them, and the second half learns with what stays. In the end both modes make the same.
    """
    rng = torch.Generator(device_of(student)).manual_seed(seed)
    trained = [p for p in student.parameters() if p.requires_grad]
    adam = torch.optim.Adam(groups or trained, lr=settings.lr, fused=True)
    batch = settings.batch(student)
    rates = [(group["lr"], group.get("until", 1.0)) for group in adam.param_groups]
    state = TrainingState({"student": student}, {"student": adam}, rng)
    if checkpoint:
        state.resume(checkpoint)
    half = settings.iterations // 2
    held = hold(student) if statistics and state.iteration > half else []
    while state.iteration < settings.iterations:
        for group, (rate, until) in zip(adam.param_groups, rates, strict=True):
            x = min(state.iteration / settings.iterations / until, 1.0)
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * x))
        if statistics and state.iteration == half:
            statistics(student)
            held = hold(student)
        z, target, *cells = pairs(batch, rng)
        with own_random_numbers(seed + state.iteration):
            samples = student(z)
        distance = (samples - target).abs().mean() * math.sqrt(target[0].numel())
        loss = distance + energy * energy_distance(samples, target, *cells)
        adam.zero_grad()
        loss.backward()
        adam.step()
        state.iteration += 1
        if checkpoint:
            state.save_if_due(checkpoint)
        if callback:
            callback(state.iteration, settings.iterations, {"distillation": loss.item()})
    if statistics:
        statistics(student, held=held)
        for norm in held:
            norm.train()
