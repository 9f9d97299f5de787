"""Overrides such as `data=mnist` and `client.source.iterations=500`: parsed, and refused by name.

Hydra's grammar, with errors that say what would have been right.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import resources
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fl_wb.app.limits import suggestion


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
            raise ConfigError(
                f"{text!r} is no override; write key=value, such as seed=1 or data=mnist"
            ) from error
    return parsed


def check_key(
    override: Override, fields: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> None:
    """Refuse what Hydra would accept or explain badly: unknown and added keys, unknown options.

    Parameters
    ----------
    override : Override
        As parsed.
    fields : mapping
        Type of every key of the configuration, groups of keys included.
    groups : mapping
        The options of every group of files.

    Raises
    ------
    ConfigError
        Naming the key and what is allowed in its place.
    """
    text, key = override.input_line, override.key_or_group
    if override.is_add() or override.is_delete():
        raise ConfigError(f"{text!r}: keys cannot be added or removed; write key=value")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} is a sweep, which is for `fl-wb -m`; one run takes one value")
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
    elif is_dataclass(fields[key]):
        raise ConfigError(
            f"{text!r}: {key} is a group; its keys are: {', '.join(_below(key, fields))}"
        )


@cache
def option_groups(package: str) -> dict[str, list[str]]:
    """Return the groups of a package of YAML files, and the options of each."""
    return {
        folder.name: sorted(
            file.name.removesuffix(".yaml")
            for file in folder.iterdir()
            if file.name.endswith(".yaml")
        )
        for folder in resources.files(package).iterdir()
        if folder.is_dir() and not folder.name.startswith("_")
    }


def words(kind: Any) -> str:
    """Return the type of a configuration's field in words."""
    plain = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list[int]: "a list of integers, such as [1,28,28]",
        list[list[int]]: "a list of lists of integers, such as [[0,1,2],[3,4]]",
    }
    parts = [part for part in getattr(kind, "__args__", ()) if part is not type(None)]
    if type(None) in getattr(kind, "__args__", ()):
        return f"{words(parts[0])} or null"
    return plain.get(kind, str(kind))


def _below(parent: str, keys: Iterable[str]) -> list[str]:
    """Return the names directly below a group of keys, or at the top."""
    parts = (key.rpartition(".") for key in keys)
    return sorted({name for above, _, name in parts if above == parent})
