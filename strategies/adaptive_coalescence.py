"""Adaptive coalescence: generators of many nodes become one Wasserstein-1 barycenter.

Dedeoglu, Lin, Zhang, Zhang: "Continual Learning of Generative Models with Limited Data: From
Wasserstein-1 Barycenter to Adaptive Coalescence", https://arxiv.org/abs/2101.09225.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fl_wb.barycenter import (
    Measure,
    Merge,
    Stage,
    UselessMeasure,
    barycenter_of,
    check_executor,
    check_fan_in,
    shares_learned,
    stage_of,
)
from fl_wb.generators.networks import MLPCritic
from fl_wb.generators.sampling import check_factory, generate, latent_dim_of
from fl_wb.messages import generator_part, keys, records
from fl_wb.messages import replies as checked
from fl_wb.messages.screening import outliers
from fl_wb.messages.weights import MAX_SHARE, bounded_weights
from fl_wb.persistence.locks import InUseError, locked
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest
from fl_wb.reporting.progress import progress
from fl_wb.strategies.checks import (
    check_device,
    check_networks,
    check_not_wrapped,
    check_settings,
)
from fl_wb.strategies.memory import Memory
from fl_wb.strategies.model import Model, State, average
from fl_wb.strategies.role_fedavg import Observer, RoleFedAvg
from fl_wb.strategies.uploads import Upload, Uploads
from fl_wb.training.wgan import Progress

SCREENED = 256  # samples of each upload that are compared

CONTINUED = 0.5
"""Of a stage's iterations, where it starts at the barycenter of the round before."""

CONTINUE_FROM = ("own", "average", "barycenter")


