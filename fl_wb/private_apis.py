"""What FL-WB needs of Flower and Hydra beyond their public interfaces.

As seen in flwr 1.41.0 and hydra-core 1.3.8. All of it is here, but for the methods of `FedAvg`
that its subclasses call (``_check_and_log_replies``, ``_construct_messages``), and the names of
older clients' records (`fl_wb.messages.numpy_client`).
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords, sample_nodes
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "ErrorCode",
    "address",
    "aggregate_metricrecords",
    "caller_of_kind",
    "hydra_arguments",
    "identify",
    "is_simulated",
    "sample_nodes",
    "through_the_wire",
]


def hydra_arguments() -> ArgumentParser:
    """Return what `hydra.main` parses the command line with, before it starts anything."""
    from hydra._internal.utils import get_args_parser  # here: not every server has a use for it

    return get_args_parser()


def is_simulated(grid: Grid) -> bool:
    """Whether a grid's nodes are simulated: no more than there are will ever come."""
    from flwr.superlink.grid import InMemoryGrid  # here: it brings a database

    return isinstance(grid, InMemoryGrid)


def caller_of_kind(*kinds: type) -> object | None:
    """Return the nearest caller that is a method of one of some classes: its object, or None.

    A strategy that Flower's wrappers hold has no other sign of them than who calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), kinds):
            return caller
        frame = frame.f_back
    return None


def identify(run_id: int, node_id: int) -> None:
    """Make this process the task of a run on a node, by which messages are made."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 1


def address(message: Message, **fields: Any) -> Message:
    """Set what a SuperLink sets in a message: its ``message_id``, its ``src_node_id``."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in fields.items()})
    return message


def through_the_wire(message: Message) -> Message:
    """Serialize and deserialize a message, as a SuperLink between two machines would."""
    contents = {key: obj.deflate() for key, obj in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(copy, Message)
    return address(copy, message_id=message.metadata.message_id)
