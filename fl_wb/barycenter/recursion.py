"""Recursive Wasserstein-1 barycenter of generators: stage by stage, resumable.

nu_1 = mu_1; stage k merges nu_{k-1} and mu_k into nu_k at t_k = lambda_k / Lambda_k, where
Lambda_k = lambda_1 + ... + lambda_k (Dedeoglu et al., arXiv 2101.09225, section 4). Only two
generators are alive at a time, and a generator that arrives later costs one more stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_wb.barycenter.stage import GEODESICS, STARTS, Merge, Stage, mixture_map
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import device_of, generate, latent_dim_of
from fl_wb.persistence.stage_store import StageStore
from fl_wb.training.wgan import Progress
from fl_wb.transport import wasserstein1

__all__ = [
    "GEODESICS",
    "STARTS",
    "Stage",
    "StageStore",
    "mixture_map",
    "optimality_gap",
    "recursive_barycenter",
]


def recursive_barycenter(
    generators: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    critic: Callable[[], nn.Module] | None = None,
    geodesic: str | None = None,
    start: str | None = None,
    iterations: int | None = None,
    stage: Stage | None = None,
    seed: int = 0,
    latent_dim: int | None = None,
    store: StageStore | str | Path | None = None,
    device: str | torch.device | None = None,
    callback: Progress | None = None,
) -> nn.Module:
    """Merge generators, in the order given, into one that generates their W1 barycenter.

    The joint barycenter of K >= 3 measures is a Frechet median, which a recursion of pairwise
    optima need not reach; `optimality_gap` says how near the result is.

    Parameters
    ----------
    generators : sequence of nn.Module
        Of one architecture, latents (n, latent_dim) to samples (n, ...). Left alone.
    weights : sequence of float, optional
        lambda_k > 0, one each; equal if None.
    critic : callable, optional
        Makes a fresh critic of samples; a multilayer perceptron if None.
    geodesic, start, iterations : optional
        Short for the fields of `stage` of that name; iterations are the WGAN's.
    stage : Stage, optional
        All settings of a stage.
    seed : int
        The same arguments give the same generator.
    latent_dim : int, optional
        For generators without the attribute.
    store : StageStore or path, optional
        Keeps finished stages and checkpoints: a call with the same beginning does not train
        it again, and an interrupted one goes on where it was.
    device : optional
        Where to train; where the first generator is if None.
    callback : optional
        Told (iterations done, in all, losses) of the stages that are trained; the losses'
        entry "stage" is k.

    Returns
    -------
    nn.Module
        The barycenter's generator, in eval mode, on the first generator's device.

    Raises
    ------
    ValueError
        If there are no generators, or a weight or setting is out of range.
    """
    if not generators:
        raise ValueError("a barycenter of no generators: give one at least")
    lambdas = _check_weights(weights, len(generators))
    settings = _settings(stage, geodesic, start, iterations)
    home = device_of(generators[0])
    merge = Merge(
        settings,
        critic or (lambda: MLPCritic(_sample_shape(generators[0], latent_dim))),
        latent_dim_of(generators[0], latent_dim),
        seed,
        store if isinstance(store, StageStore) else StageStore(store),
        torch.device(device) if device is not None else home,
    )
    nu, total, keys = merge.place(generators[0]), lambdas[0], []
    for k in range(1, len(generators)):
        total += lambdas[k]
        told = _stage_progress(callback, k + 1, settings, len(generators))
        nu, key = merge.run(nu, merge.place(generators[k]), lambdas[k] / total, told)
        keys.append(key)
    if keys:
        merge.store.keep_only(keys)
    return nu.to(home).eval().requires_grad_(True)


def optimality_gap(
    samples: Tensor, sources: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Barycenter objective of samples of nu, and a lower bound of the least possible.

    The objective is sum_k lambda_k W1(nu, mu_k) with the weights normalised to one, by exact
    transport. The bound adds up triangle inequalities W1(nu, mu_i) + W1(nu, mu_j) >=
    W1(mu_i, mu_j) with c_ij = lambda_i lambda_j / max(Lambda - lambda_i, Lambda - lambda_j),
    which spends at most lambda_i on each measure; for K = 2 it is reached.

    Parameters
    ----------
    samples : Tensor
        Samples (n, ...) of the barycenter.
    sources : sequence of Tensor
        Samples (n_k, ...) of each source measure.
    weights : sequence of float, optional
        lambda_k > 0; equal if None.

    Returns
    -------
    objective, bound : float
        In the units of the samples.
    """
    lambdas = _check_weights(weights, len(sources))
    lambdas = [w / sum(lambdas) for w in lambdas]
    objective = sum(w * wasserstein1(samples, s) for w, s in zip(lambdas, sources, strict=True))
    bound = sum(
        a * b / max(1 - a, 1 - b) * wasserstein1(sources[i], sources[j])
        for i, a in enumerate(lambdas)
        for j, b in enumerate(lambdas[:i])
    )
    return objective, float(bound)


def _check_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} measures")
    if not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"weights must be positive and finite, not {list(weights)}")
    return [float(w) for w in weights]


def _settings(
    stage: Stage | None, geodesic: str | None, start: str | None, iterations: int | None
) -> Stage:
    settings = stage or Stage()
    if iterations is not None:
        settings = replace(settings, training=replace(settings.training, iterations=iterations))
    return replace(settings, geodesic=geodesic or settings.geodesic, start=start or settings.start)


def _stage_progress(
    callback: Progress | None, k: int, settings: Stage, generators: int
) -> Progress | None:
    """Count the iterations of all stages as one sequence."""
    if callback is None:
        return None
    distilled = settings.distillation.iterations if settings.start == "distilled" else 0
    per_stage = distilled + settings.training.iterations

    def told(done: int, _: int, losses: dict[str, float]) -> None:
        before = (k - 2) * per_stage + (0 if "distillation" in losses else distilled)
        callback(before + done, (generators - 1) * per_stage, {"stage": float(k), **losses})

    return told


def _sample_shape(generator: nn.Module, latent_dim: int | None) -> tuple[int, ...]:
    return tuple(generate(generator, 1, latent_dim=latent_dim).shape[1:])
