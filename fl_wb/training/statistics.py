"""What a training returns: an average of its weights, and statistics that eval mode can use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from fl_wb.generators.latents import Latents
from fl_wb.generators.sampling import device_of
from fl_wb.training.random_numbers import own_random_numbers

BATCHES, BATCH = 20, 128
"""Of latents of which statistics are taken, at least."""

TRAINED = 4
"""Latents of the training, for each of these."""

Tensors = tuple[Tensor, ...] | list[Tensor]


def learning(generator: nn.Module) -> nn.Module:
    """Put a generator in train mode, but for normalisations that are frozen: of them all stays."""
    generator.train()
    for part in generator.modules():
        own = list(part.parameters())
        if isinstance(part, _BatchNorm) and own and not any(p.requires_grad for p in own):
            part.eval()
    return generator


@torch.no_grad()
def settle(generator: nn.Module, latents: Latents, trained: int = 0, *, seed: int = 0) -> None:
    """Give a generator, in place, the statistics of what it makes of its latents.

    Normalisations get the statistics of all batches together (as by torch's ``update_bn``), but for
    frozen ones; spectral norms' power iterations, which a forward pass in train mode carries on,
    catch up with the weights. Modes stay as they are.

    Parameters
    ----------
    generator : nn.Module
        Trained.
    latents : Latents
        Their law.
    trained : int
        How many it was trained on: of a longer training, more are drawn. Statistics of n latents
        are off by 1 / sqrt(n) of a unit's deviation, and all that is made moves with them.
    seed : int
        Of the latents.
    """
    modes = {part: part.training for part in generator.modules()}
    rng = torch.Generator(device_of(generator)).manual_seed(seed)
    number = max(trained // (TRAINED * BATCH), BATCHES)
    batches = latents.draw(number * BATCH, rng).split(BATCH)
    with own_random_numbers(seed):
        learning(generator)
        for batch in batches[:BATCHES]:
            generator(batch)
        norms = [p for p in generator.modules() if isinstance(p, _BatchNorm) and p.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all
        for batch in batches if norms else ():
            generator(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for part, training in modes.items():
        part.training = training


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a module's weights and buffers, to be updated.

    The decay ramps up as min(decay, (t+1)/(t+10)) at step t = 0, 1, ..., so that a short training
    is not held back by its start.
    """

    def step(mine: Tensors, theirs: Tensors, done: Tensor | int) -> None:
        if mine[0].is_floating_point():
            torch._foreach_lerp_(mine, theirs, 1 - min(decay, int(done) / (int(done) + 9)))
        else:  # counters are not averaged
            torch._foreach_copy_(mine, theirs)

    average = AveragedModel(module, multi_avg_fn=step, use_buffers=True).requires_grad_(False)
    average.n_averaged.fill_(1)  # 0 would take the first state as it is
    return average
