"""Generators and critics, and how samples are drawn from a generator.

A generator is any ``nn.Module`` that maps latents (n, latent_dim) to samples (n, ...) and has
an attribute ``latent_dim``; a critic any ``nn.Module`` that maps samples (n, ...) to (n,) or
(n, 1). The networks here are the shipped defaults; a user's own work unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fl_wb.generators.sampling import latent_dim_of

SLOPE = 0.2  # of the critics' LeakyReLU


class MLPGenerator(nn.Module):
    """Fully connected generator for small images and plain vectors.

    Batch normalisation: on digits a source learns faster with it, and its scales, which stay in
    full precision, make up for much of what ternary weights lose.

    Parameters
    ----------
    shape : sequence of int
        Shape of one sample, e.g. (1, 8, 8).
    latent_dim : int
        Dimension of z ~ N(0, I).
    width : int
        Units in each of the three hidden layers.
    """

    def __init__(self, shape: Sequence[int], latent_dim: int = 32, width: int = 256) -> None:
        super().__init__()
        self.shape, self.latent_dim = tuple(shape), latent_dim
        layers: list[nn.Module] = []
        for features in (latent_dim, width, width):
            # no bias: the normalisation has one
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, math.prod(self.shape)), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to samples (n, *shape) in [-1, 1]."""
        samples: Tensor = self.net(z).unflatten(1, self.shape)
        return samples


class ConvGenerator(nn.Module):
    """Compact transposed-convolution generator for images of 28x28 or 32x32 (any channels).

    A hidden layer of the latent, which lets a barycenter tell its sources' parts of the latent
    apart, a linear one that makes a coarse map of a quarter of the side, and two of stride 2, which
    double it twice. It has 419 k parameters for 1x28x28 and trains on one CPU core.

    Parameters
    ----------
    shape : sequence of int
        Shape of one sample: channels, height and width, multiples of 4.
    latent_dim : int
        Dimension of z ~ N(0, I).
    width : int
        Channels of the coarse map; the hidden layer has eight times as many units.

    Raises
    ------
    ValueError
        For a shape of no such image.
    """

    def __init__(self, shape: Sequence[int], latent_dim: int = 32, width: int = 32) -> None:
        super().__init__()
        channels, height, breadth = _image_shape(shape, multiple=4)
        self.latent_dim = latent_dim
        hidden, coarse = 8 * width, (width, height // 4, breadth // 4)
        self.net = nn.Sequential(
            nn.Linear(latent_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(coarse), bias=False),
            nn.Unflatten(1, coarse),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to images (n, channels, height, width) in [-1, 1]."""
        images: Tensor = self.net(z)
        return images


class DCGANGenerator(nn.Module):
    """The paper's 32x32 generator: DCGAN (Radford et al., 2016), three stride-2 layers."""

    def __init__(self, shape: Sequence[int], latent_dim: int = 100, width: int = 64) -> None:
        super().__init__()
        channels, height, breadth = _image_shape(shape, multiple=8)
        self.latent_dim = latent_dim
        coarse = (4 * width, height // 8, breadth // 8)
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, math.prod(coarse), bias=False),
            nn.Unflatten(1, coarse),
            nn.BatchNorm2d(coarse[0]),
            nn.ReLU(),
        ]
        for wide, narrow in ((4 * width, 2 * width), (2 * width, width)):
            layers += [
                nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
            ]
        layers += [nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to images (n, channels, height, width) in [-1, 1]."""
        images: Tensor = self.net(z)
        return images


class ConditionalGenerator(nn.Module):
    """A shipped generator that is also told a label: as numbers behind the latents, 1 at its own.

    Parameters
    ----------
    generator : nn.Module
        Of latents (n, latent_dim + labels).
    labels : int
        How many labels there are.
    """

    def __init__(self, generator: nn.Module, labels: int) -> None:
        super().__init__()
        self.generator, self.labels = generator, labels
        self.latent_dim = latent_dim_of(generator) - labels

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """Map latents (n, latent_dim) and labels (n,) of int64 to samples (n, *shape)."""
        one_hot = nn.functional.one_hot(label, self.labels).to(z)
        samples: Tensor = self.generator(torch.cat([z, one_hot], 1))
        return samples


class MLPCritic(nn.Module):
    """Fully connected critic. No normalisation: the penalty is on each sample's own gradient."""

    def __init__(self, shape: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score samples (n, *shape) as (n,)."""
        scores: Tensor = self.net(x).squeeze(1)
        return scores

    def input_gradient(self, x: Tensor) -> Tensor:
        """Gradient (n, *shape) of each sample's score at x (n, *shape), written out.

        A chain of transposed layers, each masked by its units' slopes. These are piecewise
        constant, so that the graph back to the weights needs no forward pass, where autograd's
        double backward carries zeros through one. A subclass with another `forward` needs another.
        """
        first, second, last = (layer for layer in self.net if isinstance(layer, nn.Linear))
        with torch.no_grad():
            before = first(x.flatten(1))
            outer = torch.where(before > 0, 1.0, SLOPE)
            inner = torch.where(second(before * outer) > 0, 1.0, SLOPE)
        gradient = (((inner * last.weight) @ second.weight) * outer) @ first.weight
        return gradient.view_as(x)


class DCGANCritic(nn.Module):
    """The paper's convolutional critic, without batch normalisation (as WGAN-GP asks)."""

    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        channels, height, breadth = _image_shape(shape, multiple=8)
        layers: list[nn.Module] = []
        for narrow, wide in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        layers += [nn.Flatten(), nn.Linear(4 * width * height * breadth // 64, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Score images (n, channels, height, width) as (n,)."""
        scores: Tensor = self.net(x).squeeze(1)
        return scores


GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPGenerator,
    "conv": ConvGenerator,
    "dcgan": DCGANGenerator,
}
CRITICS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPCritic, "dcgan": DCGANCritic}


def make_generator(
    name: str,
    shape: Sequence[int],
    *,
    latent_dim: int = 32,
    width: int | None = None,
    labels: int | None = None,
) -> nn.Module:
    """Build a shipped generator by name.

    Parameters
    ----------
    name : {"mlp", "conv", "dcgan"}
    shape : sequence of int
        Shape of one sample.
    latent_dim : int
        Dimension of z.
    width : int, optional
        Hidden units (mlp) or channels (conv, dcgan); the network's own default if None.
    labels : int, optional
        Make a `ConditionalGenerator` of so many labels.

    Raises
    ------
    ValueError
        If the name is unknown or the shape does not suit the network.
    """
    made = _build(GENERATORS, "generator", name)(
        shape, latent_dim=latent_dim + (labels or 0), **({} if width is None else {"width": width})
    )
    return made if labels is None else ConditionalGenerator(made, labels)


def make_critic(name: str, shape: Sequence[int], *, width: int | None = None) -> nn.Module:
    """Build a shipped critic by name ("mlp" or "dcgan"); parameters as in `make_generator`."""
    return _build(CRITICS, "critic", name)(shape, **({} if width is None else {"width": width}))


def _build(
    table: dict[str, Callable[..., nn.Module]], kind: str, name: str
) -> Callable[..., nn.Module]:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def _image_shape(shape: Sequence[int], multiple: int) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[1] % multiple or shape[2] % multiple:
        raise ValueError(
            f"this network makes images (channels, height, width) whose sides are multiples of "
            f"{multiple}, not samples of shape {tuple(shape)}"
        )
    return shape[0], shape[1], shape[2]
