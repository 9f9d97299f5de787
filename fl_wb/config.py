"""The configuration: conf/ composed by Hydra into typed dataclasses, checked before a run starts.

Server and clients compose the same configuration from the same overrides, which travel as one
string in Flower's run config. Defaults stand in the dataclasses, here and beside the mathematics
that they set; the YAML files of conf/ hold only what differs from them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_wb import limits
from fl_wb.barycenter import GEODESICS, STARTS, Stage
from fl_wb.datasets import DataConfig
from fl_wb.wgan import Training


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the key, the value and what is allowed."""


@dataclass
class Adaptation:
    """Stand-in until fl_wb.adaptation is there."""

    method: str = "variation"
    training: Training = field(default_factory=Training)


@dataclass
class Ternarization:
    """Stand-in until fl_wb.ternary is there."""

    iterations: int = 500
    batch_size: int = 128
    lr: float = 1e-3
    threshold_lr: float = 1e-5


@dataclass
class NetworkConfig:
    """Which networks a run trains; the same on every node.

    Attributes
    ----------
    generator
        "mlp" (8x8 digits), "conv" (compact, 28x28 and 32x32) or "dcgan" (the paper's).
    critic
        "mlp" or "dcgan".
    latent_dim
        Dimension of z.
    width
        Hidden units (mlp) or channels (conv, dcgan); None: each network's own default.
    """

    generator: str = "mlp"
    critic: str = "mlp"
    latent_dim: int = 32
    width: int | None = None


@dataclass
class StrategyConfig:
    """How the server aggregates what the sources upload.

    Attributes
    ----------
    name
        "adaptive_coalescence", or "fedavg" (Flower's own, for comparison).
    stage
        How two generators are merged (adaptive coalescence only).
    """

    name: str = "adaptive_coalescence"
    stage: Stage = field(default_factory=Stage)


@dataclass
class ClientConfig:
    """What the nodes do.

    Attributes
    ----------
    source
        How a source trains its generator on its own data.
    adaptation
        How a target adapts the barycenter to its few samples.
    ternarization
        How a target ternarizes what it adapted.
    evaluation_samples
        Samples that a generator draws to be evaluated; None: as many as are held out.
    """

    source: Training = field(default_factory=Training)
    adaptation: Adaptation = field(default_factory=Adaptation)
    ternarization: Ternarization = field(default_factory=Ternarization)
    evaluation_samples: int | None = None


@dataclass
class Config:
    """One run.

    Attributes
    ----------
    seed
        Of the training everywhere; `data.seed` deals the data out.
    rounds
        Rounds of uploading, merging and evaluating.
    output
        Absolute folder for what the run leaves; None: `from_run_config` chooses.
    device
        Where the server and the nodes train.
    data, network, strategy, client
        The groups of conf/.
    """

    seed: int = 0
    rounds: int = 1
    output: str | None = None
    device: str = "cpu"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


RULES: dict[str, limits.Rule] = {
    "seed": limits.at_least(0),
    "rounds": limits.at_least(1),
    "device": limits.DEVICE,
    "data.name": limits.one_of("digits", "idx", "images"),
    "data.sources": limits.CLASSES,
    "data.targets": limits.CLASSES,
    "samples_per_class": limits.at_least(1),
    "held_out": limits.share(),
    "network.generator": limits.one_of("mlp", "conv", "dcgan"),
    "network.critic": limits.one_of("mlp", "dcgan"),
    "latent_dim": limits.at_least(1),
    "width": limits.at_least(1),
    "strategy.name": limits.one_of("adaptive_coalescence", "fedavg"),
    "geodesic": limits.one_of(*GEODESICS),
    "start": limits.one_of(*STARTS),
    "method": limits.one_of("variation", "plain"),
    "evaluation_samples": limits.at_least(2),
    "iterations": limits.at_least(1),
    "batch_size": limits.at_least(2),
    "critic_steps": limits.at_least(1),
    "warmup": limits.at_least(0),
    "generator_lr": limits.above(0),
    "critic_lr": limits.above(0),
    "lr": limits.above(0),
    "threshold_lr": limits.at_least(0),
    "penalty": limits.at_least(0),
    "ema": limits.share(zero=True),
}

CONF = "fl_wb.conf"
SCHEMA = "schema"  # the name under which config.yaml's defaults list refers to `Config`
ConfigStore.instance().store(name=SCHEMA, node=Config)


