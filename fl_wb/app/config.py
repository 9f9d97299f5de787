"""The configuration: conf/ composed by Hydra into typed dataclasses, checked before a run starts.

Flower's run config carries it whole to server and clients, or the overrides of which they compose
the same. Defaults and ranges stand in the dataclasses, here and beside the mathematics
that they set; the YAML files of conf/ hold only what differs from them.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

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

from fl_wb.adaptation import WEIGHTS, Adaptation
from fl_wb.app.overrides import ConfigError as ConfigError
from fl_wb.app.overrides import check_key, parse, split
from fl_wb.barycenter import Stage
from fl_wb.data.datasets import DataConfig
from fl_wb.messages.weights import MAX_SHARE
from fl_wb.metrics import Evaluation
from fl_wb.persistence.stage_store import SECONDS_BETWEEN_CHECKPOINTS
from fl_wb.settings import Field, Rule, Settings, above, at_least, fields_of, one_of, violations
from fl_wb.ternary import Ternarization
from fl_wb.training.privacy import Privacy
from fl_wb.training.wgan import Training

STRATEGIES = ("adaptive_coalescence", "fedavg", "transfer", "ensemble", "edge_only")
DEVICE = Rule(
    lambda device: re.fullmatch(r"cpu|mps|cuda(:\d+)?", device) is not None,
    "cpu, mps, cuda, or one CUDA device such as cuda:1",
)


@dataclass
class NetworkConfig(Settings):
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
    labels
        Make conditional generators: so many labels, the classes 0, 1, ... of the data; None: the
        generators know none.
    """

    generator: Annotated[str, one_of("mlp", "conv", "dcgan")] = "mlp"
    critic: Annotated[str, one_of("mlp", "dcgan")] = "mlp"
    latent_dim: Annotated[int, at_least(1)] = 32
    width: Annotated[int, at_least(1)] | None = None
    labels: Annotated[int, at_least(1)] | None = None


@dataclass
class StrategyConfig(Settings):
    """How the server aggregates what the sources upload.

    Attributes
    ----------
    name
        "adaptive_coalescence", or a baseline: "fedavg" (Flower's own), "transfer" (one source's
        generator), "ensemble" (all of them, pooled), "edge_only" (a fresh network).
    source
        Whose generator "transfer" hands on: its number among the sources.
    critic
        Whether "transfer" hands on that source's critic, too, with which a target then begins.
    stage
        How two generators are merged (adaptive coalescence only).
    patience
        A node whose upload is dropped so many rounds in a row is not asked again; None: it is.
    screening
        Drop uploads that collapsed, or are this many times further from the others than is
        typical; 3 measured well. None: off.
    max_share
        No source weighs more than this many times the mean of the others, whatever it says.
    checkpoint_seconds
        A server that is killed loses no more of its stage than this.
    """

    name: Annotated[str, one_of(*STRATEGIES)] = "adaptive_coalescence"
    source: Annotated[int, at_least(0)] = 0
    critic: bool = False
    patience: Annotated[int, at_least(1)] | None = 3
    screening: Annotated[float, above(1)] | None = None
    max_share: Annotated[float, at_least(1)] = MAX_SHARE
    checkpoint_seconds: Annotated[float, at_least(0)] = SECONDS_BETWEEN_CHECKPOINTS
    stage: Stage = field(default_factory=Stage)