class AdaptiveCoalescence(RoleFedAvg):
    """Merge the nodes' generators into a Wasserstein-1 barycenter, a stage a round.

    The server keeps the latest valid upload of every node it has seen, and the barycenter of these
    is the global model: what evaluation, `evaluate_fn` and the result get. A node that trains goes
    on from its own last upload, and a newcomer from the barycenter (`continue_from`): its generator
    would otherwise have to become its own anew in each round. A round's stage starts at the
    barycenter of the round before, and a node keeps its place in the code
    (`fl_wb.generators.code`); a round after which nobody is given the model merges nothing.

    A node that left stays merged; once many did, their generators are folded into one (see
    `uploads.Uploads.fold`), and one of them that comes back later counts as a new node. What a node
    sends is checked, and dropped with a warning if it is no use.

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
    generator_keys : sequence of str or slice, optional
        Prefixes of the generator's arrays where the model has others too, e.g.
        ``("fc3.", "decoder.")`` of a VAE; or their places, e.g. ``slice(0, 14)`` of the list that
        a `NumPyClient` sends.
    refit : callable, optional
        Called after each merge with the state dict of the whole model, the generator merged, the
        rest averaged; returns a state dict in which the rest was fitted to the new generator (see
        `fl_wb.training.encoder.fit_encoder`). What it makes of the generator's own arrays is
        ignored.
    stage : Stage, optional
        Settings of one merge; see `fl_wb.barycenter.Stage`.
    geodesic, iterations, fan_in, executor : optional
        As in `fl_wb.barycenter.recursive_barycenter`.
    continue_from : {"own", "average", "barycenter"}
        What a node goes on from when it trains: its own last upload, the average of all (as with
        FedAvg), or the barycenter. Newcomers get the barycenter.
    max_age : int, optional
        Uploads that arrived more rounds ago do not count: 0 for those of the round alone. None:
        the latest of each node does, however old it is.
    seed : int
        Same uploads and same seed: same barycenter, bit for bit on the same machine.
    store : StageStore or path, optional
        Folder of finished and interrupted stages, and of the nodes' uploads at the end of each
        round: a server that was killed takes up from there, and one that ended is extended by the
        next `start` with the same model. One run at a time may use it. By default all of it lives
        in memory.
    device : str
        Where stages are trained, e.g. "cuda".
    patience : int, optional
        A node whose upload was dropped in that many rounds in a row is not asked to train again.
        None: it always is.
    screening : float, optional
        Drop uploads that collapsed, or whose samples are more than this many times further from
        the others' than is typical (see `fl_wb.messages.screening`; 3 measured well). None: off.
    observer, max_share : optional
        As in `RoleFedAvg`.
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
        generator_keys: Sequence[str] | slice | None = None,
        refit: Callable[[State], Mapping[str, Tensor]] | None = None,
        stage: Stage | None = None,
        geodesic: str | None = None,
        iterations: int | None = None,
        fan_in: int | None = None,
        executor: str | None = None,
        continue_from: str = "own",
        max_age: int | None = None,
        seed: int = 0,
        store: StageStore | str | Path | None = None,
        device: str = "cpu",
        patience: int | None = 3,
        screening: float | None = None,
        observer: Observer | None = None,
        max_share: float = MAX_SHARE,
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
            observer=observer,
            max_share=max_share,
        )
        check_factory("generator", generator)
        if critic is not None:
            check_factory("critic", critic)
        if refit is not None and generator_keys is None:
            raise ValueError("refit without generator_keys: no other part of the model is there")
        check_settings(seed, patience, screening, max_age)
        if continue_from not in CONTINUE_FROM:
            allowed = ", ".join(CONTINUE_FROM)
            raise ValueError(f"continue_from={continue_from!r} is not one of {allowed}")
        self.generator = generator
        self.critic = critic
        self.latent_dim = latent_dim
        self.generator_keys = generator_part.check_prefixes(generator_keys)
        self.refit = refit
        self.stage = stage_of(stage, geodesic, None, iterations)
        self.fan_in = check_fan_in(fan_in, self.stage)
        self.executor = check_executor(executor)
        self.continue_from = continue_from
        self.max_age = max_age
        self.seed = seed
        self.store = store if isinstance(store, StageStore) else StageStore(store)
        self.device = device
        self.callback = callback
        self.screening = screening
        self._patience = patience
        self._model: Model | None = None
        self._uploads = Uploads()
        self._memory: Memory | None = None
        self._merged: State | None = None  # the barycenter, under the generator's own names
        self._given = False  # to whoever waits for this start's model
        self._weighed: list[float] = []  # the weights of the last merge
        self._shares: list[float] = []  # of the cells in the model, if it has a code
        self._average: ArrayRecord | None = None  # of the uploads, while a round is configured
        self._last_round: int | None = None
        self._evaluated = True  # by the server itself

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Execute the strategy; see `flwr.serverapp.strategy.FedAvg.start`.

        Raises
        ------
        InUseError
            If another run uses the store's folder.
        """
        given = inspect.signature(super().start).bind(grid, initial_arrays, *args, **kwargs)
        given.apply_defaults()
        self._last_round = given.arguments["num_rounds"]
        self._evaluated = given.arguments["evaluate_fn"] is not None
        with ExitStack() as held:
            if self.store.folder is not None:
                try:
                    held.enter_context(locked(self.store.folder))
                except InUseError:
                    raise
                except OSError as error:
                    log(WARNING, "the store %s cannot be used: %s", self.store.folder, error)
            return super().start(grid, initial_arrays, *args, **kwargs)

    def summary(self) -> None:
        """Log summary configuration of the strategy.

        Raises
        ------
        ValueError
            Inside a wrapper for central differential privacy; see `checks.check_not_wrapped`.
        """
        check_not_wrapped()
        super().summary()
        log(INFO, "\t└──> Barycenter:")
        log(INFO, "\t\t├── Geodesic: '%s'", self.stage.geodesic)
        log(INFO, "\t\t├── Iterations a stage: %d", self.stage.iterations)
        log(INFO, "\t\t├── Measures a stage: up to %d", self.fan_in)
        log(INFO, "\t\t├── Nodes go on from: '%s'", self.continue_from)
        if self.generator_keys is not None:
            log(INFO, "\t\t├── Of the arrays: %s", self.generator_keys)
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
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            model = self._model_for(message.metadata.dst_node_id)
            if model is not None:  # one record each: the messages of a round share theirs
                content = {**message.content, self.arrayrecord_key: model}
                message.content = RecordDict(content)
        self._average = None
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of evaluation; targets are told the model's cells."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if self._shares:
            code = ConfigRecord({keys.SHARES: self._shares})
            for message in messages:
                message.content = RecordDict({**message.content, keys.CODE: code})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the uploads; the arrays are None (the model stays) if none is valid."""
        received = self._received(replies, is_train=True)
        contents = dict(received)
        arrived: dict[int, tuple[float, str, State]] = {}
        for node_id, content in received:
            try:
                arrived[node_id] = self._read(content)
            except records.InvalidUpload as error:
                self._say_dropped(node_id, str(error))
        known, changed = self._uploads.made_of, self._uploads.changed
        self._uploads.put(server_round, arrived, self._connected)
        self._screen()
        if self._uploads.made_of == known:  # what came was screened out, or what was there
            self._uploads.changed = changed
        arrays = self._merge_if_needed(server_round)
        if self._memory is not None:
            self._memory.save(self._uploads, self._merged, server_round)
        good = arrived.keys() & self._uploads.of_nodes().keys()
        if not good:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
        self._judge(contents.keys() - good, good)
        kept = [(node_id, content) for node_id, content in received if node_id in good]
        metrics = MetricRecord(dict(self._metrics(server_round, kept, is_train=True) or {}))
        metrics["uploads-merged"] = len(self._uploads)
        metrics["uploads-dropped"] = len(received) - len(kept)
        return arrays, metrics

    def _begin(self, arrays: ArrayRecord) -> None:
        """Start from scratch, or where the store's last run ended, once all is seen to fit."""
        check_device(self.device)
        generative, _ = generator_part.split(arrays, self.generator_keys)
        network = check_networks(generative, self.generator, self.critic, self.latent_dim)
        self._model = Model(arrays, network, self.generator_keys, self.refit)
        self._uploads, self._merged, self._given = Uploads(), None, False
        self._shares, self._memory = [], None
        if self.store.folder is not None:
            self._memory = Memory(self.store.folder / "nodes", self._model.all)
            self._uploads, self._merged = self._memory.load()
            if nodes := len(self._uploads):
                log(INFO, "Taken up: the generators of %d nodes in %s", nodes, self.store.folder)
        self._strikes.clear()

    def _read(self, content: RecordDict) -> tuple[float, str, State]:
        """Check one reply: its weight, its generator's digest, its arrays.

        Raises
        ------
        InvalidUpload
            Saying what is wrong with it.
        """
        weight = self._weight(content)
        assert self._model is not None
        state = self._model.read(checked.model(content))
        generator = self._model.generator(state)
        records.check_samples(self._network(generator), latent_dim=self.latent_dim)
        return weight, digest(generator), state

    def _model_for(self, node_id: int) -> ArrayRecord | None:
        """Return what a node goes on from, unless that is the round's model."""
        assert self._model is not None
        upload = self._uploads.get(node_id)
        if self.continue_from == "own" and upload is not None:
            return self._model.record(self._uploads.state(upload))
        if self.continue_from == "average" and len(self._uploads):
            if self._average is None:
                uploads = self._uploads.of_nodes().values()
                mean = average((self._uploads.state(u), u.weight) for u in uploads)
                self._average = self._model.record(mean)
            return self._average
        return None

    def _screen(self) -> None:
        """Drop the uploads, of this round and before, that are too far from the others."""
        if self.screening is None:
            return
        uploads = self._uploads.of_nodes()
        nodes = sorted(uploads)
        samples = [
            generate(self._of(uploads[node]), SCREENED, seed=self.seed, latent_dim=self.latent_dim)
            for node in nodes
        ]
        for index, why in outliers(samples, threshold=self.screening, seed=self.seed):
            self._drop(nodes[index], f"{why} (screening={self.screening})")

    def _drop(self, node_id: int, why: str) -> None:
        self._say_dropped(node_id, why)
        self._uploads.drop(node_id)

    def _say_dropped(self, node_id: int, why: str) -> None:
        log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, why)

    def _network(self, state: State) -> nn.Module:
        network = self.generator()
        network.load_state_dict(state)
        return network

    def _of(self, upload: Upload) -> nn.Module:
        """Make an upload's generator."""
        assert self._model is not None
        return self._network(self._model.generator(self._uploads.state(upload)))

    def _merge_if_needed(self, server_round: int) -> ArrayRecord | None:
        """Return the model of all uploads that count, if somebody is given it."""
        needed = (
            self.fraction_evaluate > 0
            or self._evaluated
            or self.continue_from == "barycenter"
            or self._last_round is None
            or server_round >= self._last_round
        )
        if not needed:
            log(INFO, "aggregate_train: nobody is given this round's model: nothing is merged")
            return None
        if self._merged is not None and not self._uploads.changed:
            return None if self._given else self._whole(self._merged)
        if not self._uploads.changed:
            return None
        if folded := self._uploads.fold(self._connected, self._barycenter):
            log(INFO, "aggregate_train: folded the generators of %d nodes that left", folded)
        merged = self._barycenter(self._counted(server_round))
        if merged is None:
            return None
        self._merged, self._uploads.changed = merged, False
        self._shares = shares_learned(self._weighed, self.stage, self.fan_in)
        return self._whole(merged)

    def _whole(self, merged: State) -> ArrayRecord:
        """Put the barycenter and the average of all else together."""
        assert self._model is not None
        self._given = True
        others: State = {}
        if self._model.has_others:
            latest = self._uploads.latest()
            others = average((self._uploads.state(u), u.weight) for u in latest)
        return self._model.whole(merged, others)

    def _counted(self, server_round: int) -> list[Upload]:
        """Return the uploads that count, and forget those that are too old."""
        if self.max_age is not None:
            for node_id, upload in self._uploads.of_nodes().items():
                if server_round - upload.round > self.max_age:
                    self._drop(node_id, f"it is of round {upload.round} (max_age={self.max_age})")
        return self._uploads.ordered()

    def _barycenter(self, uploads: Sequence[Upload]) -> State | None:
        """Merge uploads, without those that turn out to be of no use; None if it fails."""
        began, uploads = perf_counter(), list(uploads)
        network = self.generator()
        merge = Merge(
            self.stage,
            self.critic or (lambda: MLPCritic(self._shape(network))),
            latent_dim_of(network, self.latent_dim),
            self.seed,
            self.store,
            torch.device(self.device),
        )
        initial = None
        if self._merged is not None:
            initial = self._network(self._merged)
            distillation = self.stage.distillation
            iterations = round(distillation.iterations * CONTINUED)
            shorter = replace(distillation, iterations=iterations)
            merge = replace(merge, settings=replace(self.stage, distillation=shorter))
        while uploads:
            weights = self._weights(uploads)
            total = sum(weights)
            shares = ", ".join(f"{weight / total:.3g}" for weight in weights[:20])
            more = ", ..." if len(weights) > 20 else ""
            log(
                INFO,
                "aggregate_train: merging %d generators with weights %s%s",
                len(uploads),
                shares,
                more,
            )
            measures = [
                Measure(partial(self._of, upload), weight, upload.digest)
                for upload, weight in zip(uploads, weights, strict=True)
            ]
            try:
                merged = barycenter_of(
                    measures,
                    merge,
                    fan_in=self.fan_in,
                    initial=initial,
                    executor=self.executor,
                    callback=self.callback or progress("Barycenter"),
                )
                records.check_samples(merged, latent_dim=self.latent_dim)
            except UselessMeasure as error:
                self._drop_measure(error)
                uploads = [upload for upload in uploads if upload.digest != error.digest]
            except (FloatingPointError, records.InvalidUpload) as error:
                log(WARNING, "aggregate_train: the merge failed (%s): the model stays", error)
                return None
            else:
                log(INFO, "aggregate_train: merged in %.1f s", perf_counter() - began)
                self._weighed = weights
                return {name: value.cpu() for name, value in merged.state_dict().items()}
        return None

    def _drop_measure(self, error: UselessMeasure) -> None:
        for node_id, upload in self._uploads.of_nodes().items():
            if upload.digest == error.digest:
                self._drop(node_id, str(error))

    def _weights(self, uploads: Sequence[Upload]) -> list[float]:
        said = [upload.weight for upload in uploads]
        weights = bounded_weights(said, self.max_share, [upload.nodes for upload in uploads])
        if weights != said:
            log(
                WARNING,
                "aggregate_train: no node weighs more than max_share=%s lets it: the "
                "largest of %d said %.3g",
                self.max_share,
                len(said),
                max(said),
            )
        return weights

    def _shape(self, network: nn.Module) -> tuple[int, ...]:
        return tuple(generate(network, 2, latent_dim=self.latent_dim).shape[1:])
