"""Ternary planes of a weight tensor: what three values leave, three more may take up.

A plane of W is alpha * Q, with Q in {-1, 0, +1} by a threshold Delta: +1 above Delta, -1 below
-Delta. alpha is the mean magnitude above the threshold, the best in squared error. For the Gaussian
fitted to W it has a closed form in Delta (a truncated Gaussian), by whose slope Delta learns (He
and Fan, "Simultaneously Optimizing Weight and Quantizer of Ternary Neural Network Using Truncated
Gaussian Approximation", CVPR 2019). Planes are taken about 0, not about the mean: a tensor of equal
weights, or of one, is its own plane. A second plane, of what the first leaves, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of
from fl_wb.training.random_numbers import own_random_numbers

FOLLOWED = 0.5
"""Share of a teacher's variation that one layer's planes may lose before training, which makes up
for it. On digits and MNIST one plane of every layer loses .03 to .41, but for the first weight of a
convolutional generator, which loses .5 to 1."""

SPARED = 0.05
"""Share of all weights whose layers, the smallest, have as many planes as there may be: they cost
next to no bytes, and the first and last layers of a generator, small ones, lose it the most. On
MNIST (three sources) the ternary generator has 1.01 times the Frechet distance for 1.20."""

STATISTICS = 1024
"""Samples by which the normalisation is matched, and layers are tried."""

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # the latter: all convolutions, transposed too
"""Layers whose weight is ternarized."""


class Ternary(nn.Module):
    """Parametrization of one weight tensor: W -> the sum of its ternary planes.

    Parameters
    ----------
    weight : Tensor
        The weight at the start; each Delta begins at 0.7 E|W|, the best threshold for a Gaussian
        under squared error (Li and Liu, 2016).
    planes : int
        How many planes, each of what the ones before it leave.
    """

    def __init__(self, weight: Tensor, planes: int = 1) -> None:
        super().__init__()
        rest, ratios = weight.detach(), []
        for _ in range(planes):
            ratio = 0.7 * rest.abs().mean() / _scale(rest)
            # In units of W's root mean square, so that one learning rate suits every layer.
            ratios.append(ratio.clamp(0.05, 2.0))
            rest = rest - _plane(rest, ratios[-1])
        self.threshold = nn.Parameter(torch.stack(ratios))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum, of the weight's shape; straight through to W, by alpha to Delta."""
        held = weight.detach()
        total = torch.zeros_like(held)
        for ratio in self.threshold.clamp(0.05, 2.0):
            total = total + _plane(held - total.detach(), ratio)
        return total + (weight - held)


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


@torch.no_grad()
def planes_needed(teacher: nn.Module, z: Tensor, most: int, seed: int) -> list[int]:
    """Return how many planes each layer needs: the fewest by which the samples follow.

    Every layer is tried alone, the others in full precision. The smallest need not be sparing.

    Parameters
    ----------
    teacher : nn.Module
        In eval mode.
    z : Tensor
        Latents (n, latent_dim) to try.
    most : int
        What a layer gets that needs more.
    seed : int
        Of the random numbers that the teacher may draw.
    """
    with own_random_numbers(seed):
        wanted = teacher(z)

    def follows(name: str, planes: int) -> bool:
        trial = copy_of(teacher)
        weight = dict(ternarizable(trial))[name].get_parameter("weight")
        weight.copy_(Ternary(weight, planes)(weight))
        take_statistics(trial, teacher, z, seed)
        with own_random_numbers(seed):
            return share_lost(trial(z), wanted) <= FOLLOWED

    sizes = {name: layer.get_parameter("weight").numel() for name, layer in ternarizable(teacher)}
    smallest = sorted(sizes, key=lambda name: sizes[name])
    up_to = dict(zip(smallest, accumulate(sizes[name] for name in smallest), strict=True))
    spared = SPARED * sum(sizes.values())
    return [
        most
        if up_to[name] <= spared
        else next((planes for planes in range(1, most) if follows(name, planes)), most)
        for name in sizes
    ]


@torch.no_grad()
def take_statistics(student: nn.Module, teacher: nn.Module, z: Tensor, seed: int) -> None:
    """Set a student's normalisation so that what it passes on has the teacher's moments.

    Statistics taken anew would do, if the teacher's own were those of its activations; a generator
    that learned in eval mode has others, and depends on them.

    Parameters
    ----------
    student, teacher : nn.Module
        Of the same architecture, in eval mode; the student is changed.
    z : Tensor
        Latents (n, latent_dim).
    seed : int
        Of the random numbers that they may draw.
    """
    moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(norm: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        moments[norm] = _moments((*given, *named.values())[0])

    def match(norm: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        mean, std = _moments((*given, *named.values())[0])
        wanted, wanted_std = moments[model[norm]]
        gain, own = std / wanted_std, model[norm]
        epsilon: float = own.eps
        variance = own.get_buffer("running_var") + epsilon
        shift = (wanted - own.get_buffer("running_mean")) * gain
        norm.get_buffer("running_var").copy_((variance * gain.square() - epsilon).clamp_min(0))
        norm.get_buffer("running_mean").copy_(mean - shift)

    model: dict[nn.Module, nn.modules.batchnorm._BatchNorm] = {
        student.get_submodule(name): norm
        for name, norm in teacher.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    }
    hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in model.values()]
    hooks += [norm.register_forward_pre_hook(match, with_kwargs=True) for norm in model]
    try:
        for network in (teacher, student):  # in this order
            with own_random_numbers(seed):
                network(z)
    finally:
        for hook in hooks:
            hook.remove()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of each channel of x (n, c, ...)."""
    std, mean = torch.std_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, std.clamp_min(1e-6)


def share_lost(samples: Tensor, wanted: Tensor) -> float:
    """E|x - y|^2 / E|y - E y|^2 of samples x and y (n, ...) of the same latents.

    0 if they agree, 1 if x is but the mean of y.
    """
    lost = (samples - wanted).square().sum()
    return (lost / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-30)).item()


def _plane(weight: Tensor, ratio: Tensor) -> Tensor:
    scale, mean = _scale(weight), mean_above(ratio)
    signs = weight.sign() * (weight.abs() > ratio.detach() * scale)
    alpha = (weight * signs).sum() / signs.abs().sum().clamp_min(1)
    plane: Tensor = (alpha + scale * (mean - mean.detach())) * signs
    return plane


def _scale(weight: Tensor) -> Tensor:
    return weight.square().mean().sqrt().clamp_min(1e-12)
