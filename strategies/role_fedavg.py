"""FedAvg on nodes that have roles: sources train, targets evaluate.

The baseline "FedAvg of generators", and the part of `AdaptiveCoalescence` that deals with nodes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from logging import INFO, WARNING
from math import isfinite
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes

from fl_wb.messages.keys import BOTH, ROLE, ROLES, SOURCE, TARGET
from fl_wb.messages.records import InvalidUpload

ROLE_TIMEOUT = 60.0  # seconds; a fresh client process has to import torch before it can answer


class RoleFedAvg(FedAvg):
    """Federated averaging that trains on sources and evaluates on targets.

    Every node is asked once, by a QUERY message, for its role: a ConfigRecord with ``role`` as
    "source", "target", "both" or "none" (it takes no part). A node that answers anything else,
    or whose app has no ``@app.query()``, plays both roles, so that on such nodes this is FedAvg.
    The arguments are those of `flwr.serverapp.strategy.FedAvg`. The minimums say for how many
    connected nodes to wait, as there; then fractions and minimums count the nodes of the role in
    question, and all of these do where a minimum asks for more.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._roles: dict[int, str] = {}
        self._mute = False  # the app has no @app.query(): nobody is asked again
        self._sent: list[Message] = []
        self._connected: list[int] = []
        self._strikes: Counter[int] = Counter()  # rounds in a row whose upload was dropped
        self._patience: int | None = None  # after so many, a node is not asked to train again

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated training, on sources."""
        self._sent = []
        if self.fraction_train == 0.0:
            return []
        node_ids = self._sample(grid, SOURCE, self.fraction_train, self.min_train_nodes)
        return self._instruct(server_round, arrays, config, node_ids, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated evaluation, on targets."""
        self._sent = []
        if self.fraction_evaluate == 0.0:
            return []
        node_ids = self._sample(grid, TARGET, self.fraction_evaluate, self.min_evaluate_nodes)
        return self._instruct(server_round, arrays, config, node_ids, MessageType.EVALUATE)

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
        alike = self._alike(kept, "aggregate_evaluate")
        return self.evaluate_metrics_aggr_fn(alike, self.weighted_by_key) if alike else None

    def _sample(self, grid: Grid, role: str, fraction: float, minimum: int) -> list[int]:
        # A sample of none waits for the nodes that FedAvg would wait for, and lists them.
        _, connected = sample_nodes(grid, max(self.min_available_nodes, minimum), 0)
        self._connected = connected
        # Of nodes that left nothing is remembered; a fleet's ids would otherwise pile up.
        self._roles = {
            node_id: self._roles[node_id] for node_id in connected if node_id in self._roles
        }
        self._strikes = Counter({n: k for n, k in self._strikes.items() if n in connected})
        self._ask_roles(grid, connected)
        able = [n for n in connected if self._roles.get(n, BOTH) in (role, BOTH)]
        if role == SOURCE and self._patience is not None:
            able = [n for n in able if self._strikes[n] < self._patience]
        size = min(len(able), max(int(len(able) * fraction), minimum))
        name = "configure_train" if role == SOURCE else "configure_evaluate"
        log(INFO, "%s: Sampled %d nodes (out of %d)", name, size, len(able))
        if not able:
            log(WARNING, "none of the %d connected nodes is a %s", len(connected), role)
        return random.sample(able, size)

    def _instruct(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        node_ids: list[int],
        message_type: str,
    ) -> list[Message]:
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        self._sent = list(self._construct_messages(record, node_ids, message_type))
        return self._sent

    def _ask_roles(self, grid: Grid, node_ids: Sequence[int]) -> None:
        """Ask the nodes whose role is not known; who does not answer is asked again next time."""
        unknown = [node_id for node_id in node_ids if node_id not in self._roles]
        if unknown and not (self._roles or self._mute):
            log(
                INFO,
                "Asking nodes for their roles (an app without @app.query() logs an error, once,",
            )
            log(INFO, "which does no harm: its nodes both train and evaluate)")
        # One node first: where the app cannot answer, each node would log a traceback.
        for asked in (unknown[:1], unknown[1:]):
            if not asked or self._mute:
                continue
            question = RecordDict({self.configrecord_key: ConfigRecord({"ask": ROLE})})
            messages = list(self._construct_messages(question, asked, MessageType.QUERY))
            for reply in grid.send_and_receive(messages, timeout=ROLE_TIMEOUT):
                self._roles[_node_of(reply, messages)] = _role_in(reply)
                self._mute |= reply.has_error() and "No query function" in str(reply.error.reason)
        if self._mute:
            self._roles.update(dict.fromkeys(unknown, BOTH))
        elif unknown:
            roles = Counter(self._roles.get(node_id, BOTH) for node_id in node_ids)
            log(INFO, "Roles of nodes: %s", ", ".join(f"{roles[role]} {role}" for role in ROLES))

    def _received(self, replies: Iterable[Message], is_train: bool) -> list[tuple[int, RecordDict]]:
        """Return (node id, content) of replies without error; name the nodes that failed."""
        name = "aggregate_train" if is_train else "aggregate_evaluate"
        good, bad = self._check_and_log_replies(list(replies), is_train, validate=False)
        silent = {message.metadata.dst_node_id for message in self._sent}
        for message in bad:
            log(WARNING, "%s: node %d failed", name, _node_of(message, self._sent))
        silent.difference_update(_node_of(message, self._sent) for message in good + bad)
        for node_id in sorted(silent):
            log(WARNING, "%s: node %d did not answer in time", name, node_id)
        received = [(_node_of(message, self._sent), message.content) for message in good]
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
        """Return the reply's weight.

        Raises
        ------
        InvalidUpload
            If there is not exactly one MetricRecord with one positive number as its weight.
        """
        metrics = list(content.metric_records.values())
        if len(metrics) != 1:
            raise InvalidUpload(f"it has {len(metrics)} MetricRecords instead of one")
        weight = metrics[0].get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not (isfinite(weight) and weight > 0):
            raise InvalidUpload(
                f"its weight {self.weighted_by_key!r} is {str(weight)[:40]}, not a positive number"
            )
        return float(weight)

    def _alike(self, replies: list[tuple[int, RecordDict]], name: str) -> list[RecordDict]:
        """Return the replies whose metrics have the commonest names and forms.

        Aggregation functions, Flower's own included, take for granted that replies agree.
        """
        forms = [_form(next(iter(content.metric_records.values()))) for _, content in replies]
        if not forms:
            return []
        commonest = Counter(forms).most_common(1)[0][0]
        for (node_id, _), form in zip(replies, forms, strict=True):
            if form != commonest:
                log(WARNING, "%s: node %d has metrics unlike the others': left out", name, node_id)
        return [
            content for (_, content), form in zip(replies, forms, strict=True) if form == commonest
        ]


def _form(metrics: MetricRecord) -> frozenset[tuple[str, int]]:
    return frozenset((k, len(v) if isinstance(v, list) else -1) for k, v in metrics.items())


def _node_of(reply: Message, sent: Sequence[Message]) -> int:
    """Return the node that a reply is from: a dead node's error comes from the SuperLink's id."""
    for message in sent:
        if message.metadata.message_id == reply.metadata.reply_to_message_id:
            return message.metadata.dst_node_id
    return reply.metadata.src_node_id


def _role_in(reply: Message) -> str:
    if reply.has_error():
        return BOTH
    for record in reply.content.config_records.values():
        if (role := record.get(ROLE)) in ROLES:
            return str(role)
    return BOTH
