"""The model, its data and its training."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

LATENT = 16


class Net(nn.Module):
    """Variational autoencoder, with the parts and names of Flower's own VAE example."""

    def __init__(self, width=128):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.fc1 = nn.Linear(width, LATENT)
        self.fc2 = nn.Linear(width, LATENT)
        self.fc3 = nn.Linear(LATENT, width)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Tanh(),
            nn.Unflatten(1, (1, 8, 8)),
        )

    def encode(self, x):
        """Images to mean and log-variance of their latents."""
        h = self.encoder(x)
        return self.fc1(h), self.fc2(h)

    def decode(self, z):
        """Latents to images."""
        return self.decoder(self.fc3(z))

    def forward(self, x):
        """Images to their reconstruction, and what `encode` says."""
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.randn_like(mean) * torch.exp(logvar / 2)), mean, logvar


def load_data(partition_id, num_partitions):
    """Return one node's digits as (training, test) images: each node has digits of its own."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    order = torch.tensor(bunch.target).argsort(stable=True)
    mine = images[order].tensor_split(num_partitions)[partition_id]
    test = torch.arange(len(mine)) % 5 == 0
    return mine[~test], mine[test]


def loss_of(net, images):
    """Return reconstruction error plus divergence, per image (the evidence lower bound)."""
    reconstruction, mean, logvar = net(images)
    error = F.mse_loss(reconstruction, images, reduction="sum") / 0.2
    divergence = -0.5 * torch.sum(1 + logvar - mean.square() - logvar.exp())
    return (error + divergence) / len(images)


def train(net, images, epochs):
    """Train the network, and return the last loss."""
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in images[torch.randperm(len(images))].split(64):
            loss = loss_of(net, batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return loss.item()


@torch.no_grad()
def test(net, images):
    """Return the reconstruction error per pixel, and how far generated images lie from real ones.

    The distance is an energy distance: zero if and only if the images are distributed alike.
    """
    net.eval()
    error = F.mse_loss(net.decode(net.encode(images)[0]), images)
    made = net.decode(torch.randn(len(images), LATENT)).flatten(1)
    real = images.flatten(1)
    return error.item(), energy(made, real)


def energy(x, y):
    """Return the energy distance of two sets of vectors."""
    n, m = len(x), len(y)
    within = torch.pdist(x).sum() * 2 / (n * (n - 1)) + torch.pdist(y).sum() * 2 / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()
