"""A target that offers what it adapted, as a source: continual learning of few samples, too."""

from __future__ import annotations

import logging

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from torch import Tensor, nn

from fl_wb.clients.source import MADE
from fl_wb.generators.sampling import generate
from fl_wb.messages import keys
from fl_wb.metrics import memorization

_GENERATOR, _METRICS = "fl_wb.shared.generator", "fl_wb.shared.metrics"  # in context.state

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's


def offer(
    context: Context,
    generator: nn.Module,
    few: Tensor,
    unseen: Tensor,
    *,
    min_memorization: float | None = None,
    counts: list[int] | None = None,
) -> None:
    """Keep an adapted generator, of the architecture that sources have, for `shared`.

    Parameters
    ----------
    few, unseen : Tensor
        The node's samples that it was adapted to, and real ones that it was not.
    min_memorization : float, optional
        Keep nothing, and let go what was kept, where `fl_wb.metrics.memorization` is less.
    counts : list of int, optional
        Of a conditional generator: how often each label is among the few.
    """
    said = MetricRecord({keys.WEIGHT: len(few)})
    if counts is not None:
        said[keys.LABELS] = counts
    if min_memorization is not None:
        measured = memorization(generate(generator, MADE, labels=counts), few, unseen)
        if not measured >= min_memorization:
            log.warning(
                "node %d offers nothing: memorization=%.3g of what it adapted must be at least "
                "min_memorization=%s",
                context.node_id,
                measured,
                min_memorization,
            )
            for key in (_GENERATOR, _METRICS):
                context.state.pop(key, None)
            return
        said["memorization"] = measured
    state = {name: value.detach().cpu() for name, value in generator.state_dict().items()}
    context.state[_GENERATOR], context.state[_METRICS] = ArrayRecord(state), said


def offers(context: Context) -> bool:
    """Return whether this node has something to share."""
    return _GENERATOR in context.state


def shared(context: Context) -> RecordDict:
    """Return what a target answers to a TRAIN message: its adapted generator, as a source's."""
    state = context.state
    return RecordDict({keys.ARRAYS: state[_GENERATOR], keys.METRICS: state[_METRICS]})
