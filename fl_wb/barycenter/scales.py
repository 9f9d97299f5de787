"""Weights whose scale says nothing, because a normalisation follows: as large as they were.

A step of Adam moves a weight as far however large it is, and what it moves by beside a weight that
a normalisation follows only makes it longer. So a long training at a high rate leaves such weights
large (a stage, of digits: six times as large as its sources'), and who goes on from them, at the
rates of a fresh network, hardly gets away: a target of new classes covered .15 less than from one
of the sources.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_wb.generators.latents import Latents
from fl_wb.generators.sampling import device_of
from fl_wb.training.random_numbers import own_random_numbers
from fl_wb.training.statistics import hold

LATENTS = 64
"""Of which it is seen whether a scale matters."""

SAME = 1e-3
"""Of the largest value: what rounding may change."""


def scales(generator: nn.Module) -> dict[str, Tensor]:
    """Return the norm of each layer's weight that is a matrix, by the layer's name."""
    return {name: own[0].detach().norm() for name, own in _layers(generator)}


@torch.no_grad()
def rescale(
    generator: nn.Module, norms: dict[str, Tensor], latents: Latents, *, seed: int = 0
) -> None:
    """Make layers of a generator, in place, no larger than they were, where that changes nothing.

    Where it does is tried, layer by layer. Batch normalisations whose input becomes so much smaller
    get statistics that are: taken anew, they would be those of other samples, off by chance.

    Parameters
    ----------
    generator : nn.Module
        Trained, with true statistics; in eval mode afterwards.
    norms : dict
        What `scales` has said before.
    latents
        Their law.
    seed
        Of the latents.
    """
    followers = hold(generator.eval())
    z = latents.draw(LATENTS, torch.Generator(device_of(generator)).manual_seed(seed))
    made = _watched(generator, z, followers, seed)
    before = made()
    for name, own in _layers(generator):
        share = (norms[name] / own[0].norm()).item()
        if not (0 < share < 1 and all(p.requires_grad for p in own)):
            continue
        kept = [(v, v.clone()) for n in followers for v in (*n.parameters(), *n.buffers())]
        kept += [(p, p.clone()) for p in own]
        torch._foreach_mul_(own, share)
        for norm, was, is_now in zip(followers, before[1:], made()[1:], strict=True):
            if _same(is_now, share * was):
                _shrink(norm, share)
        if _same((now := made())[0], before[0]):
            before = now
        else:
            for value, was in kept:
                value.copy_(was)


def _watched(
    generator: nn.Module, z: Tensor, followers: list[_BatchNorm], seed: int
) -> Callable[[], list[Tensor]]:
    """Return what says what a generator makes of latents, and what its normalisations then see."""

    def made() -> list[Tensor]:
        seen: dict[nn.Module, Tensor] = {}

        def look(norm: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            seen[norm] = (*given, *named.values())[0].clone()

        hooks = [n.register_forward_pre_hook(look, with_kwargs=True) for n in followers]
        with own_random_numbers(seed):
            samples: Tensor = generator(z)
        for hook in hooks:
            hook.remove()
        return [samples, *(seen.get(norm, z.new_full((), torch.nan)) for norm in followers)]

    return made


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * other.abs().max())


def _shrink(norm: _BatchNorm, share: float) -> None:
    """Have a normalisation make of share * x what it makes of x: its epsilon stays as it is."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    before = norm.running_var + norm.eps
    norm.running_mean.mul_(share)
    norm.running_var.mul_(share**2)
    norm.weight.mul_(((norm.running_var + norm.eps) / before).sqrt() / share)


def _layers(generator: nn.Module) -> list[tuple[str, list[Tensor]]]:
    """Return the layers with a matrix as weight: names, and what they own, the weight first."""
    found = []
    for name, part in generator.named_modules():
        own: dict[str, Tensor] = {n: p for n, p in part._parameters.items() if p is not None}
        if "weight" in own and own["weight"].dim() > 1:
            found.append((name, [own.pop("weight"), *own.values()]))
    return found
