"""The networks, their data and their training."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

LATENT = 8
FEATURES = 30


class Generator(nn.Module):
    """Noise to records."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(LATENT, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, FEATURES),
        )

    def forward(self, z):
        """Latents (n, LATENT) to records (n, FEATURES)."""
        return self.layers(z)


class Discriminator(nn.Module):
    """Records to scores: high if they look real. It stays on its node."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(FEATURES, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)),
        )

    def forward(self, x):
        """Map records (n, FEATURES) to scores (n, 1)."""
        return self.layers(x)


def load_data(partition_id, num_partitions):
    """Return one hospital's records for (training, test).

    They are standardised, and the hospitals see different patients: sorted by diagnosis, the first
    has the malignant cases.
    """
    bunch = load_breast_cancer()
    features = torch.tensor(bunch.data, dtype=torch.float32)
    features = (features - features.mean(0)) / features.std(0)
    order = torch.tensor(bunch.target).argsort(stable=True)
    mine = features[order].tensor_split(num_partitions)[partition_id]
    test = torch.arange(len(mine)) % 5 == 0
    return mine[~test], mine[test]


def train(generator, records, epochs):
    """Train the generator against a discriminator of its own; return its last loss."""
    discriminator = Discriminator()
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(epochs):
        for real in records[torch.randperm(len(records))].split(64):
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
def test(generator, records):
    """Return how far generated records lie from real ones, as an energy distance.

    It is zero if and only if the records are distributed alike.
    """
    generator.eval()
    x, y = generator(torch.randn(len(records), LATENT)), records
    n = len(records)
    within = (torch.pdist(x).sum() + torch.pdist(y).sum()) * 2 / (n * (n - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()
