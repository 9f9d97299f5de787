"""How a generator, anybody's, is sampled: its latents, its mode, its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.generators.latents import Draw, Driven, Latents, frequencies, law_of

OF_A_FUNCTION = 64  # rows of a check: a few labels, drawn twice, agree too often on fewer

Labels = int | Sequence[float] | None
"""How many labels a generator takes, or how often each is drawn; None: it takes none."""


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
    if not isinstance(found, int | np.integer) or found < 1:
        raise ValueError(
            f"the latent dimension of {type(generator).__name__} is unknown (got {found!r}): give "
            "the generator an integer attribute `latent_dim`, or pass `latent_dim=`"
        )
    return int(found)


def latents_of(generator: nn.Module, latent_dim: int | None = None) -> Latents:
    """Return what a generator of one tensor is called with: what it says itself, or N(0, I).

    Raises
    ------
    ValueError
        If nobody says how many coordinates that has.
    """
    own = getattr(generator, "latents", None)
    return own if isinstance(own, Latents) else Latents(latent_dim_of(generator, latent_dim))


def driven(
    generator: nn.Module,
    latent_dim: int | None = None,
    labels: Labels = None,
    latents: str | Draw = "normal",
) -> nn.Module:
    """Return a generator as one of one tensor, whose law `latents_of` tells; see `Driven`.

    What is one already, or takes N(0, I) alone, is returned as it is; `undriven` is the way back.
    """
    law, often = law_of(latents), frequencies(labels)
    if isinstance(getattr(generator, "latents", None), Latents) or (law == "normal" and not often):
        return generator
    return Driven(generator, Latents(latent_dim_of(generator, latent_dim), law, often))


def undriven(made: nn.Module, given: nn.Module) -> nn.Module:
    """Return what became of a generator in the form in which it was given."""
    return made.generator if isinstance(made, Driven) and not isinstance(given, Driven) else made


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
    labels: Labels = None,
    latents: str | Draw = "normal",
    batch_size: int = 1000,
    source: int | None = None,
    code: Code | None = None,
) -> Tensor:
    """Draw n samples from a generator, the same for the same seed.

    Parameters
    ----------
    generator : nn.Module
        Maps latents (n, latent_dim) to samples (n, ...); or these and labels (n,) of int64.
    n, seed : int
        How many, and which.
    latent_dim : int, optional
        For a generator without the attribute.
    labels : int or sequence of float, optional
        Of a conditional generator: how many labels there are, or how often each is drawn.
    latents : {"normal", "uniform", "uniform(-1,1)"} or callable
        The law of the latents; a callable draws n of them with a ``torch.Generator``.
    batch_size : int
        Latents that the generator is called with at a time.
    source : int, optional
        Of a barycenter, sample this source's cell alone, whatever weight it has.
    code : Code, optional
        What the cells are, where the generator does not say it, as a `Reweighted` does.

    Returns
    -------
    Tensor
        Samples (n, ...) on the CPU.

    Raises
    ------
    ValueError
        If there is no such source, nobody says what the cells are, or there are labels, too.
    """
    if source is not None and labels is not None:
        raise ValueError("source= and labels=: which latents are a source's hangs on the label")
    made = driven(generator, latent_dim, labels, latents)
    return generate_rows(
        made if source is None else _cell(made, source, code, latent_dim),
        n,
        seed=seed,
        latent_dim=latent_dim,
        batch_size=batch_size,
    )[1]


def generate_rows(
    generator: nn.Module,
    n: int,
    *,
    seed: int = 0,
    latent_dim: int | None = None,
    batch_size: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Draw what a generator of one tensor is called with, (n, width), and the samples it makes."""
    law, device = latents_of(generator, latent_dim), device_of(generator)
    rng = torch.Generator().manual_seed(seed)
    rows = law.draw(n, rng)
    beside = law.draw(1, rng) if n == 1 else rows[:0]
    with sampling(generator):
        parts = in_batches(torch.cat([rows, beside]), batch_size)
        made = [generator(part.to(device)).cpu() for part in parts]
    return rows, torch.cat(made)[:n]