@dataclass
class ClientConfig(Settings):
    """What the nodes do.

    Attributes
    ----------
    source
        How a source trains its generator on its own data.
    privacy
        Whether it trains with differential privacy: `privacy.epsilon` says how much.
    min_memorization
        Whether it measures what its generator memorised of its data, on a fifth that it does not
        train on, and uploads nothing below this: about 1 if nothing, 0 for copies. None: it does
        not.
    adaptation
        How a target adapts the barycenter to its few samples.
    ternarize
        Whether a target ternarizes what it adapted; `ternarization` says how.
    weights
        Which barycenter a target starts from, where the server says what cells there are:
        "fitted" to its few samples, "radius" (inverse, as in the paper), "uniform", or the
        sources' own "shares"; see `fl_wb.adaptation.fit_weights`.
    evaluation
        How a target compares its generators with held-out samples.
    features
        In what samples are compared: "classifier" (a small one, trained on the run's data),
        "inception" (for natural RGB images; pip install "fl-wb[inception]") or "pixels".
    send_few_pictures
        Whether a target sends pictures of its few real samples to the server, which shows them: for
        simulations of public data. A node with data of its own refuses, unless its own
        ``node_config`` says ``send-few-pictures=true``.
    """

    source: Training = field(default_factory=lambda: Training(generator_lr=5e-4))
    privacy: Privacy = field(default_factory=Privacy)
    min_memorization: Annotated[float, above(0)] | None = None
    adaptation: Adaptation = field(default_factory=Adaptation)
    weights: Annotated[str, one_of(*WEIGHTS)] = "fitted"
    ternarize: bool = True
    ternarization: Ternarization = field(default_factory=Ternarization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    features: Annotated[str, one_of("classifier", "inception", "pixels")] = "classifier"
    send_few_pictures: bool = False


@dataclass
class Config(Settings):
    """One run.

    Attributes
    ----------
    seed
        Of the training everywhere; `data.seed` deals the data out.
    rounds
        Rounds of uploading, merging and evaluating.
    output
        Absolute folder for what the run leaves; None: a new one.
    device
        Where the server and the nodes train.
    superlink
        Name of a connection in Flower's configuration, to run on its SuperLink and SuperNodes;
        None: a simulation.
    nodes
        How many to wait for; None: one for each source and each target.
    timeout
        Seconds that nodes have to answer in a round; who is later is left out of it.
    data, network, strategy, client
        The groups of conf/.
    """

    seed: Annotated[int, at_least(0)] = 0
    rounds: Annotated[int, at_least(1)] = 1
    output: str | None = None
    device: Annotated[str, DEVICE] = "cpu"
    superlink: str | None = None
    nodes: Annotated[int, at_least(1)] | None = None
    timeout: Annotated[float, above(0)] = 3600.0
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)


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
        if wrong := [*violations(Config, plain), *_missing(plain["data"])]:
            raise ConfigError("; ".join(wrong))
        return _completed(cast(Config, OmegaConf.to_object(typed)))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def _missing(data: Mapping[str, Any]) -> Iterator[str]:
    """Say what the data set cannot do without."""
    if data["name"] in ("idx", "images") and not (data["root"] or data["shape"]):
        yield (
            "data.root must be given: the folder of the data (data.root=FOLDER); or "
            "data.shape, where every node has data of its own"
        )
    if data["name"] == "hub" and not data["dataset"]:
        yield "data.dataset must be given, such as uoft-cs/cifar10"


def _completed(config: Config) -> Config:
    """Fill in what one setting says about another, and refuse what contradicts another."""
    data, number = config.data, config.strategy.source
    if data.pooled:
        data.sources = [sorted({label for classes in data.targets for label in classes})]
    if data.partition == "classes" and data.num_sources is not None:
        raise ConfigError(
            f"data.num_sources={data.num_sources} is for the other partitions; of "
            "data.partition=classes there are as many sources as data.sources lists"
        )
    if number >= data.source_count:
        raise ConfigError(
            f"strategy.source={number} must be less than {data.source_count}, the number of "
            "sources: they are counted from 0"
        )
    if config.strategy.critic and config.strategy.name != "transfer":
        raise ConfigError(
            "strategy.critic=true is for strategy=transfer: the others have no single source's"
        )
    if config.network.labels is not None and (
        config.strategy.critic or config.strategy.name == "ensemble"
    ):
        raise ConfigError(
            f"network.labels={config.network.labels} is for none of strategy=ensemble and "
            "strategy.critic=true: their networks know no labels"
        )
    if config.network.labels is not None and config.client.privacy.epsilon is not None:
        raise ConfigError(
            f"network.labels={config.network.labels} is not with client.privacy.epsilon: how often "
            "a source has each label would be told as it is"
        )
    if config.client.privacy.epsilon is not None and config.strategy.name == "fedavg":
        raise ConfigError(
            f"client.privacy.epsilon={config.client.privacy.epsilon} is not for strategy=fedavg, "
            "whose sources train in every round and would spend it again in each"
        )
    sizes = data.source_samples_per_class
    if sizes is not None and len(sizes) != data.source_count:
        raise ConfigError(
            f"data.source_samples_per_class={sizes} must have one number for each of the "
            f"{data.source_count} sources"
        )
    return config


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
    try:
        config = checked(json.loads(carried)) if carried else compose(overrides)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config={carried!r} must be a configuration in JSON: {error}") from error
    config = replace(config, output=output or config.output)
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
