"""What the values of a configuration may be, beyond their types: ranges and names.

A rule is found by a setting's full key, or else by the last part of it, because settings of one
name mean the same everywhere (`iterations` of a source, of a stage, of an adaptation).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value must be: a test and the words for it."""

    holds: Callable[[Any], bool]
    words: str

    def __call__(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        return None if self.holds(value) else f"must be {self.words}"


def at_least(low: float) -> Rule:
    """Return a rule: finite and no smaller than ``low``."""
    return Rule(lambda value: low <= value < math.inf, f"at least {low}")


def above(low: float) -> Rule:
    """Return a rule: finite and larger than ``low``."""
    return Rule(lambda value: low < value < math.inf, f"more than {low}")


def share(*, zero: bool = False) -> Rule:
    """Return a rule: below 1, and above 0 or (``zero``) no smaller."""
    words = "at least 0 and less than 1" if zero else "more than 0 and less than 1"
    return Rule(lambda value: 0 <= value < 1 if zero else 0 < value < 1, words)


def one_of(*names: str) -> Rule:
    """Return a rule: one of these names."""
    return Rule(lambda value: value in names, "one of: " + ", ".join(names))


def _class_lists(value: Sequence[Sequence[int]]) -> bool:
    return len(value) > 0 and all(
        len(classes) > 0 and all(label >= 0 for label in classes) for classes in value
    )


CLASSES = Rule(
    _class_lists,
    "a list with the classes of each node, at least one node and one class each, "
    "such as [[0,1,2],[3,4]]",
)

SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")

COUNTS = Rule(
    lambda value: len(value) > 0 and all(count > 0 for count in value),
    "a list with one number, 1 or more, for each node, such as [100,25]",
)

SHAPE = Rule(
    lambda value: len(value) == 3 and all(size > 0 for size in value),
    "channels, height and width, such as [1,28,28]",
)

DEVICE = Rule(
    lambda value: re.fullmatch(r"cpu|mps|cuda(:\d+)?", value) is not None,
    "cpu, mps, cuda, or one CUDA device such as cuda:1",
)


def violations(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Return one sentence for each value that breaks its rule, naming key, value and rule."""
    found = []
    for key, value in values.items():
        rule = rules.get(key) or rules.get(key.rsplit(".", 1)[-1])
        if value is None or rule is None:
            continue
        if (wrong := rule(value)) is not None:
            found.append(f"{key}={value!r} {wrong}")
    return found


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean ...?' for a name close to one of ``names``, else nothing."""
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
