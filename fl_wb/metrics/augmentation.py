"""What generated samples are good for: a classifier that has only a few real ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fl_wb.generators.latents import Draw
from fl_wb.generators.sampling import check_real, driven, generate, generate_rows
from fl_wb.metrics.features import BATCH, STEPS, fit_classifier
from fl_wb.picks import spread_out

TIMES = 10
"""So many generated samples for each of the few, by default."""

AugmentedBy = tuple[Tensor, Tensor]
"""Samples (n, ...) and their labels (n,), integers from 0."""


def augmentation(
    generator: nn.Module,
    few: AugmentedBy,
    held_out: AugmentedBy,
    *,
    real: AugmentedBy | None = None,
    n: int | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    latents: str | Draw = "normal",
) -> dict[str, float]:
    """Return how well a classifier does that learned from a few samples, and from more.

    All of them are the same network, trained for as many steps, and judged by the same samples.

    Parameters
    ----------
    generator : nn.Module
        Conditional: maps latents (n, latent_dim) and labels (n,) to samples (n, ...).
    few : pair of Tensor
        A node's few real samples and their labels.
    held_out : pair of Tensor
        Real samples, and labels, that judge.
    real : pair of Tensor, optional
        Real samples that a node would wish for. By default one of every two of ``held_out``, which
        then judges by the rest alone.
    n : int, optional
        How many samples to generate, of labels as frequent as among the few; `TIMES` as many as
        these by default.
    seed : int
        Of the classifiers and of what is generated.
    latent_dim, latents : optional
        As in `fl_wb.generators.sampling.generate`.

    Returns
    -------
    dict[str, float]
        Accuracies: ``few``, of the few samples alone; ``augmented``, of these and generated ones;
        ``real``, of as many real samples as both together (all, where there are fewer).

    Raises
    ------
    ValueError
        If samples have not one label each, or a set is empty.
    """
    for name, (samples, labels) in (("few", few), ("held_out", held_out), ("real", real or few)):
        if not len(samples) or labels.shape != samples.shape[:1] or int(labels.min()) < 0:
            raise ValueError(
                f"{name} must be samples (n, ...) and one label from 0 each, not samples "
                f"{tuple(samples.shape)} and labels {tuple(labels.shape)}"
            )
    if real is None and len(held_out[0]) < 2:
        raise ValueError("held_out must be 2 samples or more, of which one of every two is real")
    number = int(max(set_[1].max() for set_ in (few, held_out, real or few))) + 1
    counts = few[1].long().bincount(minlength=number).tolist()
    source = driven(generator, latent_dim, counts, latents)
    made = generate(source, 2)
    check_real(few[0], made, "the few samples")
    check_real(held_out[0], made, "the held-out samples")
    n = TIMES * len(few[0]) if n is None else n
    rows, generated = generate_rows(source, n, seed=seed)
    if real is None:
        chosen = torch.zeros(len(held_out[0]), dtype=torch.bool)
        chosen[spread_out(len(chosen), len(chosen) // 2, seed)] = True  # classes may come in turn
        real, held_out = ((held_out[0][x], held_out[1][x]) for x in (chosen, ~chosen))
    order = torch.randperm(len(real[0]), generator=torch.Generator().manual_seed(seed))
    order = order[: len(few[0]) + n]
    sets = {
        "few": few,
        "augmented": (torch.cat([few[0].cpu(), generated]), torch.cat([few[1].cpu(), rows[:, -1]])),
        "real": (real[0][order], real[1][order]),
    }
    return {name: _accuracy(learned, held_out, number, seed) for name, learned in sets.items()}


def _accuracy(learned: AugmentedBy, judges: AugmentedBy, number: int, seed: int) -> float:
    """Train a classifier on labelled samples; return its share of right answers."""
    samples, labels = learned[0].detach().cpu().float(), learned[1].cpu().long()
    rng = torch.Generator().manual_seed(seed)
    epochs = math.ceil(STEPS / math.ceil(len(samples) / BATCH))
    body, head = fit_classifier(samples, labels, number, epochs, rng, seed)
    with torch.no_grad():
        parts = judges[0].cpu().float().split(1000)
        found = torch.cat([head(body(part)).argmax(1) for part in parts])
    return float((found == judges[1].cpu()).double().mean())
