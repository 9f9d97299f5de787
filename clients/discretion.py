"""What a node's errors say, and to whom: a client mod, and what it lets through."""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's


class Refused(ValueError):
    """What a node refuses, in words that the server may have."""


def discreet(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Keep on a node with data of its own what its errors say: names of files, values, settings.

    Flower sends the words of an exception to the server.
    """
    try:
        return call_next(message, context)
    except Refused:
        raise
    except Exception as error:
        if "data" not in context.node_config:
            raise
        log.exception("node %d failed", context.node_id)
        name = type(error).__name__
        raise RuntimeError(f"node {context.node_id}: {name}; its own log says why") from None
