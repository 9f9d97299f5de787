"""FedAvg on nodes that have roles: sources train, targets evaluate.

The baseline "FedAvg of generators", and the part of `AdaptiveCoalescence` that deals with nodes:
whom to ask, what of their replies to believe, and whom to tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fl_wb.federation.coalescence import say_dropped
from fl_wb.federation.model import average
from fl_wb.messages import keys, numpy_client, records
from fl_wb.messages import replies as checked
from fl_wb.messages.keys import BOTH, ROLE, ROLES, SOURCE, TARGET
from fl_wb.messages.records import InvalidUpload
from fl_wb.messages.weights import MAX_SHARE, bounded_weights
from fl_wb.private_apis import aggregate_metricrecords, sample_nodes
from fl_wb.strategies.checks import check_whole
from fl_wb.strategies.metrics import averageable
from fl_wb.strategies.roles import addressees, node_of, role_in, says

ROLE_TIMEOUT = 60.0  # seconds; a fresh client process has to import torch before it can answer


class Observer(Protocol):
    """Who is told, in each round, of the replies that were found valid, by node id."""

    def train(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        """See what sources uploaded."""

    def evaluate(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        """See what targets answered."""


@dataclass(frozen=True)
class Whole:
    """A valid upload; its critic, if it has one, is for a target to check."""

    weight: float
    state: dict[str, Tensor]
    critic: ArrayRecord | None = None
    partition: int | None = None


class RoleFedAvg(FedAvg):
    """Federated averaging that trains on sources and evaluates on targets.

    Every node is asked once, by a QUERY message, for its role: a ConfigRecord with ``role`` as
    "source", "target", "both" or "none" (it takes no part), and perhaps ``forget``, True of a node
    that wants what it sent to be forgotten, or ``again``, True of one whose role is for this round
    alone (``server-round`` in the message) and that is asked in the next one again. A node that
    answers without a role, or whose app has no ``@app.query()``, plays both, so that on such nodes
    this is FedAvg. One that answers with an error or a role that is none is named, and takes no
    part until it is asked again. What a node answers says nothing of the others.

    Parameters
    ----------
    *args, **kwargs
        As in `flwr.serverapp.strategy.FedAvg`. The minimums say for how many connected nodes to
        wait, as there; then fractions and minimums count the nodes of the role in question, and
        all of these do where a minimum asks for more.
    observer : Observer, optional
        Told of every valid reply, round by round.
    max_share : float
        No node weighs more than this many times the mean of the others, whatever it says; see
        `fl_wb.messages.weights.bounded_weights`.
    patience : int, optional
        A node whose upload was dropped in that many rounds in a row is not asked to train again.
        None: it always is.
    """

    def __init__(
        self,
        *args: Any,
        observer: Observer | None = None,
        max_share: float = MAX_SHARE,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        bounded_weights([], max_share)
        check_whole(1, patience=patience)
        self.observer, self.max_share = observer, max_share
        self._roles: dict[int, str] = {}
        self._passing = set[int]()  # nodes whose roles are for this round alone
        self._arrays = ArrayRecord()  # the round's model
        self._sent: list[Message] = []
        self._refused = set[int]()  # nodes whose last replies nobody could read
        self._connected = set[int]()  # thousands, perhaps: looked up for each upload
        self._strikes: Counter[int] = Counter()  # rounds in a row whose upload was dropped
        self._patience = patience

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated training, on sources."""
        self._arrays = arrays
        self._ask_again()
        return self._configure(SOURCE, server_round, arrays, config, grid)

    def _ask_again(self) -> None:
        """Let go of the roles that were for one round alone."""
        for node_id in self._passing:
            self._roles.pop(node_id, None)
        self._passing.clear()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated evaluation, on targets."""
        return self._configure(TARGET, server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the valid uploads; the arrays are None (the model stays) if there is none."""
        template = self._arrays.to_torch_state_dict()
        kept, uploads = [], []
        received = self._received(replies, is_train=True)
        for node_id, content in received:
            try:
                upload = self._upload(content, template)
            except InvalidUpload as error:
                say_dropped(node_id, str(error))
                continue
            kept.append((node_id, content))
            place = node_id if upload.partition is None else upload.partition
            uploads.append((place, node_id, upload))
        good = dict(kept).keys()
        self._judge((dict(received).keys() | self._refused) - good, good)
        if not kept:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
            return None, None
        uploads.sort(key=lambda found: found[:2])
        weights = self._bounded([(node, upload.weight) for _, node, upload in uploads])
        combined = self.combine([upload for *_, upload in uploads], weights)
        return ArrayRecord(combined), self._metrics(server_round, kept, is_train=True)

    def combine(self, uploads: Sequence[Whole], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return the model's state, made of uploads in the order of their partitions.

        A node that does not say its partition comes by its node id. Here it is the average.
        """
        return average((u.state, w) for u, w in zip(uploads, weights, strict=True))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of the evaluate replies that can be aggregated."""
        kept = []
        for node_id, content in self._received(replies, is_train=False):
            try:
                self._weight(content)
            except InvalidUpload as error:
                log(WARNING, "aggregate_evaluate: dropped the reply of node %d: %s", node_id, error)
            else:
                kept.append((node_id, content))
        return self._metrics(server_round, kept, is_train=False)

    def _configure(
        self, role: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make the messages of a round to nodes of a role."""
        self._sent = []
        fraction, minimum, kind = self.fraction_train, self.min_train_nodes, MessageType.TRAIN
        names = [self.arrayrecord_key, self.configrecord_key]
        if role == TARGET:
            fraction, minimum = self.fraction_evaluate, self.min_evaluate_nodes
            kind, names = MessageType.EVALUATE, [*map(numpy_client.evaluation_key, names)]
        if fraction > 0.0:
            node_ids = self._sample(grid, role, server_round, fraction, minimum)
            config["server-round"] = server_round
            record = RecordDict(dict(zip(names, (arrays, config), strict=True)))
            self._sent = list(self._construct_messages(record, node_ids, kind))
        return self._sent

    def _sample(
        self, grid: Grid, role: str, server_round: int, fraction: float, minimum: int
    ) -> list[int]:
        # A sample of none waits for the nodes that FedAvg would wait for, and lists them.
        _, connected = sample_nodes(grid, max(self.min_available_nodes, minimum), 0)
        there = self._connected = set(connected)
        # Of nodes that left nothing is remembered; a fleet's ids would otherwise pile up.
        self._roles = {n: role for n, role in self._roles.items() if n in there}
        self._strikes = Counter({n: k for n, k in self._strikes.items() if n in there})
        mistaken = self._ask_roles(grid, connected, server_round)
        able = [
            n for n in connected if n not in mistaken and self._roles.get(n, BOTH) in (role, BOTH)
        ]
        if role == SOURCE and self._patience is not None:
            able = [n for n in able if self._strikes[n] < self._patience]
        size = min(len(able), max(int(len(able) * fraction), minimum))
        name = "configure_train" if role == SOURCE else "configure_evaluate"
        log(INFO, "%s: Sampled %d nodes (out of %d)", name, size, len(able))
        if not able:
            log(WARNING, "none of the %d connected nodes is a %s", len(connected), role)
        return random.sample(able, size)

    def forget(self, node_id: int) -> None:
        """Forget what a node sent, where anything is kept of it: here, nothing is."""

    def _ask_roles(self, grid: Grid, node_ids: Sequence[int], server_round: int) -> set[int]:
        """Ask the nodes whose role is not known; return those that answered with an error.

        Who does not answer plays both roles meanwhile, and like those is asked again next time.
        """
        unknown = [node_id for node_id in node_ids if node_id not in self._roles]
        if not unknown:
            return set()
        if server_round == 1:
            log(INFO, "Asking nodes for their roles (an app without @app.query() logs an error,")
            log(INFO, "once a node, which does no harm: its nodes both train and evaluate)")
        asked = ConfigRecord({"ask": ROLE, "server-round": server_round})
        question = RecordDict({self.configrecord_key: asked})
        messages = list(self._construct_messages(question, unknown, MessageType.QUERY))
        mistaken = set()
        replies = list(grid.send_and_receive(messages, timeout=ROLE_TIMEOUT))
        nodes = addressees(messages)  # their ids are given when they are sent
        for reply in replies:
            node_id = node_of(reply, nodes)
            try:
                self._roles[node_id] = role_in(reply)
                if says(reply, keys.AGAIN):
                    self._passing.add(node_id)
                if says(reply, keys.FORGET):
                    self.forget(node_id)
            except InvalidUpload as error:
                mistaken.add(node_id)
                log(WARNING, "node %d takes no part for now: %s", node_id, error)
        roles = Counter(self._roles.get(node_id, BOTH) for node_id in node_ids)
        log(INFO, "Roles of nodes: %s", ", ".join(f"{roles[role]} {role}" for role in ROLES))
        return mistaken

    def _received(self, replies: Iterable[Message], is_train: bool) -> list[tuple[int, RecordDict]]:
        """Return (node id, content) of replies without error; name the nodes that failed."""
        name = "aggregate_train" if is_train else "aggregate_evaluate"
        good, bad = self._check_and_log_replies(list(replies), is_train, validate=False)
        nodes = addressees(self._sent)
        for message in bad:
            log(WARNING, "%s: node %d failed", name, node_of(message, nodes))
        asked = {message.metadata.dst_node_id for message in self._sent}
        for node_id in sorted(asked - {node_of(message, nodes) for message in good + bad}):
            log(WARNING, "%s: node %d did not answer in time", name, node_id)
        received = []
        self._refused.clear()
        for message in good:
            node_id = node_of(message, nodes)
            try:
                checked.check(message.content)
                received.append((node_id, numpy_client.plain(message.content)))
            except InvalidUpload as error:
                log(WARNING, "%s: dropped the reply of node %d: %s", name, node_id, error)
                self._refused.add(node_id)
        self._sent = []  # they hold the round's arrays
        return received

    def _judge(self, dropped: Collection[int], kept: Collection[int]) -> None:
        """Count the rounds in a row in which a node's upload was no use."""
        for node_id in kept:
            del self._strikes[node_id]
        for node_id in dropped:
            self._strikes[node_id] += 1
            if self._strikes[node_id] == self._patience:
                log(
                    WARNING,
                    "node %d is not asked to train again: its upload was dropped %d times in a row",
                    node_id,
                    self._patience,
                )

    def _weight(self, content: RecordDict) -> float:
        """Return the reply's weight, or raise InvalidUpload."""
        return checked.weight(content, self.weighted_by_key)

    def _upload(self, content: RecordDict, template: Mapping[str, Tensor]) -> Whole:
        """Check one upload; an InvalidUpload says what is wrong with it."""
        arrays = numpy_client.named(checked.model(content), template)
        state = records.validate(arrays, template)
        critic = content.array_records.get(keys.CRITIC)
        return Whole(self._weight(content), state, critic, checked.partition(content))

    def _bounded(self, weights: Sequence[tuple[int, float]]) -> list[float]:
        """Return what nodes weigh in the end; say whose own word is not taken."""
        said = [weight for _, weight in weights]
        found = bounded_weights(said, self.max_share)
        largest, sum_found = max(said, default=1.0), sum(found)
        whole = sum(weight / largest for weight in said)
        for (node_id, weight), bounded in zip(weights, found, strict=True):
            if bounded / sum_found < (1 - 1e-6) * weight / largest / whole:
                log(
                    WARNING,
                    "node %d says it weighs %.3g, %.3g of all; it counts as %.3g (max_share=%s)",
                    node_id,
                    weight,
                    weight / largest / whole,
                    bounded / sum_found,
                    self.max_share,
                )
        return found

    def _metrics(
        self, server_round: int, kept: Sequence[tuple[int, RecordDict]], *, is_train: bool
    ) -> MetricRecord | None:
        """Tell the observer of what was kept, and aggregate its metrics."""
        if self.observer is not None:
            tell = self.observer.train if is_train else self.observer.evaluate
            tell(server_round, dict(kept))
        aggregate = self.train_metrics_aggr_fn if is_train else self.evaluate_metrics_aggr_fn
        contents = [content for _, content in kept]
        if aggregate is aggregate_metricrecords:  # Flower's own takes for granted that they agree
            name = "aggregate_train" if is_train else "aggregate_evaluate"
            contents = averageable(kept, self.weighted_by_key, self.max_share, name)
        return aggregate(contents, self.weighted_by_key) if contents else None
