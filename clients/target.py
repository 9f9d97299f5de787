"""A target node: adapts the barycenter to its few samples, ternarizes it, and evaluates it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.adaptation import BANK, POOL, Adaptation, affordable, variation_bank
from fl_wb.clients.fast_adaptation import make_own
from fl_wb.clients.received import fitted, own_samples, received, received_code
from fl_wb.clients.sharing import offer
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import driven, generate, generate_rows, latents_of
from fl_wb.messages import keys
from fl_wb.messages.replies import PICTURES
from fl_wb.metrics import Evaluation, Reference, augmentation, evenly
from fl_wb.ternary import Ternarization
from fl_wb.training.checkpoints import Snapshots
from fl_wb.training.conditional import label_counts
from fl_wb.training.wgan import resample

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's


def target_evaluate(
    message: Message,
    context: Context,
    *,
    generator: Callable[[], nn.Module],
    few: Tensor,
    held_out: Tensor,
    critic: Callable[[], nn.Module] | None = None,
    weights: str = "fitted",
    adaptation: Adaptation | None = None,
    ternarization: Ternarization | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    evaluation: Evaluation | None = None,
    send_few: bool = False,
    share: bool = False,
    min_memorization: float | None = None,
    labels: int | None = None,
    few_labels: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    real: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> RecordDict:
    """Answer an EVALUATE message with what the barycenter became on this node, step by step.

    Parameters
    ----------
    generator, critic : callable
        Factories of the networks; the critic is a multilayer perceptron by default.
    few : Tensor
        This node's few samples (n, ...), n >= 1.
    held_out : Tensor
        Real samples (m, ...) that neither the sources nor this node trained on.
    ternarization : Ternarization, optional
        None leaves that step out.
    features, evaluation : optional
        As in `fl_wb.metrics.evaluate`, and how to compare.
    send_few : bool
        Send pictures of the few samples themselves. No other part of a reply has real samples.
    share : bool
        Offer what was adapted, of the architecture that the sources have, as a source from the next
        round on (see `fl_wb.clients.sharing`), unless its memorization is below `min_memorization`.
    held_out_labels : Tensor, optional
        Of a conditional generator, of which there are `few_labels`, too: then also how well a
        classifier does that learned from the few, from these and generated ones, and from `real`
        ones (``accuracy``; see `fl_wb.metrics.augmentation`).
    weights, adaptation, labels, few_labels, seed, device : optional
        As in `fl_wb.clients.fast_adaptation.make_own`.

    Returns
    -------
    RecordDict
        Metrics ``<step>/<key>`` for the steps few (these samples themselves, drawn with
        replacement: what mere copying scores), bank (if asked for), barycenter, reweighted (where
        the server says the model's code), adapted and ternary, and real (the accuracy alone), and
        the keys of `fl_wb.metrics.evaluate`; the packed ternary generator; and a few pictures of
        what the generator of each step makes.
    """
    settings = evaluation or Evaluation()
    plain, _ = received(message, context, generator)
    if labels is not None and few_labels is None:
        raise ValueError(f"few_labels are needed where there are labels={labels}")
    counts = None if few_labels is None or labels is None else label_counts(few_labels, labels)
    few = own_samples(few, context, driven(plain, labels=counts))
    snapshots = Snapshots((adaptation or Adaptation()).training.iterations, settings.snapshots)
    sent, (code, without) = None, received_code(message, context)
    if critic is not None and keys.CRITIC in message.content.array_records:
        words = "the server's critic does not fit that of node"
        sent = fitted(message.content.array_records[keys.CRITIC], critic(), context, words)
    own = partial(
        make_own,
        plain.to(device),
        few.to(device),
        code=code,
        weights=weights,
        without=without,
        critic=critic if sent is None else lambda: sent,
        adaptation=adaptation,
        labels=labels,
        few_labels=few_labels,
        seed=seed,
        device=device,
    )
    made = own(ternarization=ternarization, checkpoint=snapshots)
    if share:
        adapted = own(plain=True).adapted if isinstance(made.adapted, Reweighted) else made.adapted
        offer(
            context,
            adapted,
            few,
            held_out,
            min_memorization=min_memorization,
            counts=counts,
        )
    networks, info = {"barycenter": plain}, ConfigRecord()
    figures: dict[str, MetricRecordValues] = {keys.WEIGHT: len(few)}
    figures["adapt-seconds"] = made.adapt_seconds
    if code is not None:
        networks["reweighted"] = made.start
        figures["weigh-seconds"] = made.weigh_seconds
    networks["adapted"] = made.adapted
    if made.ternary is not None:
        networks["ternary"] = made.ternary
        figures["ternarize-seconds"] = made.ternarize_seconds
        info[keys.TERNARY] = ternary.pack(made.ternary)
    networks = {step: driven(each, labels=counts) for step, each in networks.items()}
    few = few.cpu()
    there, held_out = len(held_out), evenly(held_out, settings.most)
    log.info("Comparing with %d of %d held-out samples", len(held_out), there)
    judge = _Judge(settings, Reference(held_out, few=few, features=features), len(held_out), seed)
    steps = {"few": judge.of_real(few)}
    if settings.bank:
        most = partial(affordable, sample=few[0])
        pool = generate(driven(made.start, labels=counts), most(POOL), seed=seed)
        steps["bank"] = judge.of_real(variation_bank(few, pool, size=most(BANK), seed=seed))
    for step, network in networks.items():
        began = perf_counter()
        steps[step] = judge.of(network)
        log.info("Compared %s, %.0f s", step, perf_counter() - began)
    if few_labels is not None and held_out_labels is not None:
        last = [*networks][-1]
        found = augmentation(
            networks[last],
            (few, few_labels.cpu()),
            (held_out, evenly(held_out_labels, settings.most)),
            real=real,
            seed=seed,
        )
        for step, name in (("few", "few"), (last, "augmented"), ("real", "real")):
            steps.setdefault(step, {})["accuracy"] = found[name]
    for step, values in steps.items():
        figures |= {f"{step}/{name}": value for name, value in values.items()}
    if settings.snapshots:
        at_start = steps.get("reweighted", steps["barycenter"])
        info.update(_curve(snapshots, made.start, at_start, judge, counts))
    pictures = {"few": few[:PICTURES]} if send_few else {}
    for step, network in networks.items():
        pictures[step] = generate(network, PICTURES)
    content = RecordDict({keys.METRICS: MetricRecord(figures), keys.INFO: info})
    content[keys.SAMPLES] = ArrayRecord(pictures)
    return content


@dataclass(frozen=True)
class _Judge:
    """What the steps of one target have in common when they are evaluated."""

    settings: Evaluation
    reference: Reference
    held_out: int
    seed: int

    def of(self, network: nn.Module) -> dict[str, float]:
        """Return the figures of a generator of one tensor."""
        conditional = bool(latents_of(network).labels)

        def draw(n: int, seed: int) -> tuple[Tensor, Tensor | None]:
            rows, made = generate_rows(network, n, seed=seed)
            return made, rows[:, -1] if conditional else None

        return self._mean(draw)

    def of_real(self, samples: Tensor) -> dict[str, float]:
        """Return the figures of drawing from samples, with replacement."""
        draw = resample(samples)
        return self._mean(lambda n, seed: (draw(n, torch.Generator().manual_seed(seed)), None))

    def _mean(self, draw: Callable[[int, int], tuple[Tensor, Tensor | None]]) -> dict[str, float]:
        n = self.settings.samples or self.held_out
        found = [
            self.reference.compare(*draw(n, self.seed + k)) for k in range(self.settings.draws)
        ]
        return {name: fmean(figures[name] for figures in found) for name in found[0]}


def _curve(
    snapshots: Snapshots,
    start: nn.Module,
    at_start: dict[str, float],
    judge: _Judge,
    counts: list[int] | None,
) -> dict[str, list[int] | list[float]]:
    """Return the figures during the adaptation, as columns ``curve/<name>``."""
    columns: dict[str, list[Any]] = {"curve/iterations": [0], "curve/seconds": [0.0]}
    for name, value in at_start.items():
        columns[f"curve/{name}"] = [value]
    for iteration, seconds, state in snapshots.taken:
        network = driven(deepcopy(start), labels=counts)
        # a conditional one was trained with its labels, inside another module
        inside = "" if counts is None else "generator."
        network.load_state_dict({name.removeprefix(inside): state[name] for name in state})
        columns["curve/iterations"].append(iteration)
        columns["curve/seconds"].append(seconds)
        for name, value in judge.of(network).items():
            columns[f"curve/{name}"].append(value)
    return columns
