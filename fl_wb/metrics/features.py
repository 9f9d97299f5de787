"""In what samples are compared: the last hidden layer of a small classifier of the domain.

Distances between pixels reward blur; distances between what a classifier sees do not. ImageNet
features would be a download and say little about 8x8 digits, so the network is trained on real data
of the domain, in seconds. For natural RGB images, where ImageNet's features are what others report,
there is `inception_features`, an extra.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from fl_wb.persistence.tensor_files import digest

DIMENSION = 48  # features; few enough that a covariance of some 500 samples is well-conditioned
BATCH = 64
STEPS = 1500  # of training, about
MLP_PIXELS = 256  # samples up to this many numbers get an MLP, larger images a CNN
_cache: dict[tuple[str, int], Features] = {}


class Features:
    """Maps samples (n, ...) to features (n, d), in batches and without a graph.

    Attributes
    ----------
    digest : str
        SHA-256 (hex) of the network: figures are comparable if and only if it is the same.
    accuracy : float
        Share of samples it had not trained on that it classifies right; nan where none were kept.
    """

    def __init__(
        self,
        module: nn.Module,
        accuracy: float,
        head: nn.Module | None = None,
        classes: Tensor | None = None,
    ) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._head, self._classes = head, classes
        self.digest = digest(self.module.state_dict())
        self.accuracy = accuracy

    def __call__(self, samples: Tensor) -> Tensor:
        """Map samples (n, ...) to features (n, d) on the CPU."""
        with torch.no_grad():
            return torch.cat([self.module(part) for part in samples.cpu().float().split(1000)])

    @property
    def classifies(self) -> bool:
        """Whether these are of a classifier that was trained on the domain's classes."""
        return self._head is not None

    def classify(self, samples: Tensor) -> Tensor:
        """Return the classes (n,) of samples (n, ...), as the labels of the training named them.

        Raises
        ------
        ValueError
            If these are features of no classifier of the domain.
        """
        if self._head is None or self._classes is None:
            raise ValueError("these features know no classes: train_features does")
        with torch.no_grad():
            return self._classes[self._head(self(samples)).argmax(1)]


def train_features(samples: Tensor, labels: Tensor, *, seed: int = 0) -> Features:
    """Train a small classifier and return its penultimate layer.

    The same arguments give the same network; asking again in the same process costs nothing.

    Parameters
    ----------
    samples : Tensor
        Real data (n, ...) of the domain, in [-1, 1]. A tenth of it only measures the accuracy.
    labels : Tensor
        Their classes (n,), any integers.
    seed : int
        Of the initial weights and the order of the batches.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or not one label each.
    """
    if len(samples) < 2 or labels.shape != samples.shape[:1]:
        raise ValueError(
            f"features need two or more samples with one label each, not samples of shape "
            f"{tuple(samples.shape)} and labels of shape {tuple(labels.shape)}"
        )
    key = (digest({"samples": samples, "labels": labels}), seed)
    if key not in _cache:
        _cache[key] = _train(samples.detach().cpu().float(), labels.cpu(), seed)
    return _cache[key]


@cache
def inception_features() -> Features:
    """Return the 2048 features of the InceptionV3 of the Frechet Inception Distance.

    It is torch-fidelity's port of the original network, whose weights are downloaded to torch's
    cache on the first use. Samples (n, c, h, w) in [-1, 1], of one or three channels.

    Raises
    ------
    ImportError
        If torch-fidelity is not installed, naming the extra.
    """
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ImportError(
            "inception features need torch-fidelity, which is not installed: "
            'pip install "fl-wb[inception]"'
        ) from error
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    return Features(_Inception(network), math.nan)


class _Inception(nn.Module):
    """Brings samples into the form that the network was trained on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: Tensor) -> Tensor:
        if samples.dim() != 4 or samples.shape[1] not in (1, 3):
            raise ValueError(
                "inception features are of images (n, 3, h, w) or (n, 1, h, w), not of samples "
                f"{tuple(samples.shape)}"
            )
        images = ((samples.clamp(-1, 1) + 1) * 127.5).round().byte()
        images = images.expand(-1, 3, -1, -1)
        # Each becomes 299 x 299: few at a time.
        return torch.cat([self.network(part) for part in images.split(BATCH)])


def _train(samples: Tensor, labels: Tensor, seed: int) -> Features:
    classes, targets = torch.unique(labels, return_inverse=True)
    rng = torch.Generator().manual_seed(seed)
    held, rest = torch.randperm(len(samples), generator=rng).tensor_split(
        [max(len(samples) // 10, 1)]
    )
    batches = math.ceil(len(rest) / BATCH)
    # Some 1,500 steps are enough; large data are still seen five times, small ones 60 times.
    epochs = min(max(STEPS // batches, 5), 60)
    body, head = fit_classifier(samples[rest], targets[rest], len(classes), epochs, rng, seed)
    with torch.no_grad():
        right = (head(body(samples[held])).argmax(1) == targets[held]).float().mean()
        # Variance 1 on average: otherwise Frechet distance and KID (a cubic kernel) would depend on
        # how confident the classifier happened to become. ReLU lets the scale pass.
        scale = body(samples[rest]).var(0, correction=0).mean().sqrt().clamp(min=1e-6)
        body[-2].weight /= scale
        body[-2].bias /= scale
        head.weight *= scale
    return Features(body, float(right), head.requires_grad_(False), classes)


def fit_classifier(
    samples: Tensor, targets: Tensor, classes: int, epochs: int, rng: torch.Generator, seed: int
) -> tuple[nn.Sequential, nn.Linear]:
    """Train a small classifier of samples (n, ...), in [-1, 1], with targets (n,) < classes.

    Returns its body, which makes `DIMENSION` features, and its last layer, in eval mode; `rng`
    orders the batches, the seed is of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(seed)
        body = _network(samples.shape[1:])
        head = nn.Linear(DIMENSION, classes)
    model = nn.Sequential(body, head)
    batches = math.ceil(len(samples) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(samples), generator=rng).split(BATCH):
            # No label smoothing: it draws each class together and hides variety within it.
            loss = nn.functional.cross_entropy(model(samples[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return body, head


def _network(shape: Sequence[int]) -> nn.Sequential:
    if len(shape) != 3 or math.prod(shape[1:]) <= MLP_PIXELS:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), 256),
            nn.ReLU(),
            nn.Linear(256, DIMENSION),
            nn.ReLU(),
        )
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, DIMENSION),
        nn.ReLU(),
    )
