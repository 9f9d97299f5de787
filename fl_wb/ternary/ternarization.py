"""Ternarization of a generator: weights and thresholds learned together.

Each weight tensor becomes a ternary plane (`fl_wb.ternary.planes`), or the sum of a few where one
does not follow. Biases and normalisation stay in full precision. `fl_wb.ternary.packing` has the
file format.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fl_wb.generators.copies import copy_of, trainable_copy
from fl_wb.generators.latents import Draw, Latents
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import (
    Labels,
    check_function,
    device_of,
    driven,
    latents_of,
    undriven,
)
from fl_wb.settings import above, at_least
from fl_wb.ternary.planes import (
    STATISTICS,
    Ternary,
    planes_needed,
    share_lost,
    take_statistics,
    ternarizable,
)
from fl_wb.ternary.rotation import turned
from fl_wb.training.distillation import Distillation, distill, pairs_of
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.statistics import own_maps
from fl_wb.training.wgan import Progress

log = logging.getLogger(__name__)

SETTLED = 0.7
"""Share of the iterations after which weights and thresholds stand still."""

REST_LR = 1e-2
"""Learning rate of what stays in full precision (biases, normalisation): it learns to the end."""

PLANES = 3
"""At most so many planes: nothing of a weight's error is left to see."""

RUINED = 0.75
"""Share of the teacher's variation that no ternary generator should lose."""


@dataclass
class Ternarization(Distillation):
    """How a generator is ternarized: distilled from the one in full precision.

    Regressing on that generator latent by latent measured better than the paper's WGAN loss, and
    a WGAN afterwards no better than as many seconds more of the regression.

    Attributes
    ----------
    iterations, batch_size, lr
        As of any distillation; ``lr`` is of the weights.
    energy
        Weight of the energy distance. Three values cannot follow everywhere, and it sees what
        that does to the measure: it weighs more here than in other distillations.
    threshold_lr
        Learning rate of Delta / std(W); 0 keeps the thresholds where they start. Much larger
        rates drift until no weight is zero.
    planes
        At most so many ternary planes a weight, 2 bits each: a layer gets as many as it needs.
    """

    batch_size: Annotated[int, at_least(2)] | None = 128
    lr: Annotated[float, above(0)] = 2e-3
    energy: Annotated[float, at_least(0)] = 2.5
    threshold_lr: Annotated[float, at_least(0)] = 2e-4
    planes: Annotated[int, at_least(1, below=4)] = 2


def ternarize(
    generator: nn.Module,
    *,
    iterations: int | None = None,
    settings: Ternarization | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    labels: Labels = None,
    latents: str | Draw = "normal",
    device: str | torch.device | None = None,
    callback: Progress | None = None,
) -> nn.Module:
    """Return a copy whose every linear and convolution weight takes three values, or a few more.

    A weight is one ternary plane, or the sum of as many as its layer needs. Weights and thresholds
    are trained together to generate, latent by latent, what the full-precision generator
    generates. No data is needed. The latent is turned first where a linear layer takes it
    (see `fl_wb.ternary.rotation`): the measure stays, but not what a latent
    becomes, so that cells of a code (`fl_wb.generators.code`) have no meaning any more. The latent
    of a `Reweighted` generator, which uses them, is not turned.

    A generator that lost more than training makes up for is returned as it was rounded if that is
    better, and the loss is logged.

    Parameters
    ----------
    generator : nn.Module
        Left alone.
    iterations : int, optional
        In place of those in `settings`.
    settings : Ternarization, optional
    seed : int
        The same arguments give the same generator.
    latent_dim : int, optional
        For a generator without the attribute.
    labels, latents : optional
        As in `fl_wb.generators.sampling.generate`.
    device : optional
        Where to train; where the generator is if None.
    callback : optional
        Told (iterations done, in all, losses).

    Returns
    -------
    nn.Module
        A plain module of the same architecture, in eval mode: each ternarized weight, frozen or
        not, holds -alpha, 0 and alpha, or sums of these of several alphas, and nothing else.

    Raises
    ------
    ValueError
        If the generator has no layer to ternarize, or makes its samples of more than what it is
        called with.
    FloatingPointError
        If what it makes, or learns, is not finite.
    """
    settings = settings or Ternarization()
    if iterations is not None:
        settings = replace(settings, iterations=iterations)
    given = trainable_copy(generator).to(device or device_of(generator)).eval()
    frozen = [not parameter.requires_grad for parameter in given.parameters()]
    given.requires_grad_(False)
    teacher = driven(given, latent_dim, labels, latents)
    law = latents_of(teacher, latent_dim)
    check_function(teacher, law)
    if law.plain and not isinstance(teacher, Reweighted):
        teacher = turned(teacher, lambda weight: Ternary(weight)(weight), law.dim, seed=seed)
    ternary = undriven(_distilled(teacher, settings, law, seed, callback), given)
    for norm in own_maps(ternary):
        _fold_statistics(norm)
    for parameter, was in zip(ternary.parameters(), frozen, strict=True):
        parameter.requires_grad_(not was)
    return ternary.to(device_of(generator)).eval()


