"""Metrics of strangers that average with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from logging import WARNING

from flwr.app import MetricRecord, RecordDict
from flwr.common.logger import log

from fl_wb.messages import keys, replies
from fl_wb.messages.weights import bounded_weights

Form = frozenset[tuple[str, int, bool]]
"""Of metrics: each one's name, its length, and whether it averages with others."""


def averageable(
    kept: Sequence[tuple[int, RecordDict]], key: str, max_share: float, name: str
) -> list[RecordDict]:
    """Return the metrics that have the commonest names and forms, with bounded weights.

    Of forms that are equally common, one whose figures all average, with fewer lists, shorter.

    Parameters
    ----------
    kept : sequence of (int, RecordDict)
        Replies, by node id.
    key : str
        Of a reply's weight among its metrics.
    max_share : float
        As in `fl_wb.messages.weights.bounded_weights`.
    name : str
        Of what is being done, in the log.
    """
    forms = [_form(replies.metrics(content)) for _, content in kept]
    counted = Counter(forms)
    commonest = max(counted, key=lambda form: (counted[form], *_plainness(form)), default=None)
    alike = []
    for (node_id, content), form in zip(kept, forms, strict=True):
        if form == commonest:
            alike.append(content)
        else:
            log(WARNING, "%s: node %d has metrics unlike the others': left out", name, node_id)
    weights = bounded_weights([replies.weight(content, key) for content in alike], max_share)
    return [
        RecordDict({keys.METRICS: MetricRecord({**replies.metrics(found), key: weight})})
        for found, weight in zip(alike, weights, strict=True)
    ]


def _form(metrics: MetricRecord) -> Form:
    return frozenset(
        (name, len(value), all(map(replies.is_figure, value)))
        if isinstance(value, list)
        else (name, -1, replies.is_figure(value))
        for name, value in metrics.items()
    )


def _plainness(form: Form) -> tuple[bool, int, int]:
    lists = sum(length >= 0 for _, length, _ in form)
    return all(good for *_, good in form), -lists, -len(form)
