"""One merge of uploads: the settings of a run's barycenters, and what makes their networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_wb.barycenter import Measure, Merge, Stage, barycenter_of, check_conditional, shares_learned
from fl_wb.federation.model import State
from fl_wb.generators.latents import Draw, frequencies, law_of
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import driven, generate, latents_of, undriven
from fl_wb.messages import records
from fl_wb.persistence.stage_store import StageStore
from fl_wb.reporting.progress import progress
from fl_wb.training.wgan import Progress

CONTINUED = 0.5
"""Of a stage's iterations, where it starts at the barycenter of the round before."""


@dataclass(frozen=True)
class Merger:
    """How a run's uploads are merged; its fields are those arguments of `AdaptiveCoalescence`."""

    generator: Callable[[], nn.Module]
    critic: Callable[[], nn.Module] | None
    latent_dim: int | None
    labels: int | None
    latents: str | Draw
    stage: Stage
    fan_in: int
    executor: str | None
    seed: int
    store: StageStore
    device: str
    callback: Progress | None

    def __post_init__(self) -> None:
        """Refuse labels and latents that are none, and what they cannot be merged with."""
        law_of(self.latents)
        if frequencies(self.labels):
            check_conditional(self.stage)

    @property
    def settings(self) -> dict[str, object]:
        """What a barycenter depends on beside its measures, of all that has a name.

        Not the stage's budget: how many iterations that makes depends on the moment.
        """
        law = self.latents
        if not isinstance(law, str):
            law = f"{law.__module__}.{getattr(law, '__qualname__', type(law).__qualname__)}"
        return {
            "stage": self.stage.of_result(),
            "fan_in": self.fan_in,
            "labels": self.labels,
            "latents": law,
            "seed": self.seed,
        }

    def network(self, state: State) -> nn.Module:
        """Make the generator of a state, as one of one tensor."""
        network = self.generator()
        network.load_state_dict(state)
        return self._driven(network)

    def shares(self, weights: Sequence[float]) -> list[float]:
        """Return the shares of the code in the merge of so weighed uploads; empty without code.

        Where there are labels, each has shares of its own, and nothing is said.
        """
        return [] if self.labels else shares_learned(weights, self.stage, self.fan_in)

    def check(self, network: nn.Module) -> None:
        """Raise InvalidUpload if a generator's samples are of no use."""
        records.check_samples(network, latent_dim=self.latent_dim)

    def samples(self, state: State, n: int) -> Tensor:
        """Return n samples (n, ...) of the generator of a state."""
        return generate(self.network(state), n, seed=self.seed, latent_dim=self.latent_dim)

    def merge(self, measures: Sequence[Measure], before: State | None) -> State:
        """Return the state of the measures' barycenter; `before` is that of the last round.

        Raises
        ------
        UselessMeasures, FloatingPointError, InvalidUpload
            If nothing comes of it, the first where measures are the cause.
        """
        plain = self.generator()
        network = self._driven(plain)
        settings, initial = self.stage, None
        if before is not None:
            initial = self.network(before)
            settings = settings.shortened(CONTINUED)
        merge = Merge(
            settings,
            self.critic or (lambda: MLPCritic(self._shape(network))),
            latents_of(network, self.latent_dim),
            self.seed,
            self.store,
            torch.device(self.device),
        )
        merged = barycenter_of(
            measures,
            merge,
            fan_in=self.fan_in,
            initial=initial,
            executor=self.executor,
            callback=self.callback or progress("Barycenter"),
        )
        self.check(merged)
        state = undriven(merged, plain).state_dict()
        return {name: value.cpu() for name, value in state.items()}

    def _driven(self, network: nn.Module) -> nn.Module:
        return driven(network, self.latent_dim, self.labels, self.latents)

    def _shape(self, network: nn.Module) -> tuple[int, ...]:
        return tuple(generate(network, 2, latent_dim=self.latent_dim).shape[1:])