def in_batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Split rows into batches of `size`, and the rest; a rest of one row goes with the last batch.

    Many a generator fails on one row: ``squeeze()`` takes it away, batch statistics need two.
    """
    *parts, rest = rows.split(size)
    if parts and len(rest) == 1:
        rest = torch.cat([parts.pop(), rest])
    return (*parts, rest)


def _cell(generator: nn.Module, source: int, code: Code | None, latent_dim: int | None) -> Driven:
    """Return a generator whose latents lie in one cell of its code."""
    law, own = latents_of(generator, latent_dim), getattr(generator, "code", None)
    if isinstance(own, Code):  # what is reweighted has another inside, that learned the cells
        generator, code = getattr(generator, "generator", generator), own
    if code is None:
        raise ValueError(
            f"source={source!r}: {type(generator).__name__} does not say what its cells are: pass "
            "code=Code(shares), the shares of its sources"
        )
    if source not in range(len(code)):
        raise ValueError(f"source={source!r} must be from 0 to {len(code) - 1}, a cell of the code")

    def drawn(n: int, rng: torch.Generator) -> Tensor:
        return code.embed(torch.full((n,), source), law.draw(n, rng), latents=law)

    return Driven(generator, Latents(law.width, drawn))


def check_function(generator: nn.Module, latents: Latents) -> None:
    """Refuse a generator of one tensor whose samples come of more than their rows of `latents`.

    Labels that it draws itself would be such a thing: nobody could learn what it makes. Samples
    that hang on those beside them, as batch statistics have it, pass.

    Raises
    ------
    ValueError
        If it makes other samples when it is called again, or of the same rows in another order.
    """
    rows = latents.some(OF_A_FUNCTION).to(device_of(generator))
    with torch.random.fork_rng(), sampling(generator):
        samples, again = generator(rows), generator(rows)
        turned = generator(rows.flip(0)).flip(0)
    scale = float(samples.nan_to_num().abs().max())  # what is not finite, others refuse
    if not torch.allclose(samples, again, rtol=0, atol=1e-4 * scale, equal_nan=True):
        raise ValueError(
            "the generator makes other samples of the same latents when it is called again: all "
            "that is random must come from its latents (no dropout or noise in eval mode, and no "
            "labels that it draws itself: those it is given, see labels=)"
        )
    if not torch.allclose(samples, turned, rtol=0, atol=1e-3 * scale, equal_nan=True):
        raise ValueError(
            "the generator makes of a latent what its place in the batch says (labels in turn, "
            "perhaps): a sample must be a function of its latent, or of that and a label (labels=)"
        )


def check_real(samples: object, made: Tensor, what: str = "the samples") -> None:
    """Refuse real samples that are no numbers such as a generator makes.

    Samples of a plausible but other unit are said in a UserWarning: those up to 255 where the
    generator stays in [-1, 1], and those in [0, 1] where it reaches to -1, or the other way round.

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
    if samples.numel() and (should := _other_unit(samples, low, high)):
        warnings.warn(
            f"{what} are numbers from {float(samples.min()):.3g} to {float(samples.max()):.3g}, "
            f"and {units}: should they be {should}?",
            stacklevel=3,
        )


def _other_unit(samples: Tensor, low: float, high: float) -> str | None:
    """Return how samples may be meant for a generator of low to high, if not as they are."""
    least, most = float(samples.min()), float(samples.max())
    if max(-low, high) > 1 or most > 255:
        return None
    if least >= 0 and most > 16:
        return "x / 127.5 - 1"
    if most > 1:
        return None
    if least >= 0 and low < -0.9:
        return "2 x - 1"
    return "(x + 1) / 2" if least < -0.9 and low >= 0 else None


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
