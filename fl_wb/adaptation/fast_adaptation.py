"""Fast adaptation of a generator to a few local samples, inside its Wasserstein ball.

The target's problem min_G W1(G, mu_0) + lambda W1(G, nu) (Dedeoglu et al., arXiv 2101.09225,
section 5) starts at the barycenter nu. With mu_0 given by a handful of samples, its first term
alone memorises them, so three things are ours here:

- *variation transfer*: the few real samples are widened by the variation that the start
  generator has learned elsewhere (`variation_bank`);
- the second term is the coupling bound E||g(z) - g_start(z)||^2, which needs no second critic;
- the more samples there are, the more of them are learned as they are, and the less the start
  counts.

A start that a gate made the target's own (`fl_wb.adaptation.gates`) has strangers left, which an
anchor would hold. Where those samples that the few ask for (`fl_wb.adaptation.likeness`), of all
that it makes without its gate, fit them, these are most of what is learned, in the anchor's place.
Not of other starts: they may lack some of the target's classes (measured), which then are learned
too little.

A small generator whose target is new may be *transported* first: its samples are coupled optimally
with the widened ones, and it is regressed on that coupling (`transport_pairs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from fl_wb.adaptation.anchor import COMPARED, JUDGED, choose_anchor, leave_out, worse
from fl_wb.adaptation.gates import asked_for
from fl_wb.adaptation.samples import check_samples
from fl_wb.adaptation.variation import (
    BANK,
    affordable,
    labelled_bank,
    transport_pairs,
    variation_bank,
)
from fl_wb.generators.copies import copy_of, trainable_copy
from fl_wb.generators.latents import Draw
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import (
    check_function,
    device_of,
    driven,
    generate,
    latents_of,
    undriven,
)
from fl_wb.settings import Settings, at_least, one_of
from fl_wb.training.checkpoints import Checkpoint
from fl_wb.training.conditional import (
    LabelledGenerator,
    labelled,
    labelled_critic,
)
from fl_wb.training.distillation import Distillation, distill
from fl_wb.training.wgan import (
    Progress,
    Regularizer,
    Training,
    distance_to,
    part_of,
    resample,
    train_wgan,
)
from fl_wb.transport import energy_distance

METHODS = ("variation", "transport", "plain")

POOL = 8000
"""Samples of the start generator whose differences are transferred; of large ones, fewer."""

WIDENED = 2000
"""Widened samples that are learned beside the `POOL` that the few ask for of a gated start."""

SCARCE = 20
"""Up to so many samples, all are widened; of n more, a share of 1 - SCARCE / n is learned as is."""

MANY = 4000
"""Of more samples, so many are drawn: all pairs are compared, and the bank holds no more."""


@dataclass
class Adaptation(Settings):
    """How a generator is adapted.

    Attributes
    ----------
    method
        ``variation``: variation transfer. ``transport``: the same, but the generator is
        transported first unless it fits the few samples already. On MNIST it measured better
        with the small convolutional generator; on digits, a large one copied more. ``plain``:
        fine-tuning on the few samples alone, as in the paper, for comparison.
    anchor
        lambda, the weight of E||g(z) - g_start(z)||^2; None chooses it by `choose_anchor`.
    fresh
        The start is a fresh network instead of a good generator: its normalisation learns its
        statistics, too (see `fl_wb.training.wgan.train_wgan`). For the baseline that has no start.
    transport
        The regression of that method, before the WGAN.
    training
        The WGAN-GP. At most 200 iterations: few samples are memorised later. A critic that is
        well ahead of the generator measured better coverage than more iterations.
    """

    method: Annotated[str, one_of(*METHODS)] = "variation"
    anchor: Annotated[float, at_least(0)] | None = None
    fresh: bool = False
    transport: Distillation = field(default_factory=lambda: Distillation(1000, 32))
    training: Training = field(
        default_factory=lambda: Training(iterations=200, warmup=300, critic_steps=8)
    )


def adapt(
    generator: nn.Module,
    samples: Tensor,
    *,
    critic: Callable[[], nn.Module] | None = None,
    iterations: int | None = None,
    settings: Adaptation | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    labels: int | None = None,
    latents: str | Draw = "normal",
    few_labels: Tensor | None = None,
    device: str | torch.device | None = None,
    callback: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    guide: nn.Module | None = None,
) -> nn.Module:
    """Adapt a generator to a few samples; the arguments are left alone.

    Of `JUDGED` samples or more, some are left out, and the start itself is returned where these are
    nearer to it than to what it became (in energy distance, beyond chance); not of a ``fresh``
    start, nor by the ``plain`` method.

    Parameters
    ----------
    generator : nn.Module
        The start, e.g. a barycenter.
    samples : Tensor
        The few real samples (n, ...), n >= 1, of the shape that the generator makes.
    critic : callable, optional
        Makes a fresh critic; a multilayer perceptron if None.
    iterations : int, optional
        Generator steps, in place of those in `settings`.
    settings : Adaptation, optional
    seed : int
        The same arguments give the same generator.
    latent_dim : int, optional
        For a generator without the attribute.
    labels : int, optional
        Of a conditional generator: how many labels there are.
    latents : optional
        As in `fl_wb.generators.sampling.generate`.
    few_labels : Tensor, optional
        The samples' labels (n,), integers; a conditional generator needs them. It is adapted on
        samples and labels together, drawn as often as they occur here: a label that no sample has
        may change with the others.
    device : optional
        Where to train; where the generator is if None.
    callback, checkpoint : optional
        Told (iterations done, in all, losses); where to save and resume.
    guide : nn.Module, optional
        Whose samples are widened by in place of the start's, where that one has to keep its
        architecture, and cannot have the gate that this one has.

    Returns
    -------
    nn.Module
        The adapted generator, in eval mode, where the given one is.

    Raises
    ------
    ValueError
        If there are no samples, their shape is not the generator's, one is not finite, they have no
        labels where there should be, or a conditional generator has a guide.
    """
    settings = settings or Adaptation()
    home, form = device_of(generator), None
    start = trainable_copy(generator).to(device or home).eval()
    if labels is None:
        start = driven(start, latent_dim, None, latents)
    else:
        start, form = labelled(start, few_labels, labels, latent_dim, latents, seed)
    student = copy_of(start).train(settings.fresh)
    start.requires_grad_(False)
    check_function(start, latents_of(start, latent_dim))
    if guide is not None and form:
        raise ValueError("a conditional generator has no guide: it has no gate")
    guide = start if guide is None else driven(guide, latent_dim, None, latents)
    some = generate(guide, 2, seed=seed, latent_dim=latent_dim)
    most = partial(affordable, sample=some[0])
    pool = generate(guide, most(POOL), seed=seed, latent_dim=latent_dim)
    check_samples(samples, form.split(pool)[0] if form else pool)
    if form and few_labels is not None:
        samples = form.join(samples, few_labels)
    widened = partial(labelled_bank, form) if form else variation_bank
    widened = partial(widened, size=most(BANK), seed=seed)
    training = settings.training
    if iterations is not None:
        training = replace(training, iterations=iterations)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = critic() if critic else MLPCritic(form.shape if form else pool.shape[1:])
        fresh = labelled_critic(fresh, form) if form else fresh
    few = samples.detach().to(device_of(start), pool.dtype)
    judged = settings.method != "plain" and not settings.fresh and len(few) >= JUDGED
    if judged:
        few, unseen = leave_out(few, seed)
    real, regularizer = resample(few), None
    then = callback
    if settings.method != "plain":
        beside = most(4 * WIDENED) // 4
        if len(few) > beside:  # they are widened in turn, and these may be sorted
            order = torch.randperm(len(few), generator=torch.Generator().manual_seed(seed))
            few = few[order[: most(MANY)].to(few.device)]
        pool = pool.to(few.device)
        anchor = choose_anchor(pool, few) if settings.anchor is None else settings.anchor
        partly = False
        if isinstance(guide, Reweighted) and guide.gate and settings.anchor is None and not form:
            wanted = asked_for(guide, few, most(POOL), seed=seed)
            if wanted is not None and choose_anchor(wanted := wanted.to(few.device), few) > 0:
                partly, anchor, pool = True, 0.0, wanted
        # a start that fits, all of it or in part, makes what a few samples lack
        unchanged = 0.0 if anchor or partly else max(0.0, 1 - SCARCE / len(few))
        moves = settings.method == "transport" and not anchor and not partly
        if moves:
            # a regression keeps what blurs or draws together, where a WGAN makes up for it
            bank = widened(few, pool, towards=0.0, scale=0.6, unchanged=unchanged)
            before = settings.transport.iterations
            total = before + training.iterations
            first, then = part_of(callback, 0, total), part_of(callback, before, total)
            pairs = transport_pairs(start, bank, seed=seed, latent_dim=latent_dim)
            distill(student, pairs, settings.transport, seed=seed, callback=first)
        else:
            bank = widened(few, pool, unchanged=unchanged)
            if partly:
                bank = torch.cat([bank[:beside], pool])
        real = resample(bank)
        regularizer = _sum(distance_to(start, anchor, power=2), _energy_to(bank))
    trained = train_wgan(
        student,
        [fresh],
        [real],
        training,
        latent_dim=latent_dim,
        seed=seed,
        regularizer=regularizer,
        callback=then,
        checkpoint=checkpoint,
    )
    adapted = trained.generator
    if judged:
        made = generate(adapted, most(COMPARED), seed=seed, latent_dim=latent_dim)
        was = generate(start, most(COMPARED), seed=seed, latent_dim=latent_dim)
        if worse(made, was, unseen):
            for kept, learned in zip(start.parameters(), adapted.parameters(), strict=True):
                kept.requires_grad_(learned.requires_grad)
            adapted = start
    if isinstance(adapted, LabelledGenerator):
        adapted = adapted.generator
    return undriven(adapted.to(home), generator)


def _energy_to(bank: Tensor) -> Regularizer:
    draw = resample(bank)

    def term(_: nn.Module, z: Tensor, fakes: Tensor, rng: torch.Generator) -> Tensor:
        return energy_distance(fakes, draw(len(fakes), rng))

    return term


def _sum(*terms: Regularizer | None) -> Regularizer:
    def total(generator: nn.Module, z: Tensor, fakes: Tensor, rng: torch.Generator) -> Tensor:
        return torch.stack([term(generator, z, fakes, rng) for term in terms if term]).sum()

    return total
