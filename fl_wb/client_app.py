"""The ClientApp: a node is a source, a target, both, or takes no part.

In a simulation the first partitions are the configuration's sources and the next its targets. In
a deployment a node's ``node_config`` may say ``role`` ("source", "target", "both"); its
``partition-id`` then counts the nodes of that role, and names the data that it has.
"""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_wb import datasets, records
from fl_wb.clients import FastAdaptation, source_train, target_evaluate
from fl_wb.config import Config, from_run_config
from fl_wb.metrics import train_features
from fl_wb.task import factories
from fl_wb.tracking import progress

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the server's question for this node's role."""
    role, _ = place(context, from_run_config(context.run_config))
    content = RecordDict({records.CONFIG: ConfigRecord({records.ROLE: role})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a generator on this source's data."""
    config, index = _prepare(context)
    generator, critic = factories(config)
    content = source_train(
        message,
        context,
        generator=generator,
        critic=critic,
        samples=lambda: datasets.source_samples(config.data, index).images,
        training=config.client.source,
        # A barycenter merges generators that are finished; averaging needs them to grow together.
        again=config.strategy.name == "fedavg",
        seed=_seed(config, index),
        device=config.device,
        callback=progress(f"source {index}"),
    )
    content[records.INFO] = ConfigRecord({records.PARTITION: index})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Adapt the barycenter to this target's few samples, ternarize it, and evaluate each step."""
    config, index = _prepare(context)
    generator, critic = factories(config)
    everything, _ = datasets.load(config.data)
    content = target_evaluate(
        message,
        context,
        FastAdaptation(
            generator,
            lambda _: datasets.target_samples(config.data, index).images,
            critic=critic,
            adaptation=config.client.adaptation,
            ternarization=config.client.ternarization,
            seed=_seed(config, len(config.data.sources) + index),
            device=config.device,
        ),
        datasets.held_out(config.data, config.data.targets[index]).images,
        train_features(everything.images, everything.labels),
        config.client.evaluation_samples,
    )
    content.config_records[records.INFO][records.PARTITION] = index
    return Message(content, reply_to=message)


def place(context: Context, config: Config) -> tuple[str, int]:
    """Return a node's role, and its number among the nodes of that role.

    Raises
    ------
    ValueError
        If its ``node_config`` says nothing, or nonsense.
    """
    node, partition = context.node_config, context.node_config.get("partition-id")
    if not isinstance(partition, int) or partition < 0:
        raise ValueError(
            f"node {context.node_id}: node_config {dict(node)} needs a partition-id (0, 1, ...), "
            "which says what data it has"
        )
    role = node.get("role")
    if role is not None:
        if role not in records.ROLES:
            raise ValueError(
                f"node {context.node_id}: role={role!r} is not one of {', '.join(records.ROLES)}"
            )
        return str(role), partition
    sources, targets = len(config.data.sources), len(config.data.targets)
    if partition < sources:
        return records.SOURCE, partition
    if partition < sources + targets:
        return records.TARGET, partition - sources
    return records.NONE, partition


def _prepare(context: Context) -> tuple[Config, int]:
    """Return the run's configuration and the node's number, with one thread for computing."""
    torch.set_num_threads(1)  # nodes share the cores; and results are the same bit for bit
    config = from_run_config(context.run_config)
    return config, place(context, config)[1]


def _seed(config: Config, node: int) -> int:
    return config.seed + 7919 * (node + 1)  # apart from other nodes' seeds and other runs'
