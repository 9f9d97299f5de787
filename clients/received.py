"""What a message brings to a node, and what the node has to put beside it: seen to fit."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.generators.sampling import check_real, generate
from fl_wb.messages import generator_part, keys, records

MOST_CELLS, LEAST = 4096, 1e-9  # of a code that a server sends


def fitted(
    arrays: ArrayRecord,
    network: nn.Module,
    context: Context,
    words: str = "the server's generator does not fit that of node",
) -> nn.Module:
    """Load what the server sent into a node's own network, and return it.

    Raises
    ------
    ValueError
        Naming the node and the first array that does not fit.
    """
    try:
        return records.load(arrays, network)
    except records.InvalidUpload as error:
        raise ValueError(f"{words} {context.node_id}: {error}") from error


def received(
    message: Message,
    context: Context,
    generator: Callable[[], nn.Module],
    *,
    key: str = keys.ARRAYS,
    prefixes: generator_part.Part | None = None,
) -> tuple[nn.Module, str]:
    """Return the generator that a message carries, and what its arrays' names begin with there.

    Raises
    ------
    ValueError
        If the message has no such ArrayRecord, or its arrays do not fit the generator.
    """
    network, found = generator(), message.content.array_records
    if key not in found:
        raise ValueError(
            f"the message to node {context.node_id} has no ArrayRecord {key!r}, only "
            f"{sorted(found)}: set arrayrecord_key"
        )
    arrays, head = generator_part.own(
        generator_part.split(found[key], prefixes)[0], network.state_dict()
    )
    return fitted(arrays, network, context), head


def received_code(message: Message, context: Context) -> tuple[Code | None, list[int]]:
    """Return the code of the generator that a message carries, if said, and its forgotten cells.

    Raises
    ------
    ValueError
        If what it says is no code.
    """
    record = message.content.config_records.get(keys.CODE)
    if record is None:
        return None, []
    shares = record.get(keys.SHARES)
    listed = shares if isinstance(shares, list) and len(shares) <= MOST_CELLS else []
    good = [share for share in listed if isinstance(share, float) and LEAST <= share <= 1]
    if not good or len(good) < len(listed):
        raise ValueError(
            f"the message to node {context.node_id} has shares {str(shares)[:80]}: 1 to "
            f"{MOST_CELLS} numbers from {LEAST} to 1 are a code"
        )
    forgotten = record.get(keys.FORGOTTEN, [])
    if not isinstance(forgotten, list) or not {*forgotten} < {*range(len(good))}:
        raise ValueError(
            f"the message to node {context.node_id} has forgotten cells {str(forgotten)[:80]}: "
            f"some of the {len(good)} may be, from 0, not all"
        )
    return Code(good), [int(cell) for cell in forgotten]


def own_samples(
    few: Tensor, context: Context, start: nn.Module, latent_dim: int | None = None
) -> Tensor:
    """Return a node's few samples, seen to be such as the generator, of one tensor, makes.

    Raises
    ------
    TypeError, ValueError
        Naming the node, and what its samples are instead.
    """
    node = f"node {context.node_id}"
    made = generate(start, 2, latent_dim=latent_dim)  # of one, batch statistics are none
    check_real(few, made, f"{node}: its samples")
    if len(few) == 0:
        raise ValueError(f"{node} has no samples to adapt to: its data is {tuple(few.shape)}")
    if few.shape[1:] != made.shape[1:]:
        raise ValueError(
            f"{node} has samples of shape {tuple(few.shape[1:])}, but its generator makes "
            f"samples of shape {tuple(made.shape[1:])}"
        )
    return few
