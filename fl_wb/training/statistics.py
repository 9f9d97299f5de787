"""What a training returns: an average of its weights, and statistics that eval mode can use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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

MAP = ("weight", "bias", "running_mean", "running_var")
"""What a normalisation's map is made of in eval mode."""

Tensors = tuple[Tensor, ...] | list[Tensor]


def learning(generator: nn.Module) -> nn.Module:
    """Put a generator in train mode, but for normalisations that are frozen: of them all stays."""
    generator.train()
    for part in generator.modules():
        own = list(part.parameters())
        if isinstance(part, _BatchNorm) and own and not any(p.requires_grad for p in own):
            part.eval()
    return generator


def own_maps(generator: nn.Module) -> list[_BatchNorm]:
    """Return the normalisations whose weights may be written anew for other statistics.

    In eval mode they make w (x - m) / sqrt(v + eps) + b, and nothing else is made of these four:
    they have no forward pass of their own, and share none with another part.
    """
    owners = Counter(
        id(tensor)
        for part in generator.modules()
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    )
    return [
        part
        for part in generator.modules()
        if isinstance(part, _BatchNorm)
        and type(part).forward is _BatchNorm.forward
        and all(owners[id(getattr(part, name))] == 1 for name in MAP)  # 0: it has none
    ]


def hold(generator: nn.Module) -> list[_BatchNorm]:
    """Have normalisations keep the statistics that they have; return those that could.

    These are in eval mode then. Those that are no map of their own (`own_maps`), or are frozen,
    cannot: `settle` could not make up for the difference to their true statistics.
    """
    held = [
        norm
        for norm in own_maps(generator)
        if norm.weight.requires_grad and norm.bias.requires_grad
    ]
    for norm in held:
        norm.eval()
    return held


@torch.no_grad()
def settle(
    generator: nn.Module,
    latents: Latents,
    trained: int = 0,
    *,
    seed: int = 0,
    held: Sequence[_BatchNorm] = (),
) -> None:
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
    held : sequence of nn.Module
        Normalisations that were trained with statistics of their own (`hold`): they get the true
        ones, too, and weights with which they still make what they made.
    """
    modes = {part: part.training for part in generator.modules()}
    rng = torch.Generator(device_of(generator)).manual_seed(seed)
    number = max(trained // (TRAINED * BATCH), BATCHES)
    batches = latents.draw(number * BATCH, rng).split(BATCH)
    with own_random_numbers(seed):
        learning(generator)
        for norm in held:
            norm.eval()
        for batch in batches[:BATCHES]:
            generator(batch)
        norms = [p for p in generator.modules() if isinstance(p, _BatchNorm) and p.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all
        inputs = [_Inputs(norm) for norm in held]
        for batch in batches if norms or held else ():
            generator(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for each in inputs:
            each.absorb()
    for part, training in modes.items():
        part.training = training


class _Inputs:
    """Mean and variance of what a normalisation is called with."""

    def __init__(self, norm: _BatchNorm) -> None:
        self._norm, self._sums = norm, torch.zeros(3, norm.num_features, dtype=torch.float64)
        self._hook = norm.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, norm: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        values = (*given, *named.values())[0].transpose(0, 1).flatten(1)
        n, variance, mean = values.shape[1], *torch.var_mean(values, 1, correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        self._sums += n * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

    def absorb(self) -> None:
        """Give them to the normalisation, which goes on making the same of the same.

        In eval mode it makes w (x - m) / sqrt(v + eps) + b: an affine map, which has other w and b
        for other m and v.
        """
        self._hook.remove()
        norm = self._norm
        n, total, squares = self._sums
        if not n.any():  # it takes no part in what is made
            return
        mean = total / n
        variance = (squares / n - mean.square()).clamp(min=0) * n / (n - 1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        m, v, w = (x.cpu().double() for x in (norm.running_mean, norm.running_var, norm.weight))
        norm.bias.add_(((mean - m) * w / (v + norm.eps).sqrt()).to(norm.bias))
        norm.weight.mul_(((variance + norm.eps) / (v + norm.eps)).sqrt().to(norm.weight))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


class _Average(AveragedModel):
    """An average whose buffers, where it is not finite, are the module's."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(model)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=False):
            if mine.is_floating_point():
                mine.copy_(mine.where(mine.isfinite(), theirs))


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a module's weights and buffers, to be updated.

    The decay ramps up as min(decay, (t+1)/(t+10)) at step t = 0, 1, ..., so that a short training
    is not held back by its start. A buffer's numbers that are not finite, an attention mask's say,
    are the module's: the mean of two infinite ones is none.
    """

    def step(mine: Tensors, theirs: Tensors, done: Tensor | int) -> None:
        if mine[0].is_floating_point():
            torch._foreach_lerp_(mine, theirs, 1 - min(decay, int(done) / (int(done) + 9)))
        else:  # counters are not averaged
            torch._foreach_copy_(mine, theirs)

    average = _Average(module, multi_avg_fn=step, use_buffers=True).requires_grad_(False)
    average.n_averaged.fill_(1)  # 0 would take the first state as it is
    return average
