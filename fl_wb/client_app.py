"""The ClientApp: a node is a source, a target, both, or takes no part.

In a simulation the first partitions are the configuration's sources and the next its targets. In
a deployment a node's ``node_config`` may say

- ``role``: "source", "target" or "both"; ``partition-id`` then counts the nodes of that role;
- ``data``: the folder of this node's own IDX files or pictures, in place of a part of the run's
  data; it needs no ``partition-id``;
- ``cache``: a folder in which a source keeps its generator for later runs;
- ``device``: where this node trains, in place of the run's ``device``;
- ``epsilon``: the most that a source spends of `fl_wb.training.privacy.Privacy` in one training,
  whatever the run says;
- ``min-memorization``: the least memorization of a generator that a source uploads, likewise;
- ``share-adapted``: true lets a run with ``client.share_adapted=true`` have what this target
  adapted to its own samples, which a node with ``data`` else keeps;
- ``send-few-pictures``: true lets a run with ``client.send_few_pictures=true`` have pictures of
  this node's own samples, which a node with ``data`` else refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_wb.app.config import from_run_config
from fl_wb.app.factories import factories
from fl_wb.app.schema import Config
from fl_wb.clients import source_train, target_evaluate
from fl_wb.clients.discretion import Refused, discreet
from fl_wb.clients.sharing import offers, shared
from fl_wb.data import datasets
from fl_wb.data.samples import Samples
from fl_wb.generators.mixture import fitting
from fl_wb.messages import keys
from fl_wb.metrics import inception_features, train_features
from fl_wb.persistence.stage_store import StageStore
from fl_wb.reporting.progress import progress
from fl_wb.training.privacy import Privacy

app = ClientApp(mods=[discreet])


NODE_KEYS = (
    "partition-id",
    "num-partitions",
    "role",
    "data",
    "cache",
    "device",
    "epsilon",
    "min-memorization",
    "share-adapted",
    "send-few-pictures",
)
"""Of ``node_config``, that mean something here; other apps may have others."""


@dataclass(frozen=True)
class Place:
    """What a node is in a run.

    Attributes
    ----------
    role
        One of `keys.ROLES`.
    index
        Its number among the nodes of that role, and 0 of a node with data of its own and no number.
        The seed is made of it, and so it is nothing of the data: whoever knows the seed of a
        network's first weights knows it from what becomes of them.
    number
        What it says to the server of it: its ``partition-id``, if it has one.
    data
        The folder of its own data; None: its part of the run's.
    cache
        The folder of what it keeps between runs; None: nothing.
    device
        Where it trains.
    """

    role: str
    index: int
    number: int | None
    data: str | None
    cache: str | None
    device: str


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the server's question for this node's role, in this round where that matters."""
    config = from_run_config(context.run_config)
    node = place(context, config)
    answer = ConfigRecord({keys.ROLE: node.role})
    if config.data.in_turn or (config.client.share_adapted and node.role == keys.TARGET):
        asked = message.content.config_records[keys.CONFIG].get("server-round", 1)
        assert isinstance(asked, int)
        role = _role_in(asked, node, config, context)
        answer = ConfigRecord({keys.ROLE: role, keys.AGAIN: True})
    return Message(RecordDict({keys.CONFIG: answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a generator on this source's data, or hand on what a target adapted."""
    config, node = _prepare(context, keys.TARGET if offers(context) else keys.SOURCE)
    content = shared(context) if offers(context) else _trained(message, context, config, node)
    content[keys.INFO] = ConfigRecord(_said(node))
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Adapt the barycenter to this target's few samples, ternarize it, and evaluate each step."""
    config, node = _prepare(context, keys.TARGET)
    generator, critic = factories(config)
    few, held_out, features = _target_samples(config, node)
    conditional = config.network.labels is not None
    arrays = message.content.array_records.get(keys.ARRAYS, ArrayRecord())
    shapes = {name: array.shape for name, array in arrays.items()}
    content = target_evaluate(
        message,
        context,
        generator=lambda: fitting(shapes, generator),  # an ensemble's model is one of several
        few=few.images,
        held_out=held_out.images,
        labels=config.network.labels,
        few_labels=few.labels if conditional else None,
        held_out_labels=held_out.labels if conditional else None,
        real=_real(config, node) if conditional else None,
        critic=critic,
        weights=config.client.weights,
        adaptation=config.client.adaptation,
        ternarization=config.client.ternarization if config.client.ternarize else None,
        features=features,
        evaluation=config.client.evaluation,
        send_few=config.client.send_few_pictures,
        share=_shares(config, context, node),
        min_memorization=_min_memorization(config, context),
        seed=_seed(config, config.data.source_count + node.index),
        device=node.device,
    )
    content.config_records[keys.INFO].update(_said(node))
    return Message(content, reply_to=message)


def _trained(message: Message, context: Context, config: Config, node: Place) -> RecordDict:
    generator, critic = factories(config)
    privacy = _privacy(config, context)
    return source_train(
        message,
        context,
        generator=generator,
        critic=critic,
        samples=lambda: _source_samples(config, node, privacy.epsilon is not None),
        settings=config.client.source,
        labels=config.network.labels,
        privacy=privacy,
        min_memorization=_min_memorization(config, context),
        # A barycenter merges generators that are finished; averaging needs them to grow together.
        again=config.strategy.name == "fedavg",
        send_critic=config.strategy.critic,
        store=StageStore(Path(node.cache) / f"source-{node.index}") if node.cache else None,
        seed=_seed(config, node.index),
        device=node.device,
        callback=progress(f"source {node.index}"),
    )


def _role_in(asked: int, node: Place, config: Config, context: Context) -> str:
    """Return what a node plays in a round."""
    turn = node.index + 1
    trains, evaluates = (node.role in (role, keys.BOTH) for role in (keys.SOURCE, keys.TARGET))
    shares = config.client.share_adapted and offers(context)
    if config.data.in_turn:
        stays = turn == len(config.data.targets) and asked > turn
        trains, evaluates = trains and asked == turn, evaluates and (asked == turn or stays)
        shares = shares and asked == turn + 1
    played = {(True, True): keys.BOTH, (True, False): keys.SOURCE, (False, True): keys.TARGET}
    return played.get((trains or shares, evaluates), keys.NONE)


def place(context: Context, config: Config) -> Place:
    """Return what a node is: its role, its number, its folders and its device.

    Raises
    ------
    ValueError
        If its ``node_config`` says too little, or nonsense.
    """
    node, partition = context.node_config, context.node_config.get("partition-id")
    for key in node.keys() - set(NODE_KEYS):  # a misspelt limit would be none
        if meant := get_close_matches(key.lower().replace("_", "-"), NODE_KEYS, 1, 0.8):
            raise ValueError(
                f"node {context.node_id}: its node_config has {key!r}: is {meant[0]!r} meant? Keys "
                f"are {', '.join(NODE_KEYS)}; others have to be less like these"
            )
    data, cache = (_folder(context, key) for key in ("data", "cache"))
    number = partition if isinstance(partition, int) else None
    if config.client.send_few_pictures and data and node.get("send-few-pictures") is not True:
        raise Refused(
            f"node {context.node_id} has data of its own, of which client.send_few_pictures=true "
            "would send pictures: run without it, or start the node with "
            "--node-config send-few-pictures=true"
        )
    if partition is None and data is not None:
        partition = 0
    if not isinstance(partition, int) or partition < 0:
        raise ValueError(
            f"node {context.node_id}: its node_config needs a partition-id (0, 1, ...), which says "
            "what part of the run's data it has, or data, a folder of its own"
        )
    device = str(node.get("device", config.device))
    role = node.get("role", None if data is None else _role_of_own(config, context))
    if role is None:
        sources, targets = config.data.source_count, len(config.data.targets)
        role = keys.SOURCE if partition < sources else keys.NONE
        if sources <= partition < sources + targets:
            role, partition = keys.TARGET, partition - sources
            number = partition
    if role not in keys.ROLES:
        raise ValueError(
            f"node {context.node_id}: role={role!r} is not one of {', '.join(keys.ROLES)}"
        )
    return Place(str(role), partition, number, data, cache, device)


def _shares(config: Config, context: Context, node: Place) -> bool:
    """Return whether this node offers what it adapts: a target that asks for no privacy."""
    willing = node.data is None or context.node_config.get("share-adapted") is True
    private = _privacy(config, context).epsilon is not None
    return config.client.share_adapted and node.role == keys.TARGET and willing and not private


def _role_of_own(config: Config, context: Context) -> str:
    """Return what a node with data of its own is unless it says it: both, if nothing is kept back.

    What a target makes of its samples, it makes without noise and unmeasured.
    """
    limits = (_privacy(config, context).epsilon, _min_memorization(config, context))
    return keys.BOTH if limits == (None, None) else keys.SOURCE


def _privacy(config: Config, context: Context) -> Privacy:
    """Return the stricter of what the run and the node itself say of epsilon."""
    said = [config.client.privacy.epsilon, _limit(context, "epsilon")]
    return replace(
        config.client.privacy, epsilon=min((e for e in said if e is not None), default=None)
    )


def _min_memorization(config: Config, context: Context) -> float | None:
    """Return the stricter of what the run and the node itself say of memorization."""
    said = [config.client.min_memorization, _limit(context, "min-memorization")]
    return max((m for m in said if m is not None), default=None)


def _limit(context: Context, key: str) -> float | None:
    value = context.node_config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"node {context.node_id}: {key}={value!r} must be more than 0")
    return float(value)


def _folder(context: Context, key: str) -> str | None:
    folder = context.node_config.get(key)
    if folder is None or Path(str(folder)).is_absolute():
        return None if folder is None else str(folder)
    raise ValueError(f"node {context.node_id}: {key}={folder!r} must be an absolute folder")


def _source_samples(config: Config, node: Place, private: bool) -> Tensor | tuple[Tensor, Tensor]:
    if node.data is None:
        own = datasets.source_samples(config.data, node.index)
    else:
        own, kept = datasets.load_own(node.data, config.data)
        if private:  # which part is kept is drawn, and one sample more draws another
            own = Samples(
                torch.cat([own.images, kept.images]), torch.cat([own.labels, kept.labels])
            )
    return own.images if config.network.labels is None else (own.images, own.labels)


def _target_samples(
    config: Config, node: Place
) -> tuple[Samples, Samples, Callable[[Tensor], Tensor] | None]:
    """Return a target's few samples, its held-out ones, and in what features it compares."""
    if node.data is None:
        few = datasets.target_samples(config.data, node.index)
        held_out = datasets.held_out(config.data, config.data.targets[node.index])
    else:
        few, held_out = datasets.load_own(node.data, config.data)
    if config.client.features == "inception":
        return few, held_out, inception_features()
    if config.client.features == "pixels" or node.data is not None:
        # A node's own few images train no classifier.
        return few, held_out, None
    everything, _ = datasets.load(config.data)
    return few, held_out, train_features(everything.images, everything.labels)


def _real(config: Config, node: Place) -> tuple[Tensor, Tensor] | None:
    """Return the run's training data of a target's classes, as far as they are known."""
    if node.data is not None:
        return None
    everything, _ = datasets.load(config.data)
    classes = torch.tensor(config.data.targets[node.index])
    own = everything[torch.isin(everything.labels, classes)]
    return own.images, own.labels


def _prepare(context: Context, role: str) -> tuple[Config, Place]:
    """Return the run's configuration and what this node is, with one thread for computing.

    Raises
    ------
    ValueError
        If the node has another role than the one that it is asked to play.
    """
    torch.set_num_threads(1)  # nodes share the cores; and results are the same bit for bit
    config = from_run_config(context.run_config)
    node = place(context, config)
    if node.role not in (role, keys.BOTH):
        raise ValueError(f"node {context.node_id} has the role {node.role!r}, not {role!r}")
    return config, node


def _said(node: Place) -> dict[str, ConfigRecordValues]:
    return {} if node.number is None else {keys.PARTITION: node.number}


def _seed(config: Config, node: int) -> int:
    return config.seed + 7919 * (node + 1)  # apart from other nodes' seeds and other runs'
