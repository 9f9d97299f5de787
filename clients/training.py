"""How a source trains a WGAN-GP on its own data, and what names that training."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of, seeded
from fl_wb.generators.sampling import driven, latents_of
from fl_wb.persistence.tensor_files import digest, fingerprint
from fl_wb.training.checkpoints import Checkpoint
from fl_wb.training.conditional import (
    Labelled,
    LabelledGenerator,
    label_counts,
    labelled_critic,
)
from fl_wb.training.privacy import Privacy, mechanism, poisson, private_critic_steps
from fl_wb.training.wgan import Progress, Trained, Training, resample, train_wgan

VERSION = 1
"""Of the training: a store's generators of another one are not taken for its own."""


def train_source(
    generator: nn.Module,
    critic: Callable[[], nn.Module],
    samples: Tensor,
    settings: Training,
    *,
    privacy: Privacy | None = None,
    own_labels: Tensor | None = None,
    labels: int | None = None,
    seed: int = 0,
    callback: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Trained, dict[str, float]]:
    """Train a generator, which is left alone, on a source's own samples.

    Parameters
    ----------
    samples : Tensor
        The source's data (n, ...), n >= 1; fewer than a batch are drawn with replacement.
    privacy : Privacy, optional
        With an epsilon: train with differential privacy. The random numbers are then nobody's to
        know, and `seed` is that of the critic's first weights alone.
    own_labels, labels : optional
        The samples' labels (n,), and how many there are, for a conditional generator; its critic
        sees samples and labels (`fl_wb.training.conditional`).
    generator, critic, settings, seed, callback, checkpoint
        As in `fl_wb.training.wgan.train_wgan`; the critic by its factory.

    Returns
    -------
    Trained, dict of str to float
        The trained generator and its critic, and the last ``generator-loss`` and
        ``critic-loss`` (with privacy the penalty alone), the ``train-seconds`` that it took, and
        with privacy ``epsilon`` and ``delta``.
    """
    last: dict[str, float] = {}
    judge = seeded(critic, seed)
    if own_labels is not None and labels is not None:
        if privacy and privacy.epsilon is not None:
            raise ValueError(f"labels={labels} are told as they are: not with an epsilon")
        form = Labelled.of(samples, labels)
        one = driven(generator, labels=label_counts(own_labels, labels))
        generator = LabelledGenerator(one, form)
        judge = seeded(lambda: labelled_critic(critic(), form), seed)
        samples = form.join(samples, own_labels)
    real, steps, kept, its_seed = resample(samples), None, {}, seed
    if privacy and privacy.epsilon is not None:
        by = mechanism(privacy, settings, len(samples))
        real, steps, its_seed = poisson(samples), private_critic_steps(by), secrets.randbits(32)
        kept = {"epsilon": by.epsilon, "delta": by.delta}

    def listen(done: int, total: int, losses: dict[str, float]) -> None:
        if callback:
            callback(done, total, losses)
        if done == total:
            last.update({f"{name}-loss": float(value) for name, value in losses.items()})

    began = perf_counter()
    trained = train_wgan(
        generator,
        [judge],
        [real],
        settings,
        seed=its_seed,
        critic_steps=steps,
        callback=listen,
        checkpoint=checkpoint,
    )
    if isinstance(trained.generator, LabelledGenerator):
        inside = trained.generator.generator.get_submodule("generator")
        trained = replace(trained, generator=inside)
    return trained, {**last, **kept, "train-seconds": perf_counter() - began}


def key_of(
    network: nn.Module,
    critic: nn.Module,
    data: Tensor,
    own_labels: Tensor | None,
    settings: Training,
    privacy: Privacy | None,
    seed: int,
    device: str,
) -> str:
    """Name all that a training depends on, what the networks' code does included."""
    z = latents_of(network).some()
    told = {} if own_labels is None else {"labels": own_labels}
    went_in = {
        "version": VERSION,
        "kept": "generator, critic",
        "generator": fingerprint(copy_of(network).eval(), z),
        "critic": fingerprint(copy_of(critic).eval(), data[:4]),
        "data": digest({"data": data, **told}),
        "training": asdict(settings),
        "privacy": privacy and asdict(privacy),
        "seed": seed,
        "device": torch.device(device).type,
    }
    return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()
