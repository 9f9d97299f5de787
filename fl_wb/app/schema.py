"""What a run can be set to: typed dataclasses, and what one setting says about another.

Defaults and ranges stand here and beside the mathematics that they set; the YAML files of conf/
hold only what differs from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fl_wb.adaptation import WEIGHTS, Adaptation
from fl_wb.app.overrides import ConfigError
from fl_wb.barycenter import Stage
from fl_wb.data.datasets import DataConfig
from fl_wb.messages.weights import MAX_SHARE
from fl_wb.metrics import Evaluation
from fl_wb.persistence.stage_store import SECONDS_BETWEEN_CHECKPOINTS
from fl_wb.settings import Rule, Settings, above, at_least, one_of
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
        How generators are merged (adaptive coalescence only).
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
    share_adapted
        Whether a target offers its adapted generator as a source from the next round on; not below
        `min_memorization`, nor of a node that asks for privacy. It tells much of few samples: a
        node with data of its own offers nothing unless its own ``node_config`` says
        ``share-adapted=true``.
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
    share_adapted: bool = False
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


def missing(data: Mapping[str, Any]) -> Iterator[str]:
    """Say what the data set cannot do without."""
    if data["name"] in ("idx", "images") and not (data["root"] or data["shape"]):
        yield (
            "data.root must be given: the folder of the data (data.root=FOLDER); or "
            "data.shape, where every node has data of its own"
        )
    if data["name"] == "hub" and not data["dataset"]:
        yield "data.dataset must be given, such as uoft-cs/cifar10"


def completed(config: Config) -> Config:
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
    for key, only in (("screening", "adaptive_coalescence"), ("source", "transfer")):
        value = getattr(config.strategy, key)
        if value and config.strategy.name != only:
            raise ConfigError(
                f"strategy.{key}={value} is for strategy={only}, not {config.strategy.name}, which "
                "would ignore it"
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
    if config.client.share_adapted and config.rounds < 2:
        raise ConfigError(
            f"client.share_adapted=true needs rounds of 2 or more, not {config.rounds}: what a "
            "target adapts in one round is merged in the next"
        )
    if config.client.share_adapted and config.client.privacy.epsilon is not None:
        raise ConfigError(
            f"client.share_adapted=true is not with client.privacy.epsilon="
            f"{config.client.privacy.epsilon}: nothing promises what a target adapted to be private"
        )
    if config.client.share_adapted and config.strategy.name == "ensemble":
        raise ConfigError(
            "client.share_adapted=true is not for strategy=ensemble, whose targets adapt all "
            "generators together"
        )
    sizes = data.source_samples_per_class
    if sizes is not None and len(sizes) != data.source_count:
        raise ConfigError(
            f"data.source_samples_per_class={sizes} must have one number for each of the "
            f"{data.source_count} sources"
        )
    return config
