"""One stage of the barycenter: two generators merged into one, at t on a named geodesic.

W1(nu_{k-1}, mu_k) has many minimisers: every point of every W1 geodesic. A stage therefore
names its geodesic, and the weight goes into the position t on it, never into the critics'
losses, where the heavier measure alone would be optimal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from fl_wb.generators.copies import copy_of
from fl_wb.generators.mixture import Map, favor_small_parts, mix
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest
from fl_wb.training.distillation import Distillation, Pairs, distill, pairs_of
from fl_wb.training.wgan import (
    Progress,
    Sampler,
    Training,
    distance_to,
    push_forward,
    resample,
    train_wgan,
)
from fl_wb.transport import displacement

POOL = 8192
"""Samples of each measure that a stage's critics see, at most: drawn once, as from a data set.
Drawn anew for every critic step, they would cost a forward pass of the sources each time."""

GEODESICS = ("two_critics", "mixture", "displacement")
STARTS = ("distilled", "previous")


@dataclass
class Stage:
    """How a stage merges two generators.

    Attributes
    ----------
    geodesic
        ``mixture``: one critic against samples of both measures in proportion 1-t : t, which
        keeps samples sharp. ``two_critics``: the paper's saddle problem, one critic a measure
        at equal weights. ``displacement``: one critic against (1-t) x + t T(x), T the optimal
        coupling of two batches, which morphs samples.
    start
        ``previous``: nu_{k-1}, as in the paper. ``distilled``: the teacher, distilled into one
        generator first (ours). The teacher is a point of the geodesic as a map of the latent:
        the exact mixture (`mixture_map`), or the interpolation of two batches.
    fidelity
        Weight in the generator's WGAN loss of E||G(z) - teacher(z)||, which bounds
        W1(G, teacher) from above; 0 for the paper's loss. The critic sharpens, this holds the
        place on the geodesic.
    distillation
        How the distilled start is made.
    training
        The WGAN-GP that follows.
    """

    geodesic: str = "mixture"
    start: str = "distilled"
    fidelity: float = 1.0
    distillation: Distillation = field(default_factory=Distillation)
    training: Training = field(default_factory=lambda: Training(iterations=200, warmup=100))

    def __post_init__(self) -> None:  # noqa: D105
        for name, value, allowed in (
            ("geodesic", self.geodesic, GEODESICS),
            ("start", self.start, STARTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def mixture_map(previous: Map, new: Map, t: float) -> Map:
    """Write the exact mixture (1-t) nu + t mu of two generators as ONE map of the latent.

    The push-forward is the mixture itself (`fl_wb.generators.mixture`): a W1-optimal point at equal
    weights, for any t. (Ours; not in the paper.)

    Returns
    -------
    callable
        Latents (n, latent_dim) to samples (n, ...).
    """
    return lambda z: mix([previous, new], [1 - t, t], z)


@dataclass(frozen=True)
class Merge:
    """What all stages of one recursion share.

    Attributes
    ----------
    settings
        How a stage merges.
    critic
        Makes a fresh critic.
    dim
        Dimension of the latents.
    seed
        Of all randomness.
    store
        Of finished stages and checkpoints.
    device
        Where to train.
    """

    settings: Stage
    critic: Callable[[], nn.Module]
    dim: int
    seed: int
    store: StageStore
    device: torch.device

    def place(self, generator: nn.Module) -> nn.Module:
        """Copy a generator to the device, frozen, in the mode in which it is sampled."""
        return copy_of(generator).to(self.device).eval().requires_grad_(False)

    def run(
        self, previous: nn.Module, new: nn.Module, t: float, callback: Progress | None
    ) -> tuple[nn.Module, str]:
        """Merge two generators at t; returns the merged one and its key in the store."""
        critics = self._critics()
        key = self._key(previous, new, t, critics)
        merged = self.place(previous)
        finished = self.store.get(key)
        if finished is not None:
            try:
                merged.load_state_dict(finished)
                return merged, key
            except RuntimeError:
                self.store.set_aside(key, f"Stage {key[:12]} holds another network")
        seed = int(key[:15], 16)
        start = self.store.checkpoint(f"{key}-start")
        training = self.store.checkpoint(key)
        teacher = self._teacher(previous, new, t)
        merged.requires_grad_(True)
        if self.settings.start == "distilled":
            distill(
                merged,
                self._pairs(teacher, t),
                self.settings.distillation,
                seed=seed,
                callback=callback,
                checkpoint=start,
            )
        merged = train_wgan(
            merged,
            critics,
            self._reals(previous, new, t, seed),
            self.settings.training,
            latent_dim=self.dim,
            seed=seed,
            regularizer=distance_to(teacher, self.settings.fidelity),
            callback=callback,
            checkpoint=training,
        ).generator.requires_grad_(False)
        self.store.put(key, merged.state_dict(), {"t": str(t), **_text(self.settings)})
        start.clear()
        training.clear()
        return merged, key

    def _critics(self) -> list[nn.Module]:
        # Fresh in every stage, from the seed alone: the caller's random state neither decides
        # the result nor is moved by it.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return [
                self.critic() for _ in range(2 if self.settings.geodesic == "two_critics" else 1)
            ]

    def _teacher(self, previous: nn.Module, new: nn.Module, t: float) -> Map:
        if self.settings.geodesic == "displacement":
            return lambda z: displacement(previous(z), new(z), t)
        return mixture_map(previous, new, t)

    def _pairs(self, teacher: Map, t: float) -> Pairs:
        if self.settings.geodesic == "displacement":  # no parts: every sample is of both measures
            return pairs_of(teacher, self.dim)
        return pairs_of(teacher, self.dim, lambda z: favor_small_parts(z, [1 - t, t]))

    def _reals(self, previous: nn.Module, new: nn.Module, t: float, seed: int) -> list[Sampler]:
        maps: list[Map] = [self._teacher(previous, new, t)]
        if self.settings.geodesic == "two_critics":
            maps = [previous, new]
        training = self.settings.training
        # One batch at a time: that is what the displacement couples.
        size, batch = min(POOL, max(training.reals, 1)), training.batch_size
        rng = torch.Generator(self.device).manual_seed(seed)
        pools = [push_forward(generator, self.dim, batch)(size, rng) for generator in maps]
        return [resample(pool) for pool in pools]

    def _key(self, previous: nn.Module, new: nn.Module, t: float, critics: list[nn.Module]) -> str:
        went_in = {
            "measures": [digest(previous.state_dict()), digest(new.state_dict())],
            "critics": [digest(critic.state_dict()) for critic in critics],
            "settings": asdict(self.settings),
            "t": t,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(went_in, sort_keys=True).encode()).hexdigest()


def _text(settings: Stage) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in asdict(settings).items()}
