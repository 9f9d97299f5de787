"""Adaptive coalescence: generators of many nodes become one Wasserstein-1 barycenter.

Dedeoglu, Lin, Zhang, Zhang: "Continual Learning of Generative Models with Limited Data: From
Wasserstein-1 Barycenter to Adaptive Coalescence", https://arxiv.org/abs/2101.09225.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from time import perf_counter

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor, nn

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.generators.sampling import check_factory, generate
from fl_wb.messages import generator_part, records
from fl_wb.messages.screening import outliers
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest
from fl_wb.reporting.progress import progress
from fl_wb.strategies.checks import (
    check_device,
    check_networks,
    check_not_wrapped,
    check_settings,
)
from fl_wb.strategies.model import Model, State
from fl_wb.strategies.role_fedavg import RoleFedAvg
from fl_wb.strategies.uploads import Upload, Uploads
from fl_wb.training.wgan import Progress

SCREENED = 256  # samples of each upload that are compared


class AdaptiveCoalescence(RoleFedAvg):
    """Merge the nodes' generators into a recursive Wasserstein-1 barycenter.

    The server keeps the latest valid generator of every node it has seen, and the barycenter of
    these is the global model. Stages are kept, so that a round costs as many of them as there are
    new or changed generators (and those that stand behind a changed one). A node that left stays
    merged; once many did, their generators are folded into one (see `uploads.Uploads.fold`), and
    one of them that comes back later counts as a new node. Uploads are merged in the order of the
    round in which they arrived; within a round, the heaviest first. What a node sends is checked,
    and dropped with a warning if it is no use.

    Where the generator is part of a larger model (`generator_keys`), that part is coalesced and all
    other arrays are averaged, over the uploads of the round, as FedAvg does.

    Nodes may have roles (see `RoleFedAvg`): sources train, targets evaluate.

    Parameters
    ----------
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes, \
weighted_by_key, arrayrecord_key, configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn
        As in `flwr.serverapp.strategy.FedAvg`. The value under `weighted_by_key` is a node's
        weight lambda_k in the barycenter.
    generator : callable
        Factory: makes a generator, an ``nn.Module`` from latents (n, latent_dim) to samples
        (n, ...), whose state dict has the names and shapes of `initial_arrays`, or of those of
        them that `generator_keys` select. A beginning that all of their names share, such as
        "model.generator.", may be missing from its own.
    critic : callable, optional
        Factory: makes a critic, an ``nn.Module`` from samples to (n,) or (n, 1). By default a
        multilayer perceptron.
    latent_dim : int, optional
        Needed if the generator has no attribute ``latent_dim``.
    generator_keys : sequence of str, optional
        Prefixes of the generator's arrays where the model has others too, e.g.
        ``("fc3.", "decoder.")`` of a VAE.
    refit : callable, optional
        Called after each merge with the state dict of the whole model, the generator merged, the
        rest averaged; returns a state dict in which the rest was fitted to the new generator (see
        `fl_wb.training.encoder.fit_encoder`). What it makes of the generator's own arrays is
        ignored.
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
        Drop uploads that collapsed, or whose samples are more than this many times further from
        the others' than is typical (see `fl_wb.messages.screening`; 3 measured well). None: off.
    callback : callable, optional
        Called during stages with (iteration, iterations in all, losses). By default they are
        logged every few seconds.
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
        generator_keys: Sequence[str] | None = None,
        refit: Callable[[State], Mapping[str, Tensor]] | None = None,
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
        check_factory("generator", generator)
        if critic is not None:
            check_factory("critic", critic)
        if refit is not None and generator_keys is None:
            raise ValueError("refit without generator_keys: no other part of the model is there")
        check_settings(stage, geodesic, iterations, seed, patience, screening)
        self.generator = generator
        self.critic = critic
        self.latent_dim = latent_dim
        self.generator_keys = generator_part.check_prefixes(generator_keys)
        self.refit = refit
        self.stage = stage
        self.geodesic = geodesic
        self.iterations = iterations
        self.seed = seed
        self.store = store if isinstance(store, StageStore) else StageStore(store)
        self.device = device
        self.callback = callback
        self.screening = screening
        self._patience = patience
        self._model: Model | None = None
        self._uploads = Uploads()

    def summary(self) -> None:
        """Log summary configuration of the strategy.

        Raises
        ------
        ValueError
            Inside a wrapper for central differential privacy; see `checks.check_not_wrapped`.
        """
        check_not_wrapped()
        super().summary()
        stage = self.stage or Stage()
        iterations = stage.training.iterations if self.iterations is None else self.iterations
        log(INFO, "\t└──> Barycenter:")
        log(INFO, "\t\t├── Geodesic: '%s'", self.geodesic or stage.geodesic)
        log(INFO, "\t\t├── Iterations a stage: %d", iterations)
        if self.generator_keys is not None:
            log(INFO, "\t\t├── Of the arrays: %s", ", ".join(self.generator_keys))
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
        if server_round == 1 or self._model is None:
            self._begin(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the uploads; the arrays are None (the model stays) if none is valid."""
        received = self._received(replies, is_train=True)
        kept, others, before = [], [], self._uploads.copy()
        for node_id, content in received:
            try:
                upload, rest = self._read(server_round, content)
            except records.InvalidUpload as error:
                log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, error)
                continue
            self._uploads.put(node_id, upload)
            kept.append((node_id, content))
            others.append((node_id, upload.weight, rest))
        kept = self._screened(kept)
        good = {node_id for node_id, _ in kept}
        others = [other for other in others if other[0] in good]
        self._judge({node_id for node_id, _ in received} - good, good)
        alike = self._alike(kept, "aggregate_train")
        metrics = self.train_metrics_aggr_fn(alike, self.weighted_by_key) if alike else None
        arrays = None
        if not kept:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
        elif (state := self._merge()) is not None:
            assert self._model is not None
            arrays = self._model.whole(state, others)
        if arrays is None:
            self._uploads = before  # what the model is made of
        metrics = MetricRecord(dict(metrics or {}))
        metrics["uploads-merged"] = len(self._uploads)
        metrics["uploads-dropped"] = len(received) - len(kept)
        return arrays, metrics

    def _begin(self, arrays: ArrayRecord) -> None:
        """Start from scratch, as `start` means it, once everything is seen to fit."""
        check_device(self.device)
        generative, _ = generator_part.split(arrays, self.generator_keys)
        network = check_networks(generative, self.generator, self.critic, self.latent_dim)
        self._model = Model(arrays, network, self.generator_keys, self.refit)
        self._uploads = Uploads()
        self._strikes.clear()

    def _read(self, server_round: int, content: RecordDict) -> tuple[Upload, State]:
        """Check one reply; an InvalidUpload says what is wrong with it."""
        weight = self._weight(content)
        arrays = list(content.array_records.values())
        if len(arrays) != 1:
            raise records.InvalidUpload(f"it has {len(arrays)} ArrayRecords instead of one")
        assert self._model is not None
        state, rest = self._model.read(arrays[0])
        records.check_samples(self._network(state), latent_dim=self.latent_dim)
        return Upload(server_round, weight, digest(state), state), rest

    def _screened(self, kept: list[tuple[int, RecordDict]]) -> list[tuple[int, RecordDict]]:
        """Drop the uploads, of this round and before, that are too far from the others."""
        if self.screening is None:
            return kept
        uploads = self._uploads.of_nodes()
        nodes = sorted(uploads)
        networks = (self._network(uploads[node_id].state) for node_id in nodes)
        samples = [
            generate(network, SCREENED, seed=self.seed, latent_dim=self.latent_dim)
            for network in networks
        ]
        for index, why in outliers(samples, threshold=self.screening, seed=self.seed):
            log(
                WARNING,
                "aggregate_train: dropped the upload of node %d: %s (screening=%s)",
                nodes[index],
                why,
                self.screening,
            )
            self._uploads.drop(nodes[index])
        left = self._uploads.of_nodes()
        return [(node_id, content) for node_id, content in kept if node_id in left]

    def _network(self, state: State) -> nn.Module:
        network = self.generator()
        network.load_state_dict(state)
        return network

    def _merge(self) -> State | None:
        """Return the barycenter of all uploads, or None if it came to nothing."""
        began = perf_counter()
        if folded := self._uploads.fold(self._connected, self._barycenter):
            log(INFO, "aggregate_train: folded the generators of %d nodes that left", folded)
        merged = self._barycenter(self._uploads.ordered())
        log(INFO, "aggregate_train: merged in %.1f s", perf_counter() - began)
        return merged

    def _barycenter(self, uploads: Sequence[Upload]) -> State | None:
        total = sum(upload.weight for upload in uploads)
        shares = ", ".join(f"{upload.weight / total:.3g}" for upload in uploads)
        log(INFO, "aggregate_train: merging %d generators with weights %s", len(uploads), shares)
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
                callback=self.callback or progress("Barycenter"),
            )
            records.check_samples(barycenter, latent_dim=self.latent_dim)
        except (FloatingPointError, records.InvalidUpload) as error:
            log(WARNING, "aggregate_train: the merge failed (%s): the model stays", error)
            return None
        return {name: value.cpu() for name, value in barycenter.state_dict().items()}
