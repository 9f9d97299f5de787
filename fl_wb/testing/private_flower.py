"""What the in-process grid needs of Flower beyond its public interface, as seen in flwr 1.41.0."""

from __future__ import annotations

from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ErrorCode", "address", "identify", "through_the_wire"]


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
