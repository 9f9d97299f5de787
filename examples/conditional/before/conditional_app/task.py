"""The networks, their data and their training."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

LATENT, LABELS = 16, 10


class Generator(nn.Module):
    """Noise and a label to images."""

    def __init__(self, width=128):
        super().__init__()
        self.embedding = nn.Embedding(LABELS, LATENT)
        self.layers = nn.Sequential(
            *(nn.Linear(2 * LATENT, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))),
        )

    def forward(self, z, labels):
        """Latents (n, LATENT) and labels (n,) to images (n, 1, 8, 8)."""
        return self.layers(torch.cat([z, self.embedding(labels)], 1))


class Discriminator(nn.Module):
    """Images and labels to scores: high if they look real. It stays on its node."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(64 + LABELS, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)),
        )

    def forward(self, x, labels):
        """Images (n, 1, 8, 8) and labels (n,) to scores (n, 1)."""
        return self.layers(torch.cat([x.flatten(1), F.one_hot(labels, LABELS)], 1))


def load_data(partition_id, num_partitions):
    """Return one node's digits as (training, test), images and labels each.

    Each node has digits of its own.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    mine = labels.argsort(stable=True).tensor_split(num_partitions)[partition_id]
    test = torch.arange(len(mine)) % 5 == 0
    return tuple((images[part], labels[part]) for part in (mine[~test], mine[test]))


def train(generator, data, epochs):
    """Train the generator against a discriminator of its own; return its last loss."""
    discriminator, (images, labels) = Discriminator(), data
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            label = labels[batch]
            # Noise on both blurs what a discriminator could learn by heart.
            real = images[batch] + 0.1 * torch.randn_like(images[batch])
            fake = generator(torch.randn(len(batch), LATENT), label)
            noisy = fake + 0.1 * torch.randn_like(fake)
            loss = F.softplus(-discriminator(real, label)).mean()
            loss = loss + F.softplus(discriminator(noisy.detach(), label)).mean()
            for_discriminator.zero_grad()
            loss.backward()
            for_discriminator.step()
            loss = F.softplus(-discriminator(noisy, label)).mean()
            for_generator.zero_grad()
            loss.backward()
            for_generator.step()
    return loss.item()


@torch.no_grad()
def test(generator, data):
    """Return how far generated images lie from real ones, and how many are what they should be.

    The energy distance is zero if and only if the images are distributed alike. An image counts as
    what its nearest real one is.
    """
    generator.eval()
    images, labels = data
    x, y = generator(torch.randn(len(images), LATENT), labels).flatten(1), images.flatten(1)
    n = len(images)
    within = (torch.pdist(x).sum() + torch.pdist(y).sum()) * 2 / (n * (n - 1))
    distance = (2 * torch.cdist(x, y).mean() - within).item()
    right = (labels[torch.cdist(x, y).argmin(1)] == labels).float().mean().item()
    return {"energy-distance": distance, "right-labels": right}