def compose(overrides: Sequence[str] | str = ()) -> Config:
    """Compose conf/ with Hydra overrides into a checked configuration.

    Parameters
    ----------
    overrides : sequence of str, or str
        Such as ``["data=mnist", "seed=1"]``, or the same in one string, separated by spaces
        (quoted as in a shell where a value has spaces of its own).

    Raises
    ------
    ConfigError
        If a key is unknown, or a value ill-typed or out of range.
    """
    overrides = split(overrides) if isinstance(overrides, str) else list(overrides)
    for override in parse(overrides):
        _check_key(override)
    try:
        with _hydra():
            composed = hydra.compose("config", overrides)
        values = dict(_values(OmegaConf.to_container(composed)))
        wrong = limits.violations(values, RULES)
        if values["data.name"] != "digits" and values["data.root"] is None:
            wrong.append("data.root must be given: the folder of the data (data.root=FOLDER)")
        if wrong:
            raise ConfigError("; ".join(wrong))
        return cast(Config, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Compose the configuration of a run from Flower's ``context.run_config``.

    ``output`` of the run config names the output folder; where it is empty, and the overrides
    name none, that is a new folder in ``~/fl-wb``. (The working directory would say nothing: a
    SuperLink has that of whoever started it first.) Nothing is created here.

    Raises
    ------
    ConfigError
        As in `compose`, and for a folder that is not absolute: nodes work in directories of
        their own.
    """
    config = compose(str(run_config.get("overrides", "")))
    output = str(run_config.get("output", "")) or config.output
    if not output:
        output = str(Path.home() / "fl-wb" / f"{datetime.now():%Y-%m-%d/%H-%M-%S}")
    for key, folder in (("output", output), ("data.root", config.data.root)):
        if folder is not None and not Path(folder).is_absolute():
            raise ConfigError(f"{key}={folder!r} must be an absolute folder")
    config.output = output
    return config


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


def _check_key(override: Override) -> None:
    """Refuse what Hydra would accept or explain badly: unknown and added keys, unknown options."""
    text, key = override.input_line, override.key_or_group
    if override.is_add() or override.is_delete():
        raise ConfigError(f"{text!r}: keys cannot be added or removed; write key=value")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} is a sweep, which is for `fl-wb -m`; one run takes one value")
    fields, groups = _fields(), _groups()
    if key in groups:
        option = override.value()
        if option not in groups[key] and not (key == "experiment" and option is None):
            raise ConfigError(
                f"{key}={option!r} must be one of: {', '.join(groups[key])}"
                + limits.suggestion(str(option), groups[key])
            )
    elif key not in fields:
        parent = key.rpartition(".")[0]
        while parent and not any(name.startswith(f"{parent}.") for name in fields):
            parent = parent.rpartition(".")[0]
        raise ConfigError(
            f"{text!r}: there is no key {key!r}"
            + limits.suggestion(key, [*fields, *groups])
            + f"; {f'the keys of {parent}' if parent else 'the keys'} are: "
            + ", ".join(_below(parent))
        )
    elif is_dataclass(fields[key]):
        raise ConfigError(f"{text!r}: {key} is a group; its keys are: {', '.join(_below(key))}")


def _explain(error: Exception) -> str:
    """Return what Hydra or OmegaConf found, in the words of the user's keys."""
    cause: BaseException = error.__cause__ or error
    key = re.sub(r"\[.*", "", str(getattr(cause, "full_key", None) or ""))
    match = re.search(r"Error merging override (.*)", str(error))
    if match and key in _fields():
        return f"{match.group(1)}: {key} must be {_words(_fields()[key])}"
    return str(error).split("\nConfig search path")[0].replace("\n", " ")


def _words(kind: Any) -> str:
    """Return a field's type in words."""
    words = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list[list[int]]: "a list of lists of integers, such as [[0,1,2],[3,4]]",
    }
    parts = [part for part in getattr(kind, "__args__", ()) if part is not type(None)]
    if type(None) in getattr(kind, "__args__", ()):
        return f"{_words(parts[0])} or null"
    return words.get(kind, str(kind))


@cache
def _fields() -> dict[str, Any]:
    """Return the type of every key, groups of keys included."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(kind).items():
            yield prefix + name, hint
            if is_dataclass(hint):
                yield from walk(cast(type, hint), f"{prefix}{name}.")

    return dict(walk(Config, ""))


def _below(parent: str) -> list[str]:
    """Return the keys directly below a group of keys, or at the top."""
    keys = (key.rpartition(".") for key in [*_fields(), *(() if parent else _groups())])
    return sorted({name for above, _, name in keys if above == parent})


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of every setting."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@cache
def _groups() -> dict[str, list[str]]:
    """Return the groups of conf/ and the options of each."""
    return {
        folder.name: sorted(
            file.name.removesuffix(".yaml")
            for file in folder.iterdir()
            if file.name.endswith(".yaml")
        )
        for folder in resources.files(CONF).iterdir()
        if folder.is_dir() and not folder.name.startswith("_")
    }


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra for conf/, whatever else of Hydra the process has initialised already."""
    state = GlobalHydra.instance()
    before, state.hydra = state.hydra, None
    try:
        with hydra.initialize_config_module(CONF, version_base="1.3"):
            yield
    finally:
        state.hydra = before
