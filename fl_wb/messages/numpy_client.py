"""Flower's older `NumPyClient`s: lists of arrays instead of named ones, records of other names.

What they take and send (``fitins.parameters``, ``evaluateres.loss``, ...) is put into the form of
message-API apps here, at the boundary, so that nothing else knows of them. Names as in flwr 1.41,
`flwr.compat.common.recorddict_compat`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_wb.messages import keys
from fl_wb.messages.records import InvalidUpload

FIT, EVALUATE = "fitins.", "evaluateins."
RESULTS = ("fitres", "evaluateres")
NO_QUERY = "Invalid message type: query"  # what such an app answers when it is asked for its role


def evaluation_key(key: str) -> str:
    """Return the key of an EVALUATE message's record, of that in a TRAIN message."""
    return EVALUATE + key.removeprefix(FIT) if key.startswith(FIT) else key


def is_list(arrays: Collection[str]) -> bool:
    """Whether the names of arrays are positions, such as "0", "1"."""
    return bool(arrays) and all(name.isdecimal() for name in arrays)


def named(arrays: ArrayRecord, names: Collection[str]) -> ArrayRecord:
    """Give a list's arrays the names of the model that it was made of, in its order.

    Arrays that have names keep them.

    Raises
    ------
    InvalidUpload
        If the list is longer or shorter than the model.
    """
    if not is_list(arrays) or set(arrays) == set(names):
        return arrays
    if len(arrays) != len(names):
        raise InvalidUpload(f"its list has {len(arrays)} arrays, and the model has {len(names)}")
    return ArrayRecord(dict(zip(names, arrays.values(), strict=True)))


def plain(content: RecordDict) -> RecordDict:
    """Return a reply with one MetricRecord, if it is that of a `NumPyClient`; any other as it is.

    Raises
    ------
    InvalidUpload
        If its status is none of success.
    """
    for result in RESULTS:
        status = content.config_records.get(f"{result}.status")
        if status is None:
            continue
        if status.get("code") != 0:
            raise InvalidUpload(f"its client says: {str(status.get('message'))[:200]!r}")
        said = content.config_records.get(f"{result}.metrics", ConfigRecord())
        figures = MetricRecord()
        for name, value in said.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                figures[name] = value
            elif name == keys.LABELS and isinstance(value, list):
                figures[name] = _numbers(name, value)
        for record in content.metric_records.values():
            figures.update(record)
        return RecordDict({**content.array_records, keys.METRICS: figures})
    return content


def _numbers(name: str, values: Sequence[object]) -> list[float]:
    found = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(found) < len(values):
        raise InvalidUpload(f"its {name} {str(values)[:200]} are not all numbers")
    return [float(x) for x in found]
