"""How a generator, anybody's, is sampled: its latents, its mode, its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def check_factory(name: str, factory: object) -> None:
    """Raise TypeError unless a network is given as a function that makes it."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{name} must be a factory, a function without arguments that makes the {name}, "
            f"not {type(factory).__name__}"
        )


def latent_dim_of(generator: nn.Module, latent_dim: int | None = None) -> int:
    """Return the generator's latent dimension: the argument, or else its attribute.

    Raises
    ------
    ValueError
        If neither says it.
    """
    found = latent_dim if latent_dim is not None else getattr(generator, "latent_dim", None)
    if not isinstance(found, int) or found < 1:
        raise ValueError(
            f"the latent dimension of {type(generator).__name__} is unknown (got {found!r}): give "
            "the generator an integer attribute `latent_dim`, or pass `latent_dim=`"
        )
    return found


@contextmanager
def sampling(generator: nn.Module) -> Iterator[nn.Module]:
    """Put a generator in the mode in which it is sampled (eval, no graph), then restore it.

    Every part gets back the mode that it had: a user may keep some of them in another.
    """
    training = [part for part in generator.modules() if part.training]
    generator.eval()
    try:
        with torch.no_grad():
            yield generator
    finally:
        for part in training:
            part.training = True


def generate(
    generator: nn.Module,
    n: int,
    *,
    seed: int = 0,
    latent_dim: int | None = None,
    batch_size: int = 1000,
) -> Tensor:
    """Draw n samples from a generator, the same for the same seed.

    Returns
    -------
    Tensor
        Samples (n, ...) on the CPU.
    """
    dim, device = latent_dim_of(generator, latent_dim), device_of(generator)
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, dim, generator=rng)
    with sampling(generator):
        return torch.cat([generator(part.to(device)).cpu() for part in z.split(batch_size)])


def check_real(samples: object, made: Tensor, what: str = "the samples") -> None:
    """Refuse real samples that are no numbers such as a generator makes.

    Samples of a plausible but other unit, whole numbers up to 255 where the generator stays in
    [-1, 1], are said in a UserWarning.

    Parameters
    ----------
    samples : object
        What somebody gave.
    made : Tensor
        Some samples (n, ...) of the generator.
    what : str
        The samples' name in what is said.

    Raises
    ------
    TypeError
        Unless they are a Tensor of floating numbers.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(
            f"{what} must be a Tensor (n, ...), not {type(samples).__name__}: torch.as_tensor "
            "makes one of an array or a list"
        )
    low, high = float(made.min()), float(made.max())
    units = f"the generator makes floating ones from {low:.3g} to {high:.3g}"
    if not samples.is_floating_point():
        kind = str(samples.dtype).removeprefix("torch.")
        raise TypeError(f"{what} are {kind}, and {units}: scale them, such as x / 127.5 - 1")
    whole = samples.numel() > 0 and bool((samples == samples.round()).all())
    if whole and max(-low, high) <= 1 and samples.min() >= 0 and 16 < samples.max() <= 255:
        warnings.warn(
            f"{what} are whole numbers from {float(samples.min()):.0f} to "
            f"{float(samples.max()):.0f}, and {units}: should they be x / 127.5 - 1?",
            stacklevel=3,
        )


def input_gradient(critic: nn.Module, x: Tensor) -> Tensor:
    """Gradient (n, ...) of each sample's score at x (n, ...), differentiable by the weights.

    By the critic's own method ``input_gradient`` where it has one, else by autograd.
    """
    written_out: Callable[[Tensor], Tensor] | None = getattr(critic, "input_gradient", None)
    if written_out is not None:
        return written_out(x)
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter (the CPU if it has none)."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device