def _distilled(
    teacher: nn.Module,
    settings: Ternarization,
    latents: Latents,
    seed: int,
    callback: Progress | None,
) -> nn.Module:
    """Learn weights and thresholds together, latent by latent, from the teacher."""
    student = copy_of(teacher).requires_grad_(True)
    layers = [layer for _, layer in ternarizable(student)]
    if not layers:
        raise ValueError(
            f"{type(teacher).__name__} has no linear or convolution layer to ternarize"
        )
    rng = torch.Generator(device_of(teacher)).manual_seed(seed)
    z = latents.draw(STATISTICS, rng)
    weights = [layer.get_parameter("weight") for layer in layers]
    planes: dict[nn.Parameter, int] = {}  # of a weight that layers share, as many as any needs
    for weight, needed in zip(
        weights, planes_needed(teacher, z, settings.planes, seed), strict=True
    ):
        planes[weight] = max(needed, planes.get(weight, 1))
    ternaries = {w: Ternary(w, count).to(w.device) for w, count in planes.items()}
    for layer, weight in zip(layers, weights, strict=True):
        # unsafe: the parametrization cannot be inverted, and need not be
        parametrize.register_parametrization(layer, "weight", ternaries[weight], unsafe=True)
    thresholds = [ternary.threshold for ternary in ternaries.values()]
    # Ternary weights give other activations, to which the normalisation is matched: once, because
    # learning with the statistics of every batch measured worse, and far worse with convolutions.
    take_statistics(student.eval(), teacher, z, seed)
    start = copy.deepcopy(student.state_dict())
    apart = {id(parameter) for parameter in (*ternaries, *thresholds)}
    others = [p for p in student.parameters() if id(p) not in apart]
    distill(
        student,
        pairs_of(teacher, latents),
        settings,
        energy=settings.energy,
        seed=seed,
        # The weights settle first; what stays in full precision then makes up for what they became.
        groups=[
            {"params": list(ternaries), "until": SETTLED},
            {"params": thresholds, "lr": settings.threshold_lr, "until": SETTLED},
            {"params": others, "lr": REST_LR},
        ],
        callback=callback,
    )
    _check(student, teacher, start, z, seed)
    with torch.no_grad():
        found = {weight: ternary(weight) for weight, ternary in ternaries.items()}
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for weight, value in found.items():
            weight.copy_(value)
    # A copy, because a weight whose parametrization was removed comes last in its layer's state,
    # and many a Flower app sends a state's values in order, without their names.
    plain = copy_of(teacher)
    plain.load_state_dict(student.state_dict())
    return plain


@torch.no_grad()
def _check(
    student: nn.Module, teacher: nn.Module, start: dict[str, Tensor], z: Tensor, seed: int
) -> None:
    """Put a student back to its start if training ruined it; log what stays ruined."""

    def made(generator: nn.Module) -> Tensor:
        with own_random_numbers(seed):
            samples: Tensor = generator(z)
        return samples

    wanted = made(teacher)
    lost = share_lost(made(student), wanted)
    if not lost <= RUINED:  # nor a number
        learned = copy.deepcopy(student.state_dict())
        student.load_state_dict(start)
        rounded = share_lost(made(student), wanted)
        if lost < rounded:
            student.load_state_dict(learned)
        lost = min(lost, rounded) if math.isfinite(lost) else rounded
    if not math.isfinite(lost):
        raise FloatingPointError(
            f"a ternary {type(teacher).__name__} makes samples that are not finite"
        )
    if lost > RUINED:
        log.warning(
            "A ternary %s loses %.2f of what its samples vary by: more planes or iterations, or "
            "ternarize=False",
            type(teacher).__name__,
            lost,
        )


@torch.no_grad()
def _fold_statistics(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Write a normalisation's statistics into its scale and shift: half the bytes to pack."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.bias.sub_(norm.running_mean * scale)
    norm.weight.copy_(scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
