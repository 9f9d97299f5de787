"""Ending a training in a state in which train mode and eval mode agree."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from fl_wb.generators.sampling import device_of
from fl_wb.training.random_numbers import own_random_numbers

LATENTS = 2560
BATCH = 128


@torch.no_grad()
def settle(generator: nn.Module, latent_dim: int, *, seed: int = 0) -> None:
    """Give a generator, in place, the statistics of what it makes of N(0, I).

    Normalisations get the statistics of all batches together (torch's ``update_bn``); spectral
    norms' power iterations, which a forward pass in train mode carries on, catch up with the
    weights. Modes stay as they are.

    Parameters
    ----------
    generator : nn.Module
        Trained.
    latent_dim : int
        Of its latents.
    seed : int
        Of the latents.
    """
    modes = {part: part.training for part in generator.modules()}
    rng = torch.Generator(device_of(generator)).manual_seed(seed)
    batches = torch.randn(LATENTS, latent_dim, generator=rng, device=rng.device).split(BATCH)
    with own_random_numbers(seed):
        generator.train()
        for batch in batches:
            generator(batch)
        update_bn(batches, generator)
    for part, training in modes.items():
        part.training = training
