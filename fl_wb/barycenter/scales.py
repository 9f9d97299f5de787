"""Weights whose scale says nothing, because a normalisation follows: as large as they were.

A step of Adam moves a weight as far however large it is, and what it moves by beside a weight that
a normalisation follows only makes it longer. So a long training at a high rate leaves such weights
large (a stage, of digits: six times as large as its sources'), and who goes on from them, at the
rates of a fresh network, hardly gets away: a target of new classes covered .15 less than from one
of the sources.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_wb.generators.latents import Latents
from fl_wb.generators.sampling import device_of
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.statistics import learning, settle

LATENTS = 64
"""Of which it is seen whether a scale matters."""

SAME = 1e-3
"""Of the largest value: what rounding and a normalisation's epsilon may change."""


def scales(generator: nn.Module) -> dict[str, Tensor]:
    """Return the norm of each layer's weight that is a matrix, by the layer's name."""
    return {name: layer.weight.detach().norm() for name, layer in _layers(generator)}


@torch.no_grad()
def rescale(
    generator: nn.Module,
    norms: dict[str, Tensor],
    latents: Latents,
    trained: int = 0,
    *,
    seed: int = 0,
) -> None:
    """Make layers of a generator, in place, no larger than they were, where that changes nothing.

    Where it does is tried, layer by layer: in train mode a normalisation takes any scale away. Its
    statistics are taken anew.

    Parameters
    ----------
    generator : nn.Module
        Trained, with the statistics of `fl_wb.training.statistics.settle`.
    norms : dict
        What `scales` has said before.
    latents, trained, seed
        As of `settle`.
    """
    modes = {part: part.training for part in generator.modules()}
    buffers = [(b, b.clone()) for b in generator.buffers()]
    z = latents.draw(LATENTS, torch.Generator(device_of(generator)).manual_seed(seed))

    def made() -> Tensor:
        with own_random_numbers(seed):
            samples: Tensor = generator(z)
        for buffer, was in buffers:  # those of a power iteration count as well
            buffer.copy_(was)
        return samples

    learning(generator)
    before, changed = made(), False
    for name, layer in _layers(generator):
        own = [p for p in layer._parameters.values() if p is not None]
        share = (norms[name] / layer.weight.norm()).item()
        if not (0 < share < 1 and all(p.requires_grad for p in own)):
            continue
        was = [p.clone() for p in own]
        torch._foreach_mul_(own, share)
        if (made() - before).abs().max() <= SAME * before.abs().max():
            changed = True
        else:
            torch._foreach_copy_(own, was)
    for part, training in modes.items():
        part.training = training
    if changed:
        settle(generator, latents, trained, seed=seed)


def _layers(generator: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers with a weight of two dimensions or more of their own, and their names."""
    return [
        (name, part)
        for name, part in generator.named_modules()
        if (weight := part._parameters.get("weight")) is not None and weight.dim() > 1
    ]
