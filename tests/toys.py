"""Tiny networks, settings and ClientApps that the Flower tests share."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fl_wb.adaptation import Adaptation
from fl_wb.barycenter import Stage
from fl_wb.generators.networks import MLPCritic, MLPGenerator
from fl_wb.ternary import Ternarization
from fl_wb.training.distillation import Distillation
from fl_wb.training.wgan import Training

SHAPE = (1, 4, 4)
STAGE = Stage(
    distillation=Distillation(iterations=3, batch_size=8),
    training=Training(iterations=2, batch_size=8, critic_steps=1, warmup=1),
)
TRAINING = Training(iterations=2, batch_size=8, critic_steps=1)
ADAPTATION = Adaptation(training=Training(iterations=2, batch_size=8, critic_steps=1, warmup=1))
TERNARIZATION = Ternarization(iterations=2, batch_size=8)


def generator() -> nn.Module:
    return MLPGenerator(SHAPE, latent_dim=4, width=8)


def critic() -> nn.Module:
    return MLPCritic(SHAPE, width=8)


def seeded_state(seed: int) -> dict[str, torch.Tensor]:
    """State of a generator that depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(generator().state_dict())


def initial_arrays() -> ArrayRecord:
    return ArrayRecord(seeded_state(0))


def uploads(app: ClientApp, weights: dict[int, float] | None = None) -> None:
    """Register a train function that uploads the generator of the node's own seed."""

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weight = (weights or {}).get(context.node_id, 1.0)
        return reply(message, ArrayRecord(seeded_state(context.node_id)), weight)


def reply(message: Message, arrays: ArrayRecord, weight: float = 1.0) -> Message:
    """Reply as FedAvg wants it."""
    metrics = MetricRecord({"num-examples": weight, "loss": 0.5})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def evaluates(app: ClientApp) -> None:
    """Register an evaluate function that reports the mean of all weights."""

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        mean = torch.cat([value.flatten() for value in state.values()]).mean()
        metrics = MetricRecord({"num-examples": 1, "mean": float(mean)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)


def answers_role(app: ClientApp) -> None:
    """Register a query function that answers the ``role`` of the node's configuration."""

    @app.query()
    def query(message: Message, context: Context) -> Message:
        role = ConfigRecord({"role": str(context.node_config.get("role", "both"))})
        return Message(RecordDict({"config": role}), reply_to=message)
