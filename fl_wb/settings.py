"""Settings that check themselves: what a field may be stands beside it, on every path the same.

A dataclass of settings derives from `Settings` and annotates its fields, as in
``ema: Annotated[float, at_least(0, below=1)] = 0.99``. What is no such value is refused wherever
an object is made, and by `violations` in a configuration that is none yet, in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must be: a test, and the words that follow "must be"."""

    holds: Callable[[Any], bool]
    words: str


def at_least(low: float, *, below: float = math.inf) -> Rule:
    """Return a rule: no smaller than ``low``, and less than ``below``."""
    return Rule(lambda value: low <= value < below, f"at least {low}{_less(below)}")


def above(low: float, *, below: float = math.inf) -> Rule:
    """Return a rule: larger than ``low``, and less than ``below``."""
    return Rule(lambda value: low < value < below, f"more than {low}{_less(below)}")


def one_of(*names: str) -> Rule:
    """Return a rule: one of these names."""
    return Rule(lambda value: value in names, "one of: " + ", ".join(names))


class Settings:
    """Base of a dataclass of settings."""

    def __post_init__(self) -> None:
        """Check all fields.

        Raises
        ------
        ValueError
            Naming each field that is out of range, its value, and what is allowed.
        """
        if wrong := list(violations(type(self), vars(self))):
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class Field:
    """What a field of settings may be: its type, its rules, and whether it may be None."""

    kind: Any
    rules: tuple[Rule, ...]
    optional: bool

    def refusal(self, value: Any) -> str | None:
        """Return what a value must be instead, or None."""
        if value is None and self.optional:
            return None
        if not _is(self.kind, value):
            return self.type_words
        return next((rule.words for rule in self.rules if not rule.holds(value)), None)

    @property
    def type_words(self) -> str:
        """The type in words."""
        plain = {
            int: "an integer",
            float: "a number",
            str: "a text",
            bool: "true or false",
            list[int]: "a list of integers, such as [1,28,28]",
            list[list[int]]: "a list of lists of integers, such as [[0,1,2],[3,4]]",
        }
        words = plain.get(self.kind) or f"settings of class {self.kind.__name__}"
        return f"{words} or null" if self.optional else words


@cache
def fields_of(kind: type) -> dict[str, Field]:
    """Return what each field of a dataclass of settings may be."""
    return {name: _field(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def violations(kind: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one sentence for each value that is refused, with its key, itself and what is allowed.

    Parameters
    ----------
    kind : type
        A dataclass of settings.
    values : mapping
        Of every field; those of settings within settings may be mappings, too.
    prefix : str
        Of the keys, such as "client.".
    """
    for name, field in fields_of(kind).items():
        value = values[name]
        if is_dataclass(field.kind) and isinstance(value, Mapping):
            yield from violations(field.kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif words := field.refusal(value):
            yield f"{prefix}{name}={value!r} must be {words}"


def _less(below: float) -> str:
    return f" and less than {below}" if below < math.inf else ""


def _field(hint: Any) -> Field:
    """Take a type hint apart: what is optional, what is annotated."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    optional = type(None) in get_args(hint)
    if optional:
        (hint,) = parts
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        return Field(kind, tuple(rules), optional)
    return Field(hint, (), optional)


def _is(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type."""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, list | tuple) and all(_is(item, one) for one in value)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)
