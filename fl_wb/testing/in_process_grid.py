"""Flower in one process: a Grid that calls ClientApps directly, for tests.

Messages go through Flower's own wire format both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_wb.private_apis import ErrorCode, address, identify, through_the_wire

RUN_ID, SUPERLINK = 7, 1
Fault = Callable[[Message], bool]


@dataclass
class Node:
    """A node: its app, its context (kept between messages), and how it fails, if it does."""

    app: ClientApp
    context: Context
    killed: Fault = lambda message: False
    silent: Fault = lambda message: False
    received: list[str] = field(default_factory=list)


class InProcessGrid(Grid):
    """Nodes that join, leave, raise, die or stay silent, without a SuperLink.

    Parameters
    ----------
    app : ClientApp
        What every node runs unless `add` is given another one.
    nodes : int
        How many nodes are there at first; their ids are 11, 12, ...
    run_config : mapping, optional
        Every node's ``context.run_config``.
    """

    def __init__(
        self, app: ClientApp, nodes: int = 0, run_config: Mapping[str, Any] | None = None
    ) -> None:
        identify(RUN_ID, SUPERLINK)
        self.app, self.run_config = app, dict(run_config or {})
        self.nodes: dict[int, Node] = {}
        self.before_send: Callable[[list[Message]], None] = lambda messages: None
        self.reverse = False  # replies come back in the opposite order
        for index in range(nodes):
            self.add({"partition-id": index, "num-partitions": nodes})

    def add(
        self,
        node_config: Mapping[str, Any],
        node_id: int | None = None,
        app: ClientApp | None = None,
    ) -> int:
        """Connect a node; returns its id."""
        node_id = node_id if node_id is not None else 11 + len(self.nodes)
        context = Context(RUN_ID, node_id, dict(node_config), RecordDict(), self.run_config)
        self.nodes[node_id] = Node(app or self.app, context)
        return node_id

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of connected nodes."""
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Have every addressed node handle its message; faulty nodes answer as Flower's would."""
        sent = list(messages)
        self.before_send(sent)
        replies = []
        for message in sent:
            address(message, message_id=str(uuid4()))
            node = self.nodes[message.metadata.dst_node_id]
            node.received.append(message.metadata.message_type)
            if node.silent(message):
                continue
            replies.append(self._handle(node, message))
        return replies[::-1] if self.reverse else replies

    @staticmethod
    def _handle(node: Node, message: Message) -> Message:
        if node.killed(message):
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
            return address(reply, src_node_id=SUPERLINK)  # as the SuperLink itself answers
        try:
            reply = node.app(through_the_wire(message), node.context)
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code, reason), reply_to=message)
        return through_the_wire(reply)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what strategies never call: `send_and_receive` is the one way."""
        raise NotImplementedError

    run = property(_refuse)
    set_run = create_message = push_messages = pull_messages = _refuse
