"""Adaptive coalescence: generators of many nodes become one Wasserstein-1 barycenter.

Dedeoglu, Lin, Zhang, Zhang: "Continual Learning of Generative Models with Limited Data: From
Wasserstein-1 Barycenter to Adaptive Coalescence", https://arxiv.org/abs/2101.09225.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from time import perf_counter

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor, nn

from fl_wb import records
from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.networks import generate, latent_dim_of
from fl_wb.screening import outliers
from fl_wb.storage import digest
from fl_wb.store import StageStore
from fl_wb.strategies.role_fedavg import RoleFedAvg
from fl_wb.wgan import Progress

SCREENED = 256  # samples of each upload that are compared


@dataclass(frozen=True)
class Upload:
    """The latest generator of one node, and the round in which it first arrived."""

    round: int
    weight: float
    digest: str
    state: dict[str, Tensor]


class AdaptiveCoalescence(RoleFedAvg):
    """Merge the nodes' generators into a recursive Wasserstein-1 barycenter.

    The server keeps the latest valid generator of every node it has seen, and the barycenter of
    these is the global model. Stages are kept, so that a round costs as many of them as there are
    new or changed generators (and those that stand behind a changed one); a node that left stays
    merged. Uploads are merged in the order of the round in which they arrived; within a round, the
    heaviest first. What a node sends is checked, and dropped with a warning if it is no use.

    Nodes may have roles (see `RoleFedAvg`): sources train, targets evaluate.

    Parameters
    ----------
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes, \
weighted_by_key, arrayrecord_key, configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn
        As in `flwr.serverapp.strategy.FedAvg`. The value under `weighted_by_key` is a node's
        weight lambda_k in the barycenter.
    generator : callable
        Factory: makes a generator, an ``nn.Module`` from latents (n, latent_dim) to samples
        (n, ...), whose state dict has the names and shapes of `initial_arrays`.
    critic : callable, optional
        Factory: makes a critic, an ``nn.Module`` from samples to (n,) or (n, 1). By default a
        multilayer perceptron.
    latent_dim : int, optional
        Needed if the generator has no attribute ``latent_dim``.
    stage : Stage, optional
        Settings of one merge; see `fl_wb.barycenter.Stage`.
    geodesic : {"mixture", "displacement", "two_critics"}, optional
        Overrides the stage's geodesic.
    iterations : int, optional
        Overrides the stage's number of generator iterations.
    seed : int
        Same uploads and same seed: same barycenter, bit for bit on the same machine.
    store : StageStore or path, optional
        Folder of finished and interrupted stages: a server that was killed takes up from there
        when it is started again with the same settings. By default they live in memory.
    device : str
        Where stages are trained, e.g. "cuda".
    patience : int, optional
        A node whose upload was dropped in that many rounds in a row is not asked to train again.
        None: it always is.
    screening : float, optional
        Drop uploads whose samples are more than this many times further from the others' than is
        typical (`fl_wb.screening`; 1.5 does where sources have something in common). None: off.
    callback : callable, optional
        Called during stages with (iteration, iterations in all, losses).
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        *,
        generator: Callable[[], nn.Module],
        critic: Callable[[], nn.Module] | None = None,
        latent_dim: int | None = None,
        stage: Stage | None = None,
        geodesic: str | None = None,
        iterations: int | None = None,
        seed: int = 0,
        store: StageStore | str | Path | None = None,
        device: str = "cpu",
        patience: int | None = 3,
        screening: float | None = None,
        callback: Progress | None = None,
    ) -> None:
        super().__init__(
            fraction_train,
            fraction_evaluate,
            min_train_nodes,
            min_evaluate_nodes,
            min_available_nodes,
            weighted_by_key,
            arrayrecord_key,
            configrecord_key,
            train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn,
        )
        for name, factory in (("generator", generator), ("critic", critic)):
            if isinstance(factory, nn.Module) or not (factory is None or callable(factory)):
                raise TypeError(
                    f"{name} must be a factory, a function without arguments that makes the "
                    f"{name}, not {type(factory).__name__}"
                )
        self.generator = generator
        self.critic = critic
        self.latent_dim = latent_dim
        self.stage = stage
        self.geodesic = geodesic
        self.iterations = iterations
        self.seed = seed
        self.store = store if isinstance(store, StageStore) else StageStore(store)
        self.device = device
        if screening is not None and not screening > 1:
            raise ValueError(f"screening={screening} must be more than 1: typical uploads have 1")
        self.callback = callback
        self.screening = screening
        self._patience = patience
        self._initial = ArrayRecord()
        self._template: dict[str, Tensor] = {}
        self._uploads: dict[int, Upload] = {}

    def summary(self) -> None:
        """Log summary configuration of the strategy."""
        super().summary()
        stage = self.stage or Stage()
        iterations = stage.training.iterations if self.iterations is None else self.iterations
        log(INFO, "\t└──> Barycenter:")
        log(INFO, "\t\t├── Geodesic: '%s'", self.geodesic or stage.geodesic)
        log(INFO, "\t\t├── Iterations a stage: %d", iterations)
        log(INFO, "\t\t└── Stages kept in: %s", self.store.folder or "memory")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training; before the first one, check the networks.

        Raises
        ------
        ValueError
            If `initial_arrays`, generator, critic and latent dimension do not fit together.
        """
        if server_round == 1 or not self._template:
            self._begin(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the uploads; the arrays are None (the model stays) if none is valid."""
        received = self._received(replies, is_train=True)
        kept, before = [], dict(self._uploads)
        for node_id, content in received:
            try:
                upload = self._read(server_round, content)
            except records.InvalidUpload as error:
                log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, error)
                continue
            known = self._uploads.get(node_id)
            if known is None or (known.digest, known.weight) != (upload.digest, upload.weight):
                self._uploads[node_id] = upload
            kept.append((node_id, content))
        kept = self._screened(kept)
        good = {node_id for node_id, _ in kept}
        self._judge({node_id for node_id, _ in received} - good, good)
        alike = self._alike(kept, "aggregate_train")
        metrics = self.train_metrics_aggr_fn(alike, self.weighted_by_key) if alike else None
        if kept:
            arrays = self._merge()
        else:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
            arrays = None
        if arrays is None:
            self._uploads = before  # what the model is made of
        metrics = MetricRecord(dict(metrics or {}))
        metrics["uploads-merged"] = len(self._uploads)
        metrics["uploads-dropped"] = len(received) - len(kept)
        return arrays, metrics

    def _begin(self, arrays: ArrayRecord) -> None:
        """Start from scratch, as `start` means it, once everything is seen to fit."""
        network = self.generator()
        try:
            records.validate(arrays, network.state_dict())
        except records.InvalidUpload as error:
            raise ValueError(f"initial_arrays do not fit the generator: {error}") from error
        latent_dim = latent_dim_of(network, self.latent_dim)
        try:
            samples = generate(network, 4, latent_dim=latent_dim)
        except Exception as error:
            raise ValueError(f"generator takes no latents (4, {latent_dim}): {error}") from error
        if self.critic is not None:
            self._check_critic(self.critic(), samples)
        self._initial = arrays
        self._template = {name: value.cpu() for name, value in network.state_dict().items()}
        self._uploads = {}
        self._strikes.clear()

    @staticmethod
    def _check_critic(critic: nn.Module, samples: Tensor) -> None:
        shape = tuple(samples.shape)
        try:
            with torch.no_grad():
                scores = critic(samples)
        except Exception as error:
            raise ValueError(f"the critic does not take samples {shape}: {error}") from error
        if tuple(scores.shape) not in {(len(samples),), (len(samples), 1)}:
            raise ValueError(
                f"the critic makes scores {tuple(scores.shape)} of samples {shape}, "
                f"not ({len(samples)},) or ({len(samples)}, 1)"
            )

    def _read(self, server_round: int, content: RecordDict) -> Upload:
        """Check one reply; an InvalidUpload says what is wrong with it."""
        weight = self._weight(content)
        arrays = list(content.array_records.values())
        if len(arrays) != 1:
            raise records.InvalidUpload(f"it has {len(arrays)} ArrayRecords instead of one")
        state = records.validate(arrays[0], self._template)
        records.check_samples(self._network(state), latent_dim=self.latent_dim)
        return Upload(server_round, weight, digest(state), state)

    def _screened(self, kept: list[tuple[int, RecordDict]]) -> list[tuple[int, RecordDict]]:
        """Drop the uploads, of this round and before, that are too far from the others."""
        if self.screening is None:
            return kept
        nodes = sorted(self._uploads)
        networks = (self._network(self._uploads[node_id].state) for node_id in nodes)
        samples = [
            generate(network, SCREENED, seed=self.seed, latent_dim=self.latent_dim)
            for network in networks
        ]
        for index, far in outliers(samples, threshold=self.screening, seed=self.seed):
            log(
                WARNING,
                "aggregate_train: dropped the upload of node %d: its samples are %.1f times "
                "further from the others' than is typical (screening=%s)",
                nodes[index],
                far,
                self.screening,
            )
            del self._uploads[nodes[index]]
        return [(node_id, content) for node_id, content in kept if node_id in self._uploads]

    def _network(self, state: dict[str, Tensor]) -> nn.Module:
        network = self.generator()
        network.load_state_dict(state)
        return network

    def _merge(self) -> ArrayRecord | None:
        """Return the barycenter of all uploads, in an order that no network delay can change."""
        uploads = sorted(self._uploads.values(), key=lambda u: (u.round, -u.weight, u.digest))
        total = sum(upload.weight for upload in uploads)
        shares = ", ".join(f"{upload.weight / total:.3g}" for upload in uploads)
        log(INFO, "aggregate_train: merging %d generators with weights %s", len(uploads), shares)
        began = perf_counter()
        try:
            barycenter = recursive_barycenter(
                [self._network(upload.state) for upload in uploads],
                [upload.weight for upload in uploads],
                critic=self.critic,
                stage=self.stage,
                geodesic=self.geodesic,
                iterations=self.iterations,
                seed=self.seed,
                latent_dim=self.latent_dim,
                store=self.store,
                device=self.device,
                callback=self.callback,
            )
            records.check_samples(barycenter, latent_dim=self.latent_dim)
        except (FloatingPointError, records.InvalidUpload) as error:
            log(WARNING, "aggregate_train: the merge failed (%s): the model stays", error)
            return None
        log(INFO, "aggregate_train: merged in %.1f s", perf_counter() - began)
        return records.like(barycenter.state_dict(), self._initial)
