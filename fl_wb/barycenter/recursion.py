"""Recursive Wasserstein-1 barycenter of generators: stage by stage, resumable.

nu_1 = mu_1; a stage merges the barycenter so far, with its weight Lambda = lambda_1 + ... +
lambda_k, and the measures that come next (Dedeoglu et al., arXiv 2101.09225, section 4: one of
them). A generator that arrives later costs one more stage.

Up to ``fan_in`` measures are one stage (ours). More of them make a tree, whose merges at one level
know nothing of each other and may run side by side; with ``fan_in=2`` they make the paper's
recursion, one new measure a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from fl_wb.barycenter.executors import check_executor, run_level
from fl_wb.barycenter.merge import Merge
from fl_wb.barycenter.stage import Stage, stage_of
from fl_wb.barycenter.teachers import Measure, label_frequencies
from fl_wb.generators.code import Code
from fl_wb.generators.latents import Draw, mixed
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import (
    Labels,
    check_function,
    device_of,
    driven,
    generate,
    latents_of,
    undriven,
)
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest
from fl_wb.training.wgan import Progress

FAN_IN = 256
"""Measures that one stage merges at most, where its geodesic is the mixture."""


def recursive_barycenter(
    generators: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    fan_in: int | None = None,
    initial: nn.Module | None = None,
    critic: Callable[[], nn.Module] | None = None,
    geodesic: str | None = None,
    start: str | None = None,
    iterations: int | None = None,
    budget: float | None = None,
    stage: Stage | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    labels: Labels = None,
    latents: str | Draw = "normal",
    label_counts: Sequence[Sequence[float]] | None = None,
    store: StageStore | str | Path | None = None,
    device: str | torch.device | None = None,
    executor: str | None = None,
    callback: Progress | None = None,
) -> nn.Module:
    """Merge generators into one that generates their W1 barycenter.

    The joint barycenter of K >= 3 measures is a Frechet median, which a recursion of pairwise
    optima need not reach; `optimality_gap` says how near the result is.

    Parameters
    ----------
    generators : sequence of nn.Module
        Of one architecture, latents (n, latent_dim) to samples (n, ...). Left alone; they are taken
        from the sequence when their samples are needed, so that a sequence may make them then.
    weights : sequence of float, optional
        lambda_k > 0, one each; equal if None.
    fan_in : int, optional
        Measures that one stage merges, 2 or more; `FAN_IN` if None. 2 is the paper's recursion, in
        the order given, and the only one of the geodesics that are between two measures.
    initial : nn.Module, optional
        Where the last stage starts to learn, e.g. the barycenter of the round before; by default
        where its first measure is.
    critic : callable, optional
        Makes a fresh critic of samples; a multilayer perceptron if None.
    geodesic, start, iterations, budget : optional
        Short for the fields of `stage` of that name; iterations are the distillation's, or the
        WGAN's where nothing is distilled. ``two_critics`` are trained for as many iterations as
        `Training` has, where `stage` has none.
    stage : Stage, optional
        All settings of a stage.
    seed : int
        The same arguments give the same generator.
    latent_dim : int, optional
        For generators without the attribute.
    labels, latents : optional
        As in `fl_wb.generators.sampling.generate`. Of conditional generators, each label gets its
        own barycenter.
    label_counts : sequence of sequence of float, optional
        How often each generator has each label: its weight in that label's barycenter is in
        proportion, and a label that it has never is not learned from it. Equally often if None.
    store : StageStore or path, optional
        Keeps finished stages and checkpoints: a call with the same beginning does not train
        it again, and an interrupted one goes on where it was.
    device : optional
        Where to train; where the first generator is if None.
    executor : {None, "ray"}, optional
        Where the merges of one level run: one after another in this process, or side by side on
        Ray, on this machine or the cluster that ``ray.init(address=...)`` has reached.
    callback : optional
        Told (iterations done, in all, losses) of the stages that are trained; the losses'
        entry "stage" counts them.

    Returns
    -------
    nn.Module
        The barycenter's generator, in eval mode, on the first generator's device.

    Raises
    ------
    ValueError
        If there are no generators, a weight or setting is out of range, or a generator makes its
        samples of more than what it is called with.
    """
    if not len(generators):
        raise ValueError("a barycenter of no generators: give one at least")
    lambdas = check_weights(weights, len(generators))
    settings = stage_of(stage, geodesic, start, iterations, budget)
    often = label_frequencies(label_counts, len(generators), labels)

    def made(k: int) -> nn.Module:
        return driven(generators[k], latent_dim, labels, latents)

    given = generators[0]
    first, home = driven(given, latent_dim, labels, latents), device_of(given)
    law = latents_of(first, latent_dim)
    check_function(first, law)
    merge = Merge(
        settings,
        critic or (lambda: MLPCritic(generate(first, 2, latent_dim=latent_dim).shape[1:])),
        law,
        seed,
        store if isinstance(store, StageStore) else StageStore(store),
        torch.device(device) if device is not None else home,
    )
    measures = [
        Measure(partial(made, k), weight, digest(generators[k].state_dict()), often[k])
        for k, weight in enumerate(lambdas)
    ]
    begin = None if initial is None else driven(initial, latent_dim, labels, latents)
    nu = barycenter_of(
        measures, merge, fan_in=fan_in, initial=begin, executor=executor, callback=callback
    )
    return undriven(nu.to(home).eval(), given)


def barycenter_of(
    measures: Sequence[Measure],
    merge: Merge,
    *,
    fan_in: int | None = None,
    initial: nn.Module | None = None,
    executor: str | None = None,
    callback: Progress | None = None,
) -> nn.Module:
    """Merge measures; see `recursive_barycenter`, which makes them of generators."""
    widest = check_fan_in(fan_in, merge.settings)
    check_executor(executor)
    keys: list[str] = []
    done, total = 0, _stages(len(measures), widest)
    n, network = min(len(measures), widest), measures[0].generator()
    merge = replace(merge, settings=merge.settings.of_measures(n, network))
    if total and merge.settings.budget is not None:
        first = _level(measures, widest)[0]
        merge = merge.within(merge.settings.budget / total, first, initial)
    while len(measures) > 1:
        groups = _level(measures, widest)
        trained = [group for group in groups if len(group) > 1]
        last = initial if len(groups) == 1 else None
        told = [_of_stage(callback, done + k, total, merge.settings) for k in range(len(trained))]
        names = [f"Stage {done + k + 1} of {total}" for k in range(len(trained))]
        merged = iter(run_level(merge, trained, last, executor, told, names))
        done += len(trained)
        after: list[Measure] = []
        for group in groups:
            if len(group) == 1:
                after += group
                continue
            nu, key = next(merged)
            keys.append(key)
            weight = math.fsum(measure.weight for measure in group)
            often = mixed([(m.weight, m.labels) for m in group], merge.latents.labels)
            after.append(Measure.of(nu, weight, labels=often))
        measures = after
    if not keys:
        return merge.alone(measures[0])
    merge.store.keep_only(keys)
    return merge.placed(measures[0].generator())


def check_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """Return n weights as numbers; equal ones if there are none.

    Raises
    ------
    ValueError
        If their number differs, or one is not positive and finite.
    """
    if weights is None:
        return [1.0] * n
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} measures")
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"weights must be positive and finite, not {list(weights)}")
    return [float(w) for w in weights]


def shares_learned(weights: Sequence[float], settings: Stage, fan_in: int) -> list[float]:
    """Return the shares of the code (`fl_wb.generators.code`) that a barycenter has learned.

    Empty if there is no one code: of a single measure, or where measures were not merged by one
    stage that distils their mixture.
    """
    one_stage = 1 < len(weights) <= fan_in
    if not one_stage or (settings.geodesic, settings.start) != ("mixture", "distilled"):
        return []
    return list(Code(weights).shares)


def _level(measures: Sequence[Measure], fan_in: int) -> list[list[Measure]]:
    """Return what is merged next: the first two, or all in groups as equal as can be."""
    if fan_in == 2:
        return [list(measures[:2]), *([measure] for measure in measures[2:])]
    groups = math.ceil(len(measures) / fan_in)
    size, larger = divmod(len(measures), groups)
    cuts = [k * size + min(k, larger) for k in range(groups + 1)]
    return [list(measures[a:b]) for a, b in pairwise(cuts)]


def _stages(n: int, fan_in: int) -> int:
    """Return how many stages merge n measures."""
    if fan_in == 2:
        return n - 1
    if n <= fan_in:
        return int(n > 1)
    groups = math.ceil(n / fan_in)
    return groups + _stages(groups, fan_in)


def check_fan_in(fan_in: int | None, settings: Stage) -> int:
    """Return how many measures a stage merges; ValueError if its geodesic cannot."""
    pairs = settings.geodesic != "mixture"
    if fan_in is None:
        return 2 if pairs else FAN_IN
    if fan_in < 2 or (pairs and fan_in > 2):
        allowed = f"2: {settings.geodesic} is between two measures" if pairs else "2 or more"
        raise ValueError(f"fan_in={fan_in} must be {allowed}")
    return fan_in


def _of_stage(
    callback: Progress | None, done: int, stages: int, settings: Stage
) -> Progress | None:
    """Count the iterations of all stages as one sequence."""
    if callback is None:
        return None
    each, before = settings.iterations, done * settings.iterations
    distilled = each - settings.training.iterations

    def told(iteration: int, _: int, losses: dict[str, float]) -> None:
        at = before + iteration + (0 if "distillation" in losses else distilled)
        callback(at, stages * each, {"stage": float(done + 1), **losses})

    return told
