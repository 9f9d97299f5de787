"""Overrides such as `data=mnist` and `client.source.iterations=500`: parsed, and refused by name.

Hydra's grammar, with errors that say what would have been right.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fl_wb.settings import Field


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the key, the value and what is allowed."""


def split(overrides: str) -> list[str]:
    """Split one string of overrides at its spaces, as a shell would.

    Raises
    ------
    ConfigError
        If a quotation is not closed.
    """
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides={overrides!r}: {error}") from error


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises
    ------
    ConfigError
        If one is no override.
    """
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            if "=" in text:
                wrong = f"cannot be read; a text of such characters is quoted: {_quotation(text)}"
            else:
                wrong = "is no override; write key=value, such as seed=1 or data=mnist"
            raise ConfigError(f"{text!r} {wrong}") from error
    return parsed


def check_key(
    override: Override, fields: Mapping[str, Field], groups: Mapping[str, Sequence[str]]
) -> None:
    """Refuse what Hydra would accept or explain badly: unknown and added keys, unknown options.

    ``fields`` are what every key of the configuration may be, groups of keys included; ``groups``
    the options of every group of files.

    Raises
    ------
    ConfigError
        Naming the key and what is allowed in its place.
    """
    text, key = str(override.input_line), override.key_or_group
    free = key in fields and fields[key].kind is str and not fields[key].rules
    if override.is_add() or override.is_delete():
        raise ConfigError(f"{text!r}: keys cannot be added or removed; write key=value")
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} is a sweep, which is for `fl-wb -m`; one run takes one value"
            + (f"; a text is quoted: {_quotation(text)}" if free else "")
        )
    if key in groups:
        option = override.value()
        if option not in groups[key] and not (key == "experiment" and option is None):
            raise ConfigError(
                f"{key}={option!r} must be one of: {', '.join(groups[key])}"
                + suggestion(str(option), groups[key])
            )
    elif key not in fields:
        parent = key.rpartition(".")[0]
        while parent and not any(name.startswith(f"{parent}.") for name in fields):
            parent = parent.rpartition(".")[0]
        raise ConfigError(
            f"{text!r}: there is no key {key!r}"
            + suggestion(key, [*fields, *groups])
            + f"; {f'the keys of {parent}' if parent else 'the keys'} are: "
            + ", ".join(_below(parent, [*fields, *(() if parent else groups)]))
        )
    elif free and not isinstance(value := override.value(), str | None):
        if str(value) != text.partition("=")[2]:
            raise ConfigError(f"{text!r} would be {value!r}; a text is quoted: {_quotation(text)}")
    elif is_dataclass(fields[key].kind):
        raise ConfigError(
            f"{text!r}: {key} is a group; its keys are: {', '.join(_below(key, fields))}"
        )


def quoted(text: str) -> str:
    """Return a text as Hydra's grammar takes it, whatever characters it has."""
    return "'" + text.replace("'", r"\'") + "'"


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean ...?' for a name close to one of ``names``, else nothing."""
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _quotation(override: str) -> str:
    """Return how an override is typed in a shell whose value Hydra's grammar would not read so."""
    key, _, value = override.partition("=")
    return f'{key}="{quoted(value)}"'


def _below(parent: str, keys: Iterable[str]) -> list[str]:
    """Return the names directly below a group of keys, or at the top."""
    parts = (key.rpartition(".") for key in keys)
    return sorted({name for above, _, name in parts if above == parent})
