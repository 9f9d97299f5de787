"""A few real samples, widened by how a generator's samples vary, and how to get there.

Ours; not in the paper. A generator that was trained elsewhere knows how samples vary also where its
classes are not the target's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fl_wb.generators.sampling import in_batches, latents_of
from fl_wb.training.conditional import Labelled
from fl_wb.training.distillation import Pairs
from fl_wb.transport import coupling

BANK = 4000
"""Widened samples, by default."""

BYTES = 256 << 20
"""Of a generator's samples, or of widened ones: as many as these hold, but `LEAST` of any size."""

LEAST = 500


def affordable(wanted: int, sample: Tensor) -> int:
    """Return how many samples such as this one there may be: as many as wanted, or as fit."""
    return min(wanted, max(BYTES // max(sample.nbytes, 1), LEAST))


def variation_bank(
    samples: Tensor,
    pool: Tensor,
    *,
    partners: int = 5,
    near: int = 400,
    step: int = 30,
    towards: float = 0.7,
    scale: float = 1.0,
    unchanged: float = 0.0,
    size: int = BANK,
    seed: int = 0,
) -> Tensor:
    """Widen a few real samples by the variation among a generator's samples.

    For a real sample, x lies up to `towards` of the way from it to one of its `partners` nearest
    other real samples (without, a WGAN covered less and copied more). Pick y1 among the sample's
    `near` nearest of the pool, and y2 among the `step` nearest pool samples of y1; then
    x' = x + scale (y2 - y1), clipped to the values that occur. The generator knows how samples
    vary also where its classes are not the target's. No labels.

    Parameters
    ----------
    samples : Tensor
        Real samples (n, ...), taken in turn.
    pool : Tensor
        Samples (N, ...) of the start generator. The larger, the smaller and the likelier are
        the differences between neighbours.
    partners, near, step : int
        Sizes of the three neighbourhoods.
    towards, scale : float
        See above.
    unchanged : float
        Share of the bank that is the real samples as they are.
    size : int
        How many widened samples to make.
    seed : int
        Of the choices.

    Returns
    -------
    Tensor
        Widened samples (size, ...).
    """
    rng = torch.Generator(pool.device).manual_seed(seed)
    few, flat = samples.flatten(1), pool.flatten(1)
    which = torch.arange(size, device=pool.device) % len(samples)
    x = samples[which]
    if towards and len(samples) > 1:
        partner = _pick_one(_nearest(few, few, partners + 1)[:, 1:][which], rng)
        share = torch.rand(size, *[1] * (x.dim() - 1), generator=rng, device=rng.device)
        x = torch.lerp(x, samples[partner], towards * share.to(x.dtype))
    y1 = _pick_one(_nearest(few, flat, near)[which], rng)
    # In parts: the whole matrix of distances may not fit a small device. The nearest is y1 itself.
    y2 = _pick_one(
        torch.cat([_nearest(p, flat, step + 1) for p in flat[y1].split(500)])[:, 1:], rng
    )
    low, high = min(pool.min(), samples.min()), max(pool.max(), samples.max())
    widened = (x + scale * pool[y2] - scale * pool[y1]).clamp(low, high)
    if unchanged:
        kept = torch.rand(size, generator=rng, device=rng.device) < unchanged
        widened[kept] = samples[which[kept]]
    return widened


def labelled_bank(
    form: Labelled, few: Tensor, pool: Tensor, *, size: int = BANK, seed: int = 0, **options: Any
) -> Tensor:
    """Widen a few labelled samples, each label's own among themselves; see `variation_bank`.

    Parameters
    ----------
    form : Labelled
        Of the vectors.
    few, pool : Tensor
        Vectors (n, d + labels) and (N, d + labels).
    size : int
        How many widened ones to make, about.
    seed, **options
        Of `variation_bank`.
    """
    (samples, marks), (others, _) = form.split(few), form.split(pool)
    labels, parts = marks.argmax(1), []
    for label in labels.unique():
        own = samples[labels == label]
        number = max(round(size * len(own) / len(samples)), 1)
        widened = variation_bank(own, others, size=number, seed=seed, **options)
        parts.append(form.join(widened, label.expand(number)))
    bank = torch.cat(parts)
    return bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))]


def transport_pairs(
    start: nn.Module,
    bank: Tensor,
    *,
    size: int = 2000,
    seed: int = 0,
    latent_dim: int | None = None,
) -> Pairs:
    """Pair latents with the samples that optimal transport makes of the start's samples.

    T is the optimal coupling of `size` of the start's samples with as many of the bank; z is
    paired with T(start(z)). A generator that follows has moved no farther than it must.

    Parameters
    ----------
    start : nn.Module
        The generator that is adapted.
    bank : Tensor
        Widened samples (n, ...), where the start is.
    size : int
        How many pairs, at most n. The coupling's time grows with about the third power.
    seed : int
        Of the latents.
    latent_dim : int, optional
        For a generator without the attribute.

    Returns
    -------
    callable
        Draws pairs (latents, samples), with replacement.
    """
    bank = bank[:size]
    rng = torch.Generator(bank.device).manual_seed(seed)
    z = latents_of(start, latent_dim).draw(len(bank), rng)
    with torch.no_grad():
        made = torch.cat([start(part) for part in in_batches(z, 500)])
    moved = bank[coupling(made, bank).to(bank.device)]

    def draw(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(z), (n,), generator=rng, device=rng.device)
        return z[index], moved[index]

    return draw


def _nearest(rows: Tensor, others: Tensor, k: int) -> Tensor:
    """Return the indices (n, k) of the k rows of `others` nearest to each row (n, d)."""
    return torch.cdist(rows, others).topk(min(k, len(others)), largest=False).indices


def _pick_one(choices: Tensor, rng: torch.Generator) -> Tensor:
    """Pick one of each row's indices (n, k), at random."""
    n, k = choices.shape
    column = torch.randint(k, (n, 1), generator=rng, device=choices.device)
    return choices.gather(1, column).squeeze(1)
