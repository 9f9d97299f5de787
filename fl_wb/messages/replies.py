"""The boundary that every reply passes: forms and sizes, before anything else sees it.

`check` bounds a reply of any app. The other functions read what FL-WB's own nodes send beside
arrays and weights: figures, curves, pictures, packed generators; each either returns what can be
used as it is, or raises `InvalidUpload` with one sentence. Nothing here decodes before it has
looked at what is declared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_wb.generators.latents import frequencies
from fl_wb.messages import keys
from fl_wb.messages.records import InvalidUpload, to_tensors

RECORDS = 16  # in one reply
ENTRIES = 10_000  # in all of its records together
NAME = 200  # characters
NUMBERS = 100_000  # in all lists together
BYTES = 256 << 20  # of texts and bytes that are no arrays
LARGEST = 1e100  # of a figure; beyond it, sums of them overflow
POINTS = 10_000  # of a curve
PICTURES = 64  # of one step
SIDE, RATIO = 1024, 8  # of a picture


def check(content: RecordDict) -> None:
    """Refuse a reply of more, longer or odder parts than any app of use has.

    Raises
    ------
    InvalidUpload
        Saying what there is too much of.
    """
    _most("records", len(content), RECORDS)
    _most("entries", sum(len(record) for record in content.values()), ENTRIES)
    numbers = size = 0
    for name, record in content.items():
        _name(name)
        for key, value in record.items():
            _name(key)
            values = value if isinstance(value, list) else [value]
            numbers += len(values)
            size += sum(len(item) for item in values if isinstance(item, str | bytes))
    _most("numbers", numbers, NUMBERS)
    _most("bytes beside its arrays", size, BYTES)


def metrics(content: RecordDict) -> MetricRecord:
    """Return the one MetricRecord of a reply."""
    found = list(content.metric_records.values())
    if len(found) != 1:
        raise InvalidUpload(f"it has {len(found)} MetricRecords instead of one")
    return found[0]


def weight(content: RecordDict, key: str) -> float:
    """Return the positive, finite number under a key of the metrics."""
    value = metrics(content).get(key)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidUpload(f"its weight {key!r} is {str(value)[:40]}, not a positive number")
    try:
        return float(value)
    except OverflowError as error:
        raise InvalidUpload(f"its weight {key!r} is no floating number") from error


def labels(content: RecordDict, number: int | None) -> tuple[float, ...]:
    """Return how often a node has each of so many labels, of sum 1; empty if it does not say."""
    counts = metrics(content).get(keys.LABELS)
    if number is None or counts is None:
        return ()
    if not isinstance(counts, list) or len(counts) != number or not all(map(is_figure, counts)):
        raise InvalidUpload(f"its {keys.LABELS!r} are no list of {number} numbers")
    try:
        return frequencies(counts)
    except ValueError as error:
        raise InvalidUpload(f"its {keys.LABELS!r}: {error}") from None


def model(content: RecordDict) -> ArrayRecord:
    """Return the one ArrayRecord of a train reply that is not its critic, whatever its key."""
    found = [record for key, record in content.array_records.items() if key != keys.CRITIC]
    if len(found) != 1:
        raise InvalidUpload(f"it has {len(found)} models, not one")
    return found[0]


def is_figure(value: object) -> bool:
    """Whether a metric is a number that averages with others (nan does not)."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def figures(content: RecordDict) -> dict[str, float]:
    """Return the metrics that are single numbers; nan may stay, infinite ones and lists not."""
    return {
        name: float(value)
        for name, value in metrics(content).items()
        if isinstance(value, int | float) and not abs(value) > LARGEST
    }


def partition(content: RecordDict) -> int | None:
    """Return the number that a node says it has, or None."""
    value = info(content).get(keys.PARTITION)
    return value if isinstance(value, int) and 0 <= value < 10**9 else None


def curve(content: RecordDict) -> dict[str, list[float]]:
    """Return the columns ``curve/<name>`` of a target's reply: equally many numbers each."""
    found: dict[str, list[float]] = {}
    for name, values in info(content).items():
        if not name.startswith("curve/"):
            continue
        if not isinstance(values, list) or not all(
            isinstance(v, int | float) and not abs(v) > LARGEST for v in values
        ):
            raise InvalidUpload(f"its {name!r} is no list of numbers")
        found[name.removeprefix("curve/")] = [float(v) for v in values]
    lengths = {len(values) for values in found.values()}
    if len(lengths) > 1 or max(lengths, default=1) not in range(1, POINTS + 1):
        raise InvalidUpload(f"its curve's columns have {sorted(lengths)[:5]} points")
    return found


def packed(content: RecordDict, most: int) -> bytes | None:
    """Return the packed ternary generator of a target's reply, if it sent one."""
    value = info(content).get(keys.TERNARY)
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise InvalidUpload(f"its ternary generator is a {type(value).__name__}, not bytes")
    _most("bytes of a ternary generator", len(value), most)
    return value


def pictures(
    content: RecordDict, steps: Collection[str], shape: Sequence[int]
) -> dict[str, Tensor]:
    """Return the pictures (n, c, h, w) of a target's reply, by step.

    Parameters
    ----------
    content : RecordDict
        A reply.
    steps : collection of str
        The names that there may be.
    shape : sequence of int
        (c, h, w), as the run's generator makes them: no other can be.
    """
    arrays = content.array_records.get(keys.SAMPLES, ArrayRecord())
    for name, array in arrays.items():
        if name not in steps:
            raise InvalidUpload(f"its pictures {name[:40]!r} are of no step of this run")
        found = tuple(array.shape)
        if len(found) != 4 or found[1:] != tuple(shape) or not 0 < found[0] <= PICTURES:
            raise InvalidUpload(
                f"its pictures {name!r} have the shape {str(found[:5])[:60]}, not "
                f"(1 to {PICTURES}, {', '.join(map(str, shape))})"
            )
    return to_tensors(arrays)


def drawable(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are pictures that a page can hold."""
    sides = tuple(shape)[1:]
    return len(shape) == 3 and max(sides) <= SIDE and max(sides) <= RATIO * min(sides)


def info(content: RecordDict) -> ConfigRecord:
    """Return what a node says beside its metrics."""
    return content.config_records.get(keys.INFO, ConfigRecord())


def _most(what: str, found: int, most: int) -> None:
    if found > most:
        raise InvalidUpload(f"it has {found} {what}, more than {most}")


def _name(name: str) -> None:
    if len(name) > NAME or not name.isprintable():
        raise InvalidUpload(f"a name in it, {name[:40]!r}, is longer than {NAME} or unprintable")
