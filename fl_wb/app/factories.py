"""What server and clients of a run derive alike from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fl_wb.app.schema import Config
from fl_wb.data import datasets
from fl_wb.generators.networks import make_critic, make_generator


def factories(config: Config) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """Return what makes a run's generators and critics, which fit its data."""
    shape, network = datasets.image_shape(config.data), config.network

    def generator() -> nn.Module:
        return make_generator(
            network.generator,
            shape,
            latent_dim=network.latent_dim,
            width=network.width,
            labels=network.labels,
        )

    def critic() -> nn.Module:
        return make_critic(network.critic, shape, width=network.width)

    return generator, critic
