"""Ternarization of a generator: weights and thresholds learned together.

Each weight tensor W becomes alpha * Q, with Q in {-1, 0, +1} by a threshold Delta around the mean
m of W: +1 above m + Delta, -1 below m - Delta. For the Gaussian fitted to W the mean magnitude
above the threshold has a closed form in Delta (a truncated Gaussian), so alpha carries a
gradient to Delta (He and Fan, "Simultaneously Optimizing Weight and Quantizer of Ternary Neural
Network Using Truncated Gaussian Approximation", CVPR 2019). Biases and normalisation stay in
full precision. `fl_wb.packing` has the file format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

from fl_wb.distillation import Distillation, distill, pairs_of
from fl_wb.isolation import copy_of, own_random_numbers
from fl_wb.networks import MLPCritic, device_of, generate, latent_dim_of
from fl_wb.numpy_reader import PackedFileError
from fl_wb.packing import load, pack, save, unpack
from fl_wb.rotation import turned
from fl_wb.wgan import Progress, Training, distance_to, part_of, push_forward, train_wgan

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
class Ternarization:
    """How a generator is ternarized.

    Attributes
    ----------
    iterations, batch_size, lr
        Of the distillation from the full-precision generator, which measured better than the
        paper's WGAN loss; ``lr`` is of the weights.
    threshold_lr
        Learning rate of Delta / std(W); 0 keeps the thresholds where they start. Much larger
        rates drift until no weight is zero.
    fidelity, training
        The WGAN-GP that polishes what stays in full precision afterwards, and the weight of
        E||G(z) - teacher(z)|| in its loss, as in `fl_wb.stage.Stage`.
    """

    iterations: int = 1300
    batch_size: int = 128
    lr: float = 1e-3
    threshold_lr: float = 2e-4
    fidelity: float = 1.0
    training: Training = field(
        default_factory=lambda: Training(iterations=150, warmup=150, generator_lr=2e-3)
    )


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
    critic: Callable[[], nn.Module] | None = None,
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
    linear layer takes it (see `fl_wb.rotation`): the measure stays, but not what a latent becomes.

    Parameters
    ----------
    generator : nn.Module
        Left alone.
    critic : callable, optional
        Makes a fresh critic of samples; a multilayer perceptron if None.
    iterations : int, optional
        Of the distillation, in place of those in `settings`.
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
    total = settings.iterations + settings.training.iterations
    first, then = (part_of(callback, before, total) for before in (0, settings.iterations))
    ternary = _distilled(teacher, settings, latent_dim, seed, first)
    ternary = _polished(ternary, teacher, critic, settings, latent_dim, seed, then)
    for module in ternary.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _fold_statistics(module)
    return ternary.to(device_of(generator)).requires_grad_(True).eval()


def _distilled(
    teacher: nn.Module,
    settings: Ternarization,
    latent_dim: int | None,
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
    dim = latent_dim_of(teacher, latent_dim)
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
        Distillation(settings.iterations, settings.batch_size, settings.lr),
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


def _polished(
    ternary: nn.Module,
    teacher: nn.Module,
    critic: Callable[[], nn.Module] | None,
    settings: Ternarization,
    latent_dim: int | None,
    seed: int,
    callback: Progress | None,
) -> nn.Module:
    """Train what stays in full precision as a WGAN against the teacher's samples.

    A critic sees what no distance of samples does: how the ternary generator's measure differs.
    """
    training = settings.training
    ternary.requires_grad_(True)
    for _, layer in ternarizable(ternary):
        layer.get_parameter("weight").requires_grad_(False)
    if not (training.iterations and any(p.requires_grad for p in ternary.parameters())):
        return ternary
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = (
            critic() if critic else MLPCritic(generate(teacher, 1, latent_dim=latent_dim).shape[1:])
        )
    dim = latent_dim_of(teacher, latent_dim)
    return train_wgan(
        ternary,
        [fresh],
        [push_forward(teacher, dim, training.batch_size)],
        training,
        latent_dim=latent_dim,
        seed=seed,
        regularizer=distance_to(teacher, settings.fidelity),
        callback=callback,
    ).generator


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
