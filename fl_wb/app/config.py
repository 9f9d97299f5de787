"""The configuration: conf/ composed by Hydra into `fl_wb.app.schema`, checked before a run starts.

Flower's run config carries it whole to server and clients, or the overrides of which they compose
the same.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_wb.app.overrides import ConfigError, check_key, parse, split
from fl_wb.app.schema import Config, completed, missing
from fl_wb.settings import Field, fields_of, violations

CONF = "fl_wb.conf"
SEARCH = "hydra.searchpath"  # Hydra's own: where more YAML files are
SCHEMA = "schema"  # the name under which config.yaml's defaults list refers to `Config`
ConfigStore.instance().store(name=SCHEMA, node=Config)


def new_folder(folder: str) -> str:
    """Make a folder that no other run has: the one named, or the same with -2, -3, ... behind."""
    for number in itertools.count(1):
        path = Path(folder if number == 1 else f"{folder}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return str(path)
    raise AssertionError


OmegaConf.register_new_resolver("new_folder", new_folder, use_cache=True)


def compose(
    overrides: Sequence[str] | str = (), *, name: str = "config", folder: str | None = None
) -> Config:
    """Compose conf/ with Hydra overrides into a checked configuration.

    Parameters
    ----------
    overrides : sequence of str, or str
        Such as ``["data=mnist", "seed=1"]``, or the same in one string, separated by spaces
        (quoted as in a shell where a value has spaces of its own).
    name : str
        Of the file that is the root.
    folder : str, optional
        Of the user's own YAML files, as Hydra's ``--config-dir``.

    Raises
    ------
    ConfigError
        If a key is unknown, or a value ill-typed or out of range.
    """
    overrides = split(overrides) if isinstance(overrides, str) else list(overrides)
    parsed = parse(overrides)
    more = [text for text in overrides if text.startswith(f"{SEARCH}=")]
    try:
        with _hydra(folder) as loader:
            groups: dict[str, list[str]] = {g: [] for g in loader.list_groups("") if g != "hydra"}
            for group in groups.keys() & {override.key_or_group for override in parsed}:
                groups[group] = loader.get_group_options(group, config_name=name, overrides=more)
            for override in parsed:
                if override.key_or_group != SEARCH:
                    check_key(override, _fields(), groups)
            return checked(hydra.compose(name, overrides))
    except HydraException as error:
        raise ConfigError(_explain(error)) from error


def checked(values: Mapping[str, Any] | DictConfig) -> Config:
    """Return the values of a configuration, as Hydra composed it or a run config carries it.

    Raises
    ------
    ConfigError
        If a key is unknown, a value ill-typed or out of range, or one contradicts another.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), values)
        plain = cast(dict[str, Any], OmegaConf.to_container(typed, resolve=True))
        if wrong := [*violations(Config, plain), *missing(plain["data"])]:
            raise ConfigError("; ".join(wrong))
        return completed(cast(Config, OmegaConf.to_object(typed)))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    except ConfigError:
        raise
    except ValueError as error:  # of settings whose fields contradict each other
        raise ConfigError(str(error)) from error


def to_run_config(config: Config, overrides: Sequence[str]) -> dict[str, str]:
    """Return the run config with which `from_run_config` makes the same configuration.

    ``overrides`` are the user's words for it, which go into the result file.
    """
    return {
        "config": json.dumps(asdict(config)),
        "overrides": shlex.join(overrides),
        "output": config.output or "",
    }


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Return the configuration of a run, from Flower's ``context.run_config``.

    That is ``config``, a whole one in JSON, or where that is empty what ``overrides`` compose;
    ``output`` goes before its output folder.

    Raises
    ------
    ConfigError
        As in `compose`, and for a folder that is not absolute: nodes work in directories of
        their own.
    """
    carried, overrides, output = (
        str(run_config.get(key, "")) for key in ("config", "overrides", "output")
    )
    config = deepcopy(_carried(carried, overrides))
    config = replace(config, output=output or config.output)
    check_absolute(config)
    return config


@lru_cache(maxsize=1)  # a process composes for a second, and a run asks again with each message
def _carried(carried: str, overrides: str) -> Config:
    try:
        return checked(json.loads(carried)) if carried else compose(overrides)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config={carried!r} must be a configuration in JSON: {error}") from error


def check_absolute(config: Config) -> None:
    """Refuse folders that mean another one on each machine and in each working directory.

    Raises
    ------
    ConfigError
        Naming the first that is not absolute.
    """
    for key, folder in (("output", config.output), ("data.root", config.data.root)):
        if folder is not None and not Path(folder).is_absolute():
            raise ConfigError(f"{key}={folder!r} must be an absolute folder")


def _explain(error: Exception) -> str:
    """Return what Hydra or OmegaConf found, in the words of the user's keys."""
    cause: BaseException = error.__cause__ or error
    key = re.sub(r"\[.*", "", str(getattr(cause, "full_key", None) or ""))
    text = str(error).split("\nConfig search path")[0].replace("\n", " ")
    if key not in _fields():
        return text
    match = re.match(r"Error merging override (.*)", str(error))
    wrong = f"{match.group(1)} must be" if match else f"{text}: {key} must be"
    return f"{wrong} {_fields()[key].type_words}"


@cache
def _fields() -> dict[str, Field]:
    """Return what every key may be, groups of keys included."""

    def walk(kind: Any, prefix: str) -> Iterator[tuple[str, Field]]:
        for name, found in fields_of(kind).items():
            yield prefix + name, found
            if is_dataclass(found.kind):
                yield from walk(found.kind, f"{prefix}{name}.")

    return dict(walk(Config, ""))


class _ConfigDir(SearchPathPlugin):
    """Looks for YAML files where `hydra.main` does for ``--config-dir``: behind conf/."""

    folder: ClassVar[str | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder:
            search_path.append("command-line", f"file://{Path(self.folder).absolute()}")


@contextmanager
def _hydra(folder: str | None) -> Iterator[ConfigLoader]:
    """Initialise Hydra for conf/, whatever else of Hydra the process has initialised already."""
    Plugins.instance().register(_ConfigDir)
    before, _ConfigDir.folder = GlobalHydra.instance().hydra, folder
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_module(CONF, version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra, _ConfigDir.folder = before, None
