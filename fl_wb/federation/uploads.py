"""What the server keeps of the nodes: the latest upload of each, and of those that left, one.

A node that left stays part of the barycenter. Its generator need not be kept for that: a stage goes
on from the barycenter of the first generators, with their weights' sum, as it does from the
generators themselves.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fl_wb.generators.latents import mixed
from fl_wb.messages.weights import MAX_SHARE, bounded_weights
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest

log = logging.getLogger("flwr")

KEPT = 8  # generators of nodes that left are kept apart, at least: some nodes come back
MEMORY = 1 << 30  # bytes of uploads; more of them are kept on disk
FOLDED = "folded"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Upload:
    """The latest upload of one node; its arrays are in `Uploads`.

    Or the barycenter of several such, with the sum of their weights; `nodes` is their number.

    Attributes
    ----------
    key
        Under which its arrays are kept.
    round
        In which it arrived.
    place
        In the order of the merge: the node's cell, which it keeps from round to round.
    weight
        lambda_k.
    digest
        Of the generator's arrays.
    nodes
        How many it stands for.
    labels
        How often its data has each label, of sum 1; empty if it does not say.
    mean
        Digest of the generator that is merged in place of the one it sent; empty if that one is.
    in_model
        Whether the barycenter descends from something that the node sent.
    """

    key: str
    round: int
    place: int
    weight: float
    digest: str
    nodes: int = 1
    labels: tuple[float, ...] = ()
    mean: str = ""
    in_model: bool = False

    @property
    def merged(self) -> str:
        """Digest of the generator that is merged."""
        return self.mean or self.digest


class Uploads:
    """The uploads of which the model is made; at most twice as many as there are nodes.

    Attributes
    ----------
    changed
        Whether there is something new to merge since its owner last said that there is not.
    traces
        Nodes from whose uploads the barycenter descends, though they do not count any more.
    """

    def __init__(self) -> None:
        self._of: dict[int, Upload] = {}
        self._folded: Upload | None = None
        self.changed = False
        self.traces: set[int] = set()
        self._states = StageStore()
        self._bytes: dict[str, int] = {}  # of what is in memory, by its key
        self._total = 0
        self._on_disk: StageStore | None = None  # what does not fit into memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        """Count the nodes whose generators are merged, also those that left."""
        return len(self._of) + (self._folded.nodes if self._folded else 0)

    def of_nodes(self) -> dict[int, Upload]:
        """Return the uploads that are kept apart, by node id."""
        return dict(self._of)

    @property
    def made_of(self) -> list[tuple[str, float, str, tuple[float, ...]]]:
        """Key, weight, digest and labels of what there is to merge, in its order."""
        return [(each.key, each.weight, each.merged, each.labels) for each in self.ordered()]

    def ordered(self) -> list[Upload]:
        """Return what to merge, in an order that no network delay can change."""
        return ([self._folded] if self._folded else []) + _in_place(self._of.values())

    def state(self, upload: Upload) -> State:
        """Return an upload's arrays."""
        return self._found(upload.key)

    def mean(self, upload: Upload) -> State | None:
        """Return the generator that is merged in place of what was sent; None if that is."""
        return self._found(_mean_key(upload)) if upload.mean else None

    def _found(self, key: str) -> State:
        found = self._states.get(key)
        if found is None and self._on_disk is not None:
            found = self._on_disk.get(key)
        if found is None:
            raise FileNotFoundError(f"the upload {key} is gone from {self._folder}")
        return found

    def all(self) -> dict[str, Upload]:
        """Return all that is kept, by node id or `FOLDED`."""
        folded = {FOLDED: self._folded} if self._folded else {}
        return folded | {str(node): upload for node, upload in self._of.items()}

    def restore(
        self, node_id: int | None, upload: Upload, state: State, mean: State | None = None
    ) -> None:
        """Take up an upload of an earlier run as it was; None: the folded one."""
        if node_id is None:
            self._folded = upload
        else:
            self._of[node_id] = upload
        self._keep(upload.key, state)
        if mean is not None:
            self._keep(_mean_key(upload), mean)

    def put(
        self,
        server_round: int,
        arrived: dict[int, tuple[float, str, State]],
        connected: Collection[int] = (),
        labels: Mapping[int, tuple[float, ...]] | None = None,
        means: Mapping[int, State] | None = None,
    ) -> None:
        """Keep what nodes sent in a round: weight, digest of the generator, arrays, by node id.

        And how often they have each label, of those that say it, and what is merged in place of
        what they sent, where something is.

        A node keeps its place; those that are new come behind, the heaviest first. Who sends, bit
        for bit, the generator of a node that is not connected is that node under a new id.
        """
        self._rename(arrived, connected)
        last = max((upload.place for upload in self._of.values()), default=-1)
        new = sorted(
            arrived.keys() - self._of.keys(), key=lambda node: (-arrived[node][0], arrived[node][1])
        )
        places = {node: upload.place for node, upload in self._of.items()}
        places |= {node: last + 1 + k for k, node in enumerate(new)}
        for node, (weight, name, state) in arrived.items():
            before, often = self._of.get(node), (labels or {}).get(node, ())
            mean = (means or {}).get(node)
            now = Upload(
                str(node),
                server_round,
                places[node],
                weight,
                name,
                labels=often,
                mean=digest(mean) if mean else "",
                in_model=before is not None and before.in_model,
            )
            self.changed |= before is None or replace(before, round=now.round, key=now.key) != now
            self._of[node] = now
            self._keep(str(node), state)
            if mean:
                self._keep(_mean_key(now), mean)
            else:
                self._let_go(_mean_key(now))

    def _rename(
        self, arrived: dict[int, tuple[float, str, State]], connected: Collection[int]
    ) -> None:
        gone = self._of.keys() - arrived.keys() - set(connected)
        by_digest: dict[str, list[int]] = {}
        for node in sorted(gone, reverse=True):
            by_digest.setdefault(self._of[node].digest, []).append(node)
        for node in sorted(arrived.keys() - self._of.keys()):
            if before := by_digest.get(arrived[node][1]):
                upload = self._of.pop(before.pop())
                self._drop_states(upload)
                self._of[node] = upload  # `put` brings its arrays

    def get(self, node_id: int) -> Upload | None:
        """Return a node's upload, or None."""
        return self._of.get(node_id)

    def latest(self) -> list[Upload]:
        """Return the uploads of the last round that brought any."""
        last = max((upload.round for upload in self._of.values()), default=0)
        return [upload for upload in self.ordered() if upload.round == last]

    def drop(self, node_id: int) -> None:
        """Forget a node's upload, if there is one."""
        if (upload := self._of.pop(node_id, None)) is not None:
            self._drop_states(upload)
            self.changed = True

    def leave_out(self, node_id: int) -> None:
        """Drop an upload that does not count, and keep its trace if it was merged."""
        if (upload := self._of.get(node_id)) is not None and upload.in_model:
            self.traces.add(node_id)
        self.drop(node_id)

    def forget(self, node_id: int) -> bool:
        """Drop all that there is of a node alone; False if there is nothing."""
        if node_id not in self._of and node_id not in self.traces:
            return False
        self.drop(node_id)
        self.traces.discard(node_id)
        self.changed = True
        return True

    def merged(self, *, afresh: bool) -> None:
        """Take note that all uploads were merged; afresh: and what was merged before was not."""
        self._of = {node: replace(upload, in_model=True) for node, upload in self._of.items()}
        self.changed = False
        if afresh:
            self.traces.clear()

    def _drop_states(self, upload: Upload) -> None:
        for key in (upload.key, _mean_key(upload)):
            self._let_go(key)

    def fold(
        self,
        connected: Collection[int],
        merge: Callable[[Sequence[Upload]], State | None],
        max_share: float = MAX_SHARE,
    ) -> int:
        """Replace the generators of nodes that left by their barycenter, once they are many.

        That is, more than `KEPT` and more than there are nodes. `merge` makes the barycenter's
        state, or None if it cannot; it weighs what they do together, none more than `max_share`
        lets it. Returns the number of nodes folded.
        """
        gone = {node: upload for node, upload in self._of.items() if node not in connected}
        if len(gone) <= max(KEPT, len(connected)):
            return 0
        parts = ([self._folded] if self._folded else []) + _in_place(gone.values())
        state = merge(parts)
        if state is None:
            return 0
        weights = bounded(parts, max_share)
        self._folded = replace(
            parts[-1],
            key=FOLDED,
            place=-1,
            weight=_together(parts, weights),
            digest=digest(state),
            nodes=sum(part.nodes for part in parts),
            labels=mixed(list(zip(weights, [part.labels for part in parts], strict=True))),
            mean="",
        )
        for node in gone:
            self.drop(node)
        self._keep(FOLDED, state)
        return len(gone)

    def _keep(self, key: str, state: State) -> None:
        self._let_go(key)
        size = sum(value.numel() * value.element_size() for value in state.values())
        if self._total + size > MEMORY and self._saved(key, state):
            return
        self._states.put(key, state)  # also what the disk refused: a model is made of it
        self._bytes[key] = size
        self._total += size

    def _saved(self, key: str, state: State) -> bool:
        """Keep what does not fit into memory on disk, if that can be done."""
        if self._on_disk is None:
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="fl-wb-uploads-")
            except OSError as error:
                log.warning("uploads beyond %d bytes stay in memory: %s", MEMORY, error)
                return False
            self._on_disk = StageStore(Path(self._folder.name))
        return self._on_disk.put(key, state)

    def _let_go(self, key: str) -> None:
        self._total -= self._bytes.pop(key, 0)
        self._states.drop(key)
        if self._on_disk is not None:
            self._on_disk.drop(key)


def bounded(uploads: Sequence[Upload], max_share: float) -> list[float]:
    """Return what uploads weigh; see `fl_wb.messages.weights.bounded_weights`."""
    said, nodes = [each.weight for each in uploads], [each.nodes for each in uploads]
    return bounded_weights(said, max_share, nodes)


def _together(parts: Sequence[Upload], weights: Sequence[float]) -> float:
    """Return what uploads, bounded to weights, weigh together: by the word of who is not cut."""
    taken = (part.weight / mine for part, mine in zip(parts, weights, strict=True) if mine)
    return min(min(taken) * math.fsum(weights), sys.float_info.max / 2)


def _mean_key(upload: Upload) -> str:
    return f"{upload.key}-mean"


def _in_place(uploads: Collection[Upload]) -> list[Upload]:
    return sorted(uploads, key=lambda upload: upload.place)
