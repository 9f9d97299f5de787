"""What nodes answer when they are asked for their roles, and whose answer it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Message

from fl_wb.messages import numpy_client
from fl_wb.messages.keys import BOTH, ROLE, ROLES
from fl_wb.messages.records import InvalidUpload
from fl_wb.messages.replies import check


def addressees(sent: Iterable[Message]) -> dict[str, int]:
    """Return the node that each message went to, by the message's id."""
    return {each.metadata.message_id: each.metadata.dst_node_id for each in sent}


def node_of(reply: Message, nodes: Mapping[str, int]) -> int:
    """Return the node that a reply to one of `addressees` is from.

    A dead node's error comes from the SuperLink's id.
    """
    return nodes.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)


def says(reply: Message, key: str) -> bool:
    """Return whether a node says, beside its role, `keys.FORGET` or `keys.AGAIN`."""
    records = () if reply.has_error() else reply.content.config_records.values()
    return any(record.get(key) is True for record in records)


def role_in(reply: Message) -> str:
    """Return the role in a node's answer, or raise InvalidUpload."""
    if reply.has_error():
        reason = str(reply.error.reason)
        if "No query function" in reason or numpy_client.NO_QUERY in reason:
            return BOTH
        raise InvalidUpload(f"asked for its role, it failed: {reason[:200]}")
    check(reply.content)
    for record in reply.content.config_records.values():
        if ROLE in record:
            if record[ROLE] in ROLES:
                return str(record[ROLE])
            raise InvalidUpload(
                f"its role {str(record[ROLE])[:40]!r} is not one of {', '.join(ROLES)}"
            )
    return BOTH
