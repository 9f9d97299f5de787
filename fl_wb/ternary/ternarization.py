"""Ternarization of a generator: weights and thresholds learned together.

Each weight tensor W becomes alpha * Q, with Q in {-1, 0, +1} by a threshold Delta around the mean
m of W: +1 above m + Delta, -1 below m - Delta. For the Gaussian fitted to W the mean magnitude
above the threshold has a closed form in Delta (a truncated Gaussian), so alpha carries a
gradient to Delta (He and Fan, "Simultaneously Optimizing Weight and Quantizer of Ternary Neural
Network Using Truncated Gaussian Approximation", CVPR 2019). Biases and normalisation stay in
full precision. `fl_wb.ternary.packing` has the file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

from fl_wb.generators.copies import copy_of
from fl_wb.generators.sampling import device_of, latent_dim_of
from fl_wb.settings import above, at_least
from fl_wb.ternary.numpy_reader import PackedFileError
from fl_wb.ternary.packing import load, pack, save, unpack
from fl_wb.ternary.rotation import turned
from fl_wb.training.distillation import Distillation, distill, pairs_of
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.wgan import Progress

__all__ = [
    "PackedFileError",
    "Ternarization",
    "Ternary",
    "load",
    "pack",
    "save",
    "ternarizable",
    "ternarize",
    "unpack",
]

SETTLED = 0.7
"""Share of the iterations after which weights and thresholds stand still."""

REST_LR = 1e-2
"""Learning rate of what stays in full precision (biases, normalisation): it learns to the end."""

STATISTICS = 2560
"""Samples whose statistics the normalisation takes."""

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # the latter: all convolutions, transposed too
"""Layers whose weight is ternarized."""


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
    """

    lr: Annotated[float, above(0)] = 2e-3
    energy: Annotated[float, at_least(0)] = 2.5
    threshold_lr: Annotated[float, at_least(0)] = 2e-4


class Ternary(nn.Module):
    """Parametrization of one weight tensor: W -> alpha(Delta) * Q(W, Delta).

    Parameters
    ----------
    weight : Tensor
        The weight at the start; Delta begins at 0.7 E|W - m|, the best threshold for a
        Gaussian under squared error (Li and Liu, 2016).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        centred = weight.detach() - weight.detach().mean()
        ratio = 0.7 * centred.abs().mean() / centred.std(correction=0).clamp_min(1e-12)
        # In units of W's standard deviation, so that one learning rate suits every layer.
        self.threshold = nn.Parameter(ratio.clamp(0.05, 2.0))

    def forward(self, weight: Tensor) -> Tensor:
        """Return alpha * Q, of the weight's shape; straight through to W, by alpha to Delta."""
        centred = weight.detach() - weight.detach().mean()
        std = centred.std(correction=0).clamp_min(1e-12)
        ratio = self.threshold.clamp(0.05, 2.0)
        signs = torch.sign(centred) * (centred.abs() > ratio.detach() * std)
        ternary: Tensor = std * mean_above(ratio) * signs
        return ternary + (weight - weight.detach())


def mean_above(ratio: Tensor) -> Tensor:
    """E[|x| given |x| > ratio] of x ~ N(0, 1): the alpha of a threshold, in units of std.

    phi(r) / (1 - Phi(r)), the mean of the truncated Gaussian (He and Fan, 2019, eq. 9).
    """
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    mean: Tensor = density / torch.special.ndtr(-ratio)
    return mean


def ternarizable(generator: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of every layer whose weight is ternarized.

    Raises
    ------
    ValueError
        If a layer computes its weight from other parameters, which three values cannot replace.
    """
    for name, layer in generator.named_modules():
        if isinstance(layer, LAYERS):
            if "weight" not in layer._parameters:
                raise ValueError(
                    f"the weight of layer {name!r} of {type(generator).__name__} is no parameter "
                    "but computed from others (weight_norm, spectral_norm, pruning), and cannot "
                    "be ternarized: make the generator without that, or set ternarize=False"
                )
            yield name, layer


def ternarize(
    generator: nn.Module,
    *,
    iterations: int | None = None,
    settings: Ternarization | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    device: str | torch.device | None = None,
    callback: Progress | None = None,
) -> nn.Module:
    """Return a copy whose every linear and convolution weight takes three values.

    Weights and thresholds are trained together to generate, latent by latent, what the
    full-precision generator generates. No data is needed. The latent is turned first where a
    linear layer takes it (see `fl_wb.ternary.rotation`): the measure stays, but not what a latent
    becomes.

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
    device : optional
        Where to train; where the generator is if None.
    callback : optional
        Told (iterations done, in all, losses).

    Returns
    -------
    nn.Module
        A plain module of the same architecture, in eval mode: each ternarized weight holds
        -alpha, 0 and alpha, and nothing else.

    Raises
    ------
    ValueError
        If the generator has no layer to ternarize.
    """
    settings = settings or Ternarization()
    if iterations is not None:
        settings = replace(settings, iterations=iterations)
    teacher = copy_of(generator).to(device or device_of(generator)).eval().requires_grad_(False)
    dim = latent_dim_of(teacher, latent_dim)
    teacher = turned(teacher, lambda weight: Ternary(weight)(weight), dim, seed=seed)
    ternary = _distilled(teacher, settings, dim, seed, callback)
    for module in ternary.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _fold_statistics(module)
    return ternary.to(device_of(generator)).requires_grad_(True).eval()


def _distilled(
    teacher: nn.Module,
    settings: Ternarization,
    dim: int,
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
    weights, thresholds = [], []
    for layer in layers:
        weight = layer.get_parameter("weight")
        ternary = Ternary(weight).to(weight.device)
        # unsafe: the parametrization cannot be inverted, and need not be
        parametrize.register_parametrization(layer, "weight", ternary, unsafe=True)
        weights.append(weight)
        thresholds.append(ternary.threshold)
    # Ternary weights give other activations, whose statistics are taken anew: once, because
    # learning with those of every batch measured worse, and far worse with convolutions.
    with own_random_numbers(seed):
        z = torch.randn(STATISTICS, dim, device=device_of(student))
        update_bn(z.split(128), student)
    apart = {id(parameter) for parameter in (*weights, *thresholds)}
    others = [p for p in student.parameters() if id(p) not in apart]
    distill(
        student,
        pairs_of(teacher, dim),
        settings,
        energy=settings.energy,
        seed=seed,
        # The weights settle first; what stays in full precision then makes up for what they became.
        groups=[
            # once each, also where layers share one
            {"params": list(dict.fromkeys(weights)), "until": SETTLED},
            {"params": thresholds, "lr": settings.threshold_lr, "until": SETTLED},
            {"params": others, "lr": REST_LR},
        ],
        callback=callback,
    )
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    # A copy, because a weight whose parametrization was removed comes last in its layer's state,
    # and many a Flower app sends a state's values in order, without their names.
    plain = copy_of(teacher)
    plain.load_state_dict(student.state_dict())
    return plain


@torch.no_grad()
def _fold_statistics(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Write a normalisation's statistics into its scale and shift: half the bytes to pack."""
    if not norm.affine or norm.running_mean is None or norm.running_var is None:
        return
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.bias.sub_(norm.running_mean * scale)
    norm.weight.copy_(scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
