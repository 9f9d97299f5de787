"""The server's side of adaptive coalescence: of the nodes' uploads, one model a round."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from logging import INFO, WARNING
from time import perf_counter

from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import nn

from fl_wb.barycenter import Measure, UselessMeasures
from fl_wb.federation.memory import Memory
from fl_wb.federation.merger import Merger
from fl_wb.federation.model import Model, State, average
from fl_wb.federation.uploads import Upload, Uploads, bounded
from fl_wb.messages import records
from fl_wb.messages.screening import outliers
from fl_wb.persistence.tensor_files import digest
from fl_wb.transport import energy_distance

LIGHTEST = 1e-6  # of all weights, at least: targets take no code with shares of next to nothing
SCREENED = 256  # samples of each upload that are compared


class Coalescence:
    """The uploads that count, and the barycenter of them.

    Parameters
    ----------
    model : Model
        What travels.
    merger : Merger
        How uploads are merged; with its store in a folder, what the last run left there is taken
        up.
    screening, max_age, max_share
        As in `AdaptiveCoalescence`.
    averages
        Whether nodes go on from what they sent, so that a node's generators have a mean (`_mean`).

    Attributes
    ----------
    uploads
        What is kept of the nodes.
    shares
        Of the code's cells in the model; empty if it has no code.
    forgotten
        Those of its cells that are to be forgotten, until the next merge leaves them out.
    """

    def __init__(
        self,
        model: Model,
        merger: Merger,
        *,
        screening: float | None,
        max_age: int | None,
        max_share: float,
        averages: bool,
    ) -> None:
        self._model, self._merger, self._averages = model, merger, averages
        self._screening, self._max_age, self._max_share = screening, max_age, max_share
        self.uploads = Uploads()
        self.shares: list[float] = []
        self.forgotten: list[int] = []
        self._round = 0  # that was kept last
        self._cells: list[str] = []  # the uploads of which they are
        self._merged: State | None = None  # the barycenter, under the generator's own names
        self._afresh = False  # whether the next merge may know nothing of the last one
        self._given = False  # to whoever waits for this start's model
        self._last: tuple[list[float], list[str]] = ([], [])  # merged: their weights and keys
        self._memory: Memory | None = None
        if (folder := merger.store.folder) is not None:
            settings = {**merger.settings, "max_share": float(max_share)}
            self._memory = Memory(folder / "nodes", model.all, settings)
            self.uploads, self._merged = self._memory.load()
            merger.store.claim(self._memory.stages)  # else nobody would ever delete them
            if nodes := len(self.uploads):
                log(INFO, "Taken up: the generators of %d nodes in %s", nodes, folder)

    def read(self, weight: float, arrays: ArrayRecord) -> tuple[float, str, State]:
        """Check what a node sent: its weight, its generator's digest, its arrays.

        Raises
        ------
        InvalidUpload
            Saying what is wrong with it.
        """
        state = self._model.read(arrays)
        generator = self._model.generator(state)
        self._merger.check(self._merger.network(generator))
        return weight, digest(generator), state

    def put(
        self,
        server_round: int,
        arrived: dict[int, tuple[float, str, State]],
        connected: Collection[int],
        labels: Mapping[int, tuple[float, ...]] | None = None,
    ) -> None:
        """Keep what was read in a round, by node id, but for what is screened out.

        Beside it, how often nodes have each label, if they say it.
        """
        known, changed = self.uploads.made_of, self.uploads.changed
        means = {node: self._mean(node, *sent[1:]) for node, sent in arrived.items()}
        kept = {node: mean for node, mean in means.items() if mean is not None}
        self.uploads.put(server_round, arrived, connected, labels, kept)
        self._screen()
        if self.uploads.made_of == known:  # what came was screened out, or what was there
            self.uploads.changed = changed

    def forget(self, node_id: int) -> None:
        """Leave a node out of the next merge, and its cell of this model to nobody."""
        upload = self.uploads.get(node_id)
        if not self.uploads.forget(node_id):
            log(WARNING, "node %d is to be forgotten, and nothing of it alone is kept", node_id)
            return
        self._afresh = True
        key = str(node_id) if upload is None else upload.key
        if key in self._cells and len(self.forgotten) + 1 < len(self.shares):
            self.forgotten.append(self._cells.index(key))
        # at once: a server that is killed now must not remember it, in a stage's result neither
        self._merger.store.keep_only(())
        self.save(self._round)
        log(INFO, "forgot node %d", node_id)

    @property
    def cells(self) -> dict[int, int]:
        """Which cell of the model is whose, by node id."""
        if not self.shares:
            return {}
        places = {key: cell for cell, key in enumerate(self._cells)}
        uploads = self.uploads.of_nodes().items()
        return {node: places[upload.key] for node, upload in uploads if upload.key in places}

    def save(self, server_round: int) -> None:
        """Keep the end of a round on disk, if there is a folder."""
        self._round = server_round
        if self._memory is not None:
            merged = None if self._afresh else self._merged
            stages = self._merger.store.own
            self._memory.save(self.uploads, merged, server_round, self.shares, stages)

    def own(self, node_id: int) -> ArrayRecord | None:
        """Return the last model that a node sent, or None."""
        upload = self.uploads.get(node_id)
        return None if upload is None else self._model.record(self.uploads.state(upload))

    def average(self) -> ArrayRecord | None:
        """Return the weighted average of the models that nodes sent, or None."""
        uploads = list(self.uploads.of_nodes().values())
        return self._model.record(self._average(uploads)) if uploads else None

    def merged(self, server_round: int, connected: Collection[int]) -> ArrayRecord | None:
        """Return the model of all uploads that count; None if it is still the one that was."""
        self._drop_old(server_round)
        if not self.uploads.changed:
            return self._unchanged(server_round)
        if self._max_age is None and (
            folded := self.uploads.fold(connected, self._barycenter, self._max_share)
        ):
            log(INFO, "aggregate_train: folded the generators of %d nodes that left", folded)
        merged = self._barycenter(self.uploads.ordered())
        if merged is None:
            return None
        self.uploads.merged(afresh=self._afresh or self._merged is None)
        self._merged = merged
        weights, self._cells = self._last
        self.shares = self._merger.shares(weights)
        self.forgotten, self._afresh = [], False
        return self._whole(merged)

    def _unchanged(self, server_round: int) -> ArrayRecord | None:
        """Return the model where no generator changed: what is new of it, or None."""
        if self._merged is None:
            return None
        if not self._given and self._memory is not None:  # an earlier run's
            self.shares = self._memory.shares
        if self.shares:  # nodes may have come back under other ids
            self._cells = [upload.key for upload in self.uploads.ordered()]
        brought = any(each.round == server_round for each in self.uploads.of_nodes().values())
        if self._given and not (brought and self._model.has_others):
            return None
        return self._whole(self._merged)

    def _whole(self, merged: State) -> ArrayRecord:
        """Put the barycenter and the average of all else together."""
        self._given = True
        others = self._average(self.uploads.latest()) if self._model.has_others else {}
        return self._model.whole(merged, others)

    def _average(self, uploads: Sequence[Upload]) -> State:
        states = map(self.uploads.state, uploads)
        return average(zip(states, bounded(uploads, self._max_share), strict=True))

    def _mean(self, node_id: int, name: str, state: State) -> State | None:
        """Return the running mean of a node's generators, of which this is half, or None.

        A GAN goes round the generator that it looks for, and the mean of its weights on the way is
        nearer to it (Yazici et al., "The Unusual Effectiveness of Averaging in GAN Training", ICLR
        2019). Where a node began anew, weights of two ways have no mean that makes anything: its
        samples are farther from this generator's than those of the mean before.
        """
        before = self.uploads.get(node_id)
        if not self._averages or before is None:
            return None
        if before.digest == name:
            return self.uploads.mean(before)
        latest, was = self._model.generator(state), self._generator(before)
        mean = average([(was, 1.0), (latest, 1.0)])
        try:
            there, here, between = (
                self._merger.samples(each, SCREENED) for each in (was, latest, mean)
            )
        except Exception:  # what a stranger's numbers do inside a network, nobody knows
            return None
        nearer = energy_distance(between, here) <= energy_distance(there, here)
        return mean if nearer else None  # nor if something is not finite

    def _screen(self) -> None:
        """Drop the uploads, of this round and before, that are too far from the others."""
        if self._screening is None:
            return
        uploads = self.uploads.of_nodes()
        nodes = sorted(uploads)
        samples = [self._merger.samples(self._sent(uploads[node]), SCREENED) for node in nodes]
        seed = self._merger.seed
        for index, why in outliers(samples, threshold=self._screening, seed=seed):
            self._drop(nodes[index], f"{why} (screening={self._screening})")

    def _drop_old(self, server_round: int) -> None:
        if self._max_age is not None:
            for node_id, upload in self.uploads.of_nodes().items():
                if server_round - upload.round > self._max_age:
                    self._drop(node_id, f"it is of round {upload.round} (max_age={self._max_age})")

    def _barycenter(self, uploads: Sequence[Upload]) -> State | None:
        """Merge uploads, without those that turn out to be of no use; None if it fails."""
        began = perf_counter()
        while uploads:
            weights = self._weights(uploads)
            measures = [
                Measure(partial(self._network, upload), weight, upload.merged, upload.labels)
                for upload, weight in zip(uploads, weights, strict=True)
            ]
            try:
                merged = self._merger.merge(measures, None if self._afresh else self._merged)
            except (UselessMeasures, FloatingPointError, records.InvalidUpload) as error:
                useless = error.why if isinstance(error, UselessMeasures) else {}
                left = [upload for upload in uploads if upload.merged not in useless]
                if len(left) == len(uploads):
                    log(WARNING, "aggregate_train: the merge failed (%s): the model stays", error)
                    return None
                self._drop_measures(useless)
                uploads = left
            else:
                log(INFO, "aggregate_train: merged in %.1f s", perf_counter() - began)
                self._last = weights, [upload.key for upload in uploads]
                return merged
        return None

    def _weights(self, uploads: Sequence[Upload]) -> list[float]:
        """Return what uploads weigh in the end, and say it."""
        said = [upload.weight for upload in uploads]
        weights = bounded(uploads, self._max_share)
        if weights != said:
            log(
                WARNING,
                "aggregate_train: no node weighs more than max_share=%s lets it: the "
                "largest of %d said %.3g",
                self._max_share,
                len(said),
                max(said),
            )
        total = math.fsum(weights)
        weights = [max(weight, LIGHTEST * total) for weight in weights]
        shares = ", ".join(f"{weight / total:.3g}" for weight in weights[:20])
        more = ", ..." if len(weights) > 20 else ""
        log(
            INFO,
            "aggregate_train: merging %d generators with weights %s%s",
            len(uploads),
            shares,
            more,
        )
        return weights

    def _sent(self, upload: Upload) -> State:
        return self._model.generator(self.uploads.state(upload))

    def _generator(self, upload: Upload) -> State:
        mean = self.uploads.mean(upload)
        return self._sent(upload) if mean is None else mean

    def _network(self, upload: Upload) -> nn.Module:
        return self._merger.network(self._generator(upload))

    def _drop_measures(self, useless: Mapping[str, str]) -> None:
        for node_id, upload in self.uploads.of_nodes().items():
            if upload.merged in useless:
                self._drop(node_id, useless[upload.merged])

    def _drop(self, node_id: int, why: str) -> None:
        say_dropped(node_id, why)
        self.uploads.leave_out(node_id)


def say_dropped(node_id: int, why: str) -> None:
    """Log whose upload does not count, and why."""
    log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, why)
