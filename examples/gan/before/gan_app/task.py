"""The networks, their data and their training."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

LATENT = 16


class Generator(nn.Module):
    """Noise to images."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(LATENT, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))),
        )

    def forward(self, z):
        """Latents (n, LATENT) to images (n, 1, 8, 8)."""
        return self.layers(z)


class Discriminator(nn.Module):
    """Images to scores: high if they look real. It stays on its node."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)),
        )

    def forward(self, x):
        """Images (n, 1, 8, 8) to scores (n, 1)."""
        return self.layers(x)


def load_data(partition_id, num_partitions):
    """Return one node's digits as (training, test) images: each node has digits of its own."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    order = torch.tensor(bunch.target).argsort(stable=True)
    mine = images[order].tensor_split(num_partitions)[partition_id]
    test = torch.arange(len(mine)) % 5 == 0
    return mine[~test], mine[test]


def train(generator, discriminator, images, epochs):
    """Train the generator against its discriminator; return its last loss."""
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(epochs):
        for real in images[torch.randperm(len(images))].split(64):
            # Noise on both blurs what a discriminator could learn by heart.
            real = real + 0.1 * torch.randn_like(real)
            fake = generator(torch.randn(64, LATENT))
            noisy = fake + 0.1 * torch.randn_like(fake)
            loss = F.softplus(-discriminator(real)).mean()
            loss = loss + F.softplus(discriminator(noisy.detach())).mean()
            for_discriminator.zero_grad()
            loss.backward()
            for_discriminator.step()
            loss = F.softplus(-discriminator(noisy)).mean()
            for_generator.zero_grad()
            loss.backward()
            for_generator.step()
    return loss.item()


@torch.no_grad()
def test(generator, images):
    """Return how far generated images lie from real ones, as an energy distance.

    It is zero if and only if the images are distributed alike.
    """
    generator.eval()
    x, y = generator(torch.randn(len(images), LATENT)).flatten(1), images.flatten(1)
    n = len(images)
    within = (torch.pdist(x).sum() + torch.pdist(y).sum()) * 2 / (n * (n - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()
