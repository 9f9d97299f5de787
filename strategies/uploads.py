"""What the server keeps of the nodes: the latest generator of each, and of those that left, one.

A node that left stays part of the barycenter. Its generator need not be kept for that: the
recursion nu_k = merge(nu_{k-1}, mu_k) at t_k = lambda_k / Lambda_k goes on from the barycenter of
the first generators, with their weights' sum, as it does from the generators themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

KEPT = 8  # generators of nodes that left are kept apart, at least: some nodes come back


@dataclass(frozen=True)
class Upload:
    """The latest generator of one node, and the round in which it first arrived.

    Or the barycenter of several such, with the sum of their weights; `nodes` is their number.
    """

    round: int
    weight: float
    digest: str
    state: dict[str, Tensor]
    nodes: int = 1


class Uploads:
    """The generators of which the model is made; at most twice as many as there are nodes."""

    def __init__(self) -> None:
        self._of: dict[int, Upload] = {}
        self._folded: Upload | None = None

    def __len__(self) -> int:
        """Count the nodes whose generators are merged, also those that left."""
        return len(self._of) + (self._folded.nodes if self._folded else 0)

    def copy(self) -> Uploads:
        """Return a copy that later changes leave alone."""
        made = Uploads()
        made._of, made._folded = dict(self._of), self._folded
        return made

    def put(self, node_id: int, upload: Upload) -> None:
        """Keep a node's upload, unless it sent the same before (and keeps its place then)."""
        known = self._of.get(node_id)
        if known is None or (known.digest, known.weight) != (upload.digest, upload.weight):
            self._of[node_id] = upload

    def drop(self, node_id: int) -> None:
        """Forget a node's upload."""
        del self._of[node_id]

    def of_nodes(self) -> dict[int, Upload]:
        """Return the uploads that are kept apart, by node id."""
        return dict(self._of)

    def ordered(self) -> list[Upload]:
        """Return what to merge, in an order that no network delay can change."""
        return ([self._folded] if self._folded else []) + _sorted(self._of.values())

    def fold(
        self,
        connected: Collection[int],
        merge: Callable[[Sequence[Upload]], dict[str, Tensor] | None],
    ) -> int:
        """Replace the generators of nodes that left by their barycenter, once they are many.

        That is, more than `KEPT` and more than there are nodes. `merge` makes the barycenter's
        state, or None if it cannot. Returns the number of nodes folded.
        """
        gone = {node_id: self._of[node_id] for node_id in self._of.keys() - set(connected)}
        if len(gone) <= max(KEPT, len(connected)):
            return 0
        parts = ([self._folded] if self._folded else []) + _sorted(gone.values())
        state = merge(parts)
        if state is None:
            return 0
        total = sum(part.weight for part in parts)
        nodes = sum(part.nodes for part in parts)
        self._folded = Upload(parts[-1].round, total, "", state, nodes)
        for node_id in gone:
            del self._of[node_id]
        return len(gone)


def _sorted(uploads: Collection[Upload]) -> list[Upload]:
    return sorted(uploads, key=lambda upload: (upload.round, -upload.weight, upload.digest))
