"""The configuration: conf/ composed by Hydra into typed dataclasses, checked before a run starts.

Server and clients compose the same configuration from the same overrides, which travel as one
string in Flower's run config. Defaults stand in the dataclasses, here and beside the mathematics
that they set; the YAML files of conf/ hold only what differs from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_wb.adaptation import METHODS, Adaptation
from fl_wb.app import limits
from fl_wb.app.overrides import ConfigError as ConfigError
from fl_wb.app.overrides import check_key, option_groups, parse, split, words
from fl_wb.barycenter import GEODESICS, STARTS, Stage
from fl_wb.data.datasets import NAMES, DataConfig
from fl_wb.metrics import Evaluation
from fl_wb.persistence.stage_store import SECONDS_BETWEEN_CHECKPOINTS
from fl_wb.ternary import Ternarization
from fl_wb.training.wgan import Training

STRATEGIES = ("adaptive_coalescence", "fedavg", "transfer", "ensemble", "edge_only")


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
        "adaptive_coalescence", or a baseline: "fedavg" (Flower's own), "transfer" (one source's
        generator), "ensemble" (all of them, pooled), "edge_only" (a fresh network).
    source
        Whose generator "transfer" hands on: its number in data.sources.
    critic
        Whether "transfer" hands on that source's critic, too, with which a target then begins.
    stage
        How two generators are merged (adaptive coalescence only).
    patience
        A node whose upload is dropped so many rounds in a row is not asked again; None: it is.
    screening
        Drop uploads that collapsed, or are this many times further from the others than is
        typical; 3 measured well. None: off.
    checkpoint_seconds
        A server that is killed loses no more of its stage than this.
    """

    name: str = "adaptive_coalescence"
    source: int = 0
    critic: bool = False
    patience: int | None = 3
    screening: float | None = None
    checkpoint_seconds: float = SECONDS_BETWEEN_CHECKPOINTS
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
    ternarize
        Whether a target ternarizes what it adapted; `ternarization` says how.
    evaluation
        How a target compares its generators with held-out samples.
    features
        In what samples are compared: "classifier" (a small one, trained on the run's data),
        "inception" (for natural RGB images; pip install "fl-wb[inception]") or "pixels".
    """

    source: Training = field(default_factory=lambda: Training(generator_lr=5e-4))
    adaptation: Adaptation = field(default_factory=Adaptation)
    ternarize: bool = True
    ternarization: Ternarization = field(default_factory=Ternarization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    features: str = "classifier"


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
    superlink
        Name of a connection in Flower's configuration, to run on its SuperLink and SuperNodes;
        None: a simulation.
    nodes
        How many to wait for; None: one for each of data.sources and data.targets.
    timeout
        Seconds that nodes have to answer in a round; who is later is left out of it.
    data, network, strategy, client
        The groups of conf/.
    """

    seed: int = 0
    rounds: int = 1
    output: str | None = None
    device: str = "cpu"
    superlink: str | None = None
    nodes: int | None = None
    timeout: float = 3600.0
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


RULES: dict[str, limits.Rule] = {
    "seed": limits.at_least(0),
    "rounds": limits.at_least(1),
    "device": limits.DEVICE,
    "nodes": limits.at_least(1),
    "timeout": limits.above(0),
    "data.name": limits.one_of(*NAMES),
    "limit": limits.at_least(2),
    "data.sources": limits.CLASSES,
    "data.targets": limits.CLASSES,
    "data.shape": limits.SHAPE,
    "samples_per_class": limits.at_least(1),
    "held_out": limits.share(),
    "network.generator": limits.one_of("mlp", "conv", "dcgan"),
    "network.critic": limits.one_of("mlp", "dcgan"),
    "latent_dim": limits.at_least(1),
    "width": limits.at_least(1),
    "strategy.name": limits.one_of(*STRATEGIES),
    "strategy.source": limits.at_least(0),
    "strategy.critic": limits.SWITCH,
    "patience": limits.at_least(1),
    "screening": limits.above(1),
    "checkpoint_seconds": limits.at_least(0),
    "geodesic": limits.one_of(*GEODESICS),
    "start": limits.one_of(*STARTS),
    "method": limits.one_of(*METHODS),
    "anchor": limits.at_least(0),
    "fidelity": limits.at_least(0),
    "energy": limits.at_least(0),
    "client.evaluation.samples": limits.at_least(2),
    "draws": limits.at_least(1),
    "bank": limits.SWITCH,
    "ternarize": limits.SWITCH,
    "fresh": limits.SWITCH,
    "pooled": limits.SWITCH,
    "source_samples_per_class": limits.COUNTS,
    "snapshots": limits.at_least(0),
    "features": limits.one_of("classifier", "inception", "pixels"),
    "iterations": limits.at_least(1),
    "batch_size": limits.at_least(2),
    "critic_steps": limits.at_least(1),
    "warmup": limits.at_least(0),
    "generator_lr": limits.above(0),
    "critic_lr": limits.above(0),
    "lr": limits.above(0),
    "threshold_lr": limits.at_least(0),
    "planes": limits.Rule(lambda planes: 1 <= planes <= 3, "1, 2 or 3"),
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
        check_key(override, _fields(), option_groups(CONF))
    try:
        with _hydra():
            composed = hydra.compose("config", overrides)
        values = dict(_values(OmegaConf.to_container(composed, resolve=True)))
        wrong = limits.violations(values, RULES)
        here = values["data.name"] in ("digits", "hub")
        if not (here or values["data.root"] or values["data.shape"]):
            wrong.append(
                "data.root must be given: the folder of the data (data.root=FOLDER); or "
                "data.shape, where every node has data of its own"
            )
        if values["data.name"] == "hub" and not values["data.dataset"]:
            wrong.append("data.dataset must be given, such as uoft-cs/cifar10")
        if wrong:
            raise ConfigError("; ".join(wrong))
        return _completed(cast(Config, OmegaConf.to_object(composed)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _completed(config: Config) -> Config:
    """Fill in what one setting says about another, and refuse what contradicts another."""
    data, number = config.data, config.strategy.source
    if data.pooled:
        data.sources = [sorted({label for classes in data.targets for label in classes})]
    if number >= len(data.sources):
        raise ConfigError(
            f"strategy.source={number} must be less than {len(data.sources)}, the number of "
            "data.sources: they are counted from 0"
        )
    if config.strategy.critic and config.strategy.name != "transfer":
        raise ConfigError(
            "strategy.critic=true is for strategy=transfer: the others have no single source's"
        )
    sizes = data.source_samples_per_class
    if sizes is not None and len(sizes) != len(data.sources):
        raise ConfigError(
            f"data.source_samples_per_class={sizes} must have one number for each of the "
            f"{len(data.sources)} data.sources"
        )
    return config


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
    config.output = output
    check_absolute(config)
    return config


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
    match = re.search(r"Error merging override (.*)", str(error))
    if match and key in _fields():
        return f"{match.group(1)}: {key} must be {words(_fields()[key])}"
    return str(error).split("\nConfig search path")[0].replace("\n", " ")


@cache
def _fields() -> dict[str, Any]:
    """Return the type of every key, groups of keys included."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(kind).items():
            yield prefix + name, hint
            if is_dataclass(hint):
                yield from walk(cast(type, hint), f"{prefix}{name}.")

    return dict(walk(Config, ""))


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of every setting."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra for conf/, whatever else of Hydra the process has initialised already."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_module(CONF, version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before
