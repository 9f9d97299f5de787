"""Adaptive coalescence: generators of many nodes become one Wasserstein-1 barycenter.

Dedeoglu, Lin, Zhang, Zhang: "Continual Learning of Generative Models with Limited Data: From
Wasserstein-1 Barycenter to Adaptive Coalescence", https://arxiv.org/abs/2101.09225.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fl_wb.barycenter import Stage, check_executor, check_fan_in, stage_of
from fl_wb.federation.coalescence import Coalescence, say_dropped
from fl_wb.federation.merger import Merger
from fl_wb.federation.model import Model, State
from fl_wb.generators.latents import Draw
from fl_wb.generators.sampling import check_factory
from fl_wb.messages import generator_part, keys, records
from fl_wb.messages import replies as checked
from fl_wb.messages.weights import MAX_SHARE
from fl_wb.persistence.locks import InUseError, locked
from fl_wb.persistence.stage_store import StageStore
from fl_wb.strategies.checks import (
    check_device,
    check_networks,
    check_not_wrapped,
    check_screening,
    check_whole,
)
from fl_wb.strategies.role_fedavg import Observer, RoleFedAvg
from fl_wb.training.wgan import Progress

CONTINUE_FROM = ("own", "average", "barycenter")


class AdaptiveCoalescence(RoleFedAvg):
    """Merge the nodes' generators into a Wasserstein-1 barycenter, a stage a round.

    The server keeps the latest valid upload of every node it has seen, and the barycenter of these
    is the global model: what evaluation, `evaluate_fn` and the result get. A node that trains goes
    on from its own last upload, and a newcomer from the barycenter (`continue_from`): its generator
    would otherwise have to become its own anew in each round. What is merged of a node that goes on
    is the running mean of the weights that it sent, which lies nearer to its data than the last of
    them (unless ``max_age`` is set, or it began anew). A round's stage starts at the
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
    labels : int, optional
        Of conditional generators, from latents and labels (n,) of int64: how many labels there
        are. Each gets its own barycenter. A node that sends the list "label-counts" in its metrics
        counts there in proportion, and not where it has none; else it has all equally often.
    latents : {"normal", "uniform", "uniform(-1,1)"} or callable
        The law of the latents; a callable draws n of them with a ``torch.Generator``.
    generator_keys : sequence of str or slice, optional
        Prefixes of the generator's arrays where the model has others too, e.g.
        ``("fc3.", "decoder.")`` of a VAE; or their places, e.g. ``slice(0, 14)`` of the list that
        a `NumPyClient` sends.
    refit : callable, optional
        Called after each merge with the state dict of the whole model, the generator merged, the
        rest averaged; returns a state dict in which the rest was fitted to the new generator (see
        `fl_wb.training.encoder.fit_encoder`). What it makes of the generator's own arrays is
        ignored. Where it raises or diverges, the rest stays averaged, with a warning.
    stage : Stage, optional
        Settings of one merge; see `fl_wb.barycenter.Stage`.
    geodesic, iterations, budget, fan_in, executor : optional
        As in `fl_wb.barycenter.recursive_barycenter`; the budget is a round's.
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
        next `start` with the same model; with other settings of the merge, its barycenter is made
        anew of these uploads. One run at a time may use it. By default all of it lives in memory.
    device : str
        Where stages are trained, e.g. "cuda".
    screening : float, optional
        Drop uploads that collapsed, or whose samples are more than this many times further from
        the others' than is typical (see `fl_wb.messages.screening`; 3 measured well). None: off.
    observer, max_share, patience : optional
        As in `RoleFedAvg`; nodes are asked three times.
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
        labels: int | None = None,
        latents: str | Draw = "normal",
        generator_keys: Sequence[str] | slice | None = None,
        refit: Callable[[State], Mapping[str, Tensor]] | None = None,
        stage: Stage | None = None,
        geodesic: str | None = None,
        iterations: int | None = None,
        budget: float | None = None,
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
            patience=patience,
        )
        check_factory("generator", generator)
        if critic is not None:
            check_factory("critic", critic)
        if refit is not None and generator_keys is None:
            raise ValueError("refit without generator_keys: no other part of the model is there")
        check_whole(0, seed=seed, max_age=max_age)
        check_screening(screening)
        if continue_from not in CONTINUE_FROM:
            allowed = ", ".join(CONTINUE_FROM)
            raise ValueError(f"continue_from={continue_from!r} is not one of {allowed}")
        stage = stage_of(stage, geodesic, None, iterations, budget)
        self.merger = Merger(
            generator,
            critic,
            latent_dim,
            labels,
            latents,
            stage,
            check_fan_in(fan_in, stage),
            check_executor(executor),
            seed,
            store if isinstance(store, StageStore) else StageStore(store),
            device,
            callback,
        )
        self.generator_keys = generator_part.check_prefixes(generator_keys)
        self.refit = refit
        self.continue_from = continue_from
        self.max_age = max_age
        self.screening = screening
        self._coalescence: Coalescence | None = None
        self._to_forget: list[int] = []  # once it is known what there is
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
            if self.merger.store.folder is not None:
                try:
                    held.enter_context(locked(self.merger.store.folder))
                except InUseError:
                    raise
                except OSError as error:
                    log(WARNING, "the store %s cannot be used: %s", self.merger.store.folder, error)
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
        log(INFO, "\t\t├── Geodesic: '%s'", self.merger.stage.geodesic)
        log(INFO, "\t\t├── Iterations a stage: %d", self.merger.stage.iterations)
        log(INFO, "\t\t├── Measures a stage: up to %d", self.merger.fan_in)
        log(INFO, "\t\t├── Nodes go on from: '%s'", self.continue_from)
        if self.generator_keys is not None:
            log(INFO, "\t\t├── Of the arrays: %s", self.generator_keys)
        log(INFO, "\t\t└── Stages kept in: %s", self.merger.store.folder or "memory")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training; before the first one, check the networks.

        Raises
        ------
        ValueError
            If `initial_arrays`, generator, critic and latent dimension do not fit together.
        """
        if server_round == 1 or self._coalescence is None:
            self._coalescence = self._begin(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        average = self._coalescence.average() if self.continue_from == "average" else None
        for message in messages:
            model = average
            if self.continue_from == "own":
                model = self._coalescence.own(message.metadata.dst_node_id)
            if model is not None:  # one record each: the messages of a round share theirs
                content = {**message.content, self.arrayrecord_key: model}
                message.content = RecordDict(content)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of evaluation; targets are told the model's cells."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if self._coalescence is not None and self._coalescence.shares:
            code = ConfigRecord({keys.SHARES: self._coalescence.shares})
            if self._coalescence.forgotten:
                code[keys.FORGOTTEN] = self._coalescence.forgotten
            for message in messages:
                message.content = RecordDict({**message.content, keys.CODE: code})
        return messages

    @property
    def shares(self) -> list[float]:
        """Of the model's cells; empty while it has none."""
        return [] if self._coalescence is None else list(self._coalescence.shares)

    @property
    def cells(self) -> dict[int, int]:
        """Which cell of the model is whose, by node id, of the nodes that are not forgotten.

        So ``generate(network, n, source=strategy.cells[node_id], code=Code(strategy.shares))``
        shows what a node contributed; see `fl_wb.generators.sampling.generate`.
        """
        return {} if self._coalescence is None else self._coalescence.cells

    def forget(self, node_id: int) -> None:
        """Forget what a node sent: of this model, targets give its cell a weight of 0, at once.

        The next merge is without it, and does not start at this barycenter. A node asks for the
        same by ``"forget": True`` beside its role. What is folded with others' cannot be forgotten.

        Before `start`, what the store has of the node is forgotten as soon as it is taken up; in a
        run and after it, at once.
        """
        if self._coalescence is None:
            self._to_forget.append(node_id)
        else:
            self._coalescence.forget(node_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the uploads; the arrays are None (the model stays) if none is valid."""
        assert self._coalescence is not None
        received = self._received(replies, is_train=True)
        arrived: dict[int, tuple[float, str, State]] = {}
        labels: dict[int, tuple[float, ...]] = {}
        for node_id, content in received:
            try:
                labels[node_id] = checked.labels(content, self.merger.labels)
                arrived[node_id] = self._coalescence.read(
                    self._weight(content), checked.model(content)
                )
            except records.InvalidUpload as error:
                say_dropped(node_id, str(error))
        self._coalescence.put(server_round, arrived, self._connected, labels)
        arrays = None
        if self._is_needed(server_round):
            arrays = self._coalescence.merged(server_round, self._connected)
        else:
            log(INFO, "aggregate_train: nobody is given this round's model: nothing is merged")
        self._coalescence.save(server_round)
        good = arrived.keys() & self._coalescence.uploads.of_nodes().keys()
        if not good:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
        self._judge((dict(received).keys() | self._refused) - good, good)
        kept = [(node_id, content) for node_id, content in received if node_id in good]
        metrics = MetricRecord(dict(self._metrics(server_round, kept, is_train=True) or {}))
        metrics["uploads-merged"] = len(self._coalescence.uploads)
        metrics["uploads-dropped"] = len(received) + len(self._refused) - len(kept)
        return arrays, metrics

    def _begin(self, arrays: ArrayRecord) -> Coalescence:
        """Start from scratch, or where the store's last run ended, once all is seen to fit."""
        merger = self.merger
        check_device(merger.device)
        generative, _ = generator_part.split(arrays, self.generator_keys)
        network = check_networks(
            generative,
            merger.generator,
            merger.critic,
            merger.latent_dim,
            merger.labels,
            merger.latents,
        )
        self._strikes.clear()
        coalescence = Coalescence(
            Model(arrays, network, self.generator_keys, self.refit),
            merger,
            screening=self.screening,
            max_age=self.max_age,
            max_share=self.max_share,
            averages=self.continue_from == "own" and self.max_age is None,
        )
        while self._to_forget:
            coalescence.forget(self._to_forget.pop())
        return coalescence

    def _is_needed(self, server_round: int) -> bool:
        """Say whether somebody is given this round's model."""
        return (
            self.fraction_evaluate > 0
            or self._evaluated
            or self.continue_from == "barycenter"
            or self._last_round is None
            or server_round >= self._last_round
        )
