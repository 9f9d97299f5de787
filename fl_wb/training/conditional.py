"""Training a conditional generator: on samples and labels together, as one vector each.

What the trainings and distances of this room see of a labelled sample is the sample's numbers and,
behind them, its label as one number that is not 0. Two samples of different labels are so far
apart that no transport, no critic and no distance takes one for the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_wb.generators.latents import Draw
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import driven, generate, latents_of

JUDGED = 500
"""Samples by which it is judged how far apart they are."""


@dataclass(frozen=True)
class Labelled:
    """The form of labelled samples as vectors (n, d + labels).

    Attributes
    ----------
    shape
        Of one sample, of d numbers.
    labels
        How many there are.
    scale
        Of a label's number: labels add sqrt(2) scale to the distance of two samples.
    """

    shape: tuple[int, ...]
    labels: int
    scale: float

    @classmethod
    def of(cls, samples: Tensor, labels: int) -> Labelled:
        """Return the form in which labels weigh what samples (n, ...) do: their mean distance."""
        spread = torch.pdist(samples[:JUDGED].flatten(1)).mean().item() if len(samples) > 1 else 0.0
        return cls(tuple(samples.shape[1:]), labels, spread / math.sqrt(2) or 1.0)

    def join(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Return samples (n, ...) and labels (n,) as vectors.

        Raises
        ------
        ValueError
            If there is not one label each, or one is none.
        """
        check_labels(labels, len(samples), self.labels)
        return self._joined(samples, labels)

    def split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples (n, ...) and the labels as numbers (n, labels), 1 at each's own."""
        d = math.prod(self.shape)
        return vectors[:, :d].unflatten(1, self.shape), vectors[:, d:] / self.scale

    def _joined(self, samples: Tensor, labels: Tensor) -> Tensor:
        numbers = nn.functional.one_hot(labels.long(), self.labels) * self.scale
        return torch.cat([samples.flatten(1), numbers.to(samples)], 1)


class LabelledGenerator(nn.Module):
    """A generator of labelled samples as vectors, from a `Driven` conditional one."""

    def __init__(self, generator: nn.Module, form: Labelled) -> None:
        super().__init__()
        self.generator, self.form, self.latents = generator, form, latents_of(generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (n, latent_dim + 1), labels last, to vectors (n, d + labels)."""
        return self.form._joined(self.generator(rows), rows[:, -1])


class LabelledCritic(nn.Module):
    """A critic of labelled samples, from anybody's of samples: each label adds its own picture."""

    def __init__(self, critic: nn.Module, form: Labelled) -> None:
        super().__init__()
        self.critic, self.form = critic, form
        self.pictures = nn.Linear(form.labels, math.prod(form.shape), bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Score vectors (n, d + labels)."""
        samples, labels = self.form.split(vectors)
        marked = samples + self.pictures(labels).unflatten(1, self.form.shape)
        scores: Tensor = self.critic(marked)
        return scores


def labelled_critic(critic: nn.Module, form: Labelled) -> nn.Module:
    """Return a fresh critic of labelled samples like one of samples; a perceptron sees all of them.

    What a picture adds to a few numbers would be no label to see.
    """
    if type(critic) is MLPCritic:
        width = critic.net[-1].get_parameter("weight").shape[1]
        return MLPCritic((math.prod(form.shape) + form.labels,), width=width)
    return LabelledCritic(critic, form)


def labelled(
    generator: nn.Module,
    few_labels: Tensor | None,
    labels: int,
    latent_dim: int | None,
    latents: str | Draw,
    seed: int,
) -> tuple[nn.Module, Labelled]:
    """Return a conditional generator as one of labelled samples, and their form.

    It draws labels as often as they occur among those given.
    """
    if few_labels is None:
        raise ValueError(f"few_labels are needed where there are labels={labels}")
    counts = label_counts(few_labels, labels)
    start = driven(generator, latent_dim, counts, latents)
    form = Labelled.of(generate(start, JUDGED, seed=seed), labels)
    return LabelledGenerator(start, form).eval(), form


def check_labels(labels: Tensor, n: int, number: int) -> None:
    """Raise ValueError unless there are n labels, integers from 0 to number - 1."""
    good = labels.shape == (n,) and not labels.is_floating_point()
    whole = labels.long() if good else labels  # bytes have no number to be compared with
    if not good or not bool(((whole >= 0) & (whole < number)).all()):
        raise ValueError(
            f"{n} samples need one integer label each, from 0 to {number - 1}, not "
            f"{labels.dtype} {tuple(labels.shape)}: {labels.flatten()[:10].tolist()}"
        )


def label_counts(labels: Tensor, number: int) -> list[int]:
    """Return how often each of so many labels occurs among labels (n,)."""
    check_labels(labels, len(labels), number)
    counts: list[int] = labels.long().bincount(minlength=number).tolist()
    return counts
