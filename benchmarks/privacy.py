"""What a source's generator tells of its samples, and what privacy costs.

    python -m benchmarks.privacy

A generator is trained on some of the real digits, without and with differential privacy (DP-SGD of
the critic, delta 1e-5). The table gives its quality, against digits that it was not trained on:
Frechet distance and coverage in the features of a small classifier, energy distance in pixels;
its memorization; and by how much who has it tells digits that it was trained on from others: the
area under the curve (AUC; 0.5 is guessing) of their distance to the nearest of 10,000 generated
ones, and of the critic's score for who has that, too (`strategy.critic`). Means over seeds.
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fl_wb.app.config import compose
from fl_wb.clients.training import train_source
from fl_wb.data import datasets
from fl_wb.generators.copies import seeded
from fl_wb.generators.networks import make_critic, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.metrics import (
    Features,
    coverage,
    energy_distance,
    frechet_distance,
    memorization,
    train_features,
)
from fl_wb.training.privacy import Privacy
from fl_wb.training.wgan import Training

MADE = 10_000
PLAIN = Training(generator_lr=5e-4)
# Few steps, each on all samples, and a narrow critic: the noise grows with the root of the steps
# and of the weights.
PRIVATE = Training(
    iterations=500, batch_size=500, critic_steps=1, generator_lr=5e-4, critic_lr=2e-3
)
WIDTH = 64
ROWS: list[tuple[int, float | None]] = [
    *((n, None) for n in (10, 50, 500)),
    *((500, epsilon) for epsilon in (100.0, 10.0, 3.0, 1.0)),
]
COLUMNS = ("Frechet", "coverage", "energy", "memorization", "AUC", "AUC critic", "seconds")


def auc(seen: Tensor, unseen: Tensor) -> float:
    """Return the probability that a member's score is above another's."""
    labels = [1] * len(seen) + [0] * len(unseen)
    return float(roc_auc_score(labels, torch.cat([seen, unseen]).numpy()))


def row(
    images: Tensor, features: Features, n: int, epsilon: float | None, seed: int
) -> tuple[float, ...]:
    """Return the figures of one training."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    seen, others = images[order[:n]], images[order[n:]]
    shape = tuple(images.shape[1:])
    began = time.process_time()
    trained, _ = train_source(
        seeded(lambda: make_generator("mlp", shape), seed),
        lambda: make_critic("mlp", shape, width=None if epsilon is None else WIDTH),
        seen,
        PLAIN if epsilon is None else PRIVATE,
        privacy=Privacy(epsilon=epsilon),
        seed=seed,
    )
    seconds = time.process_time() - began
    made = generate(trained.generator, MADE, seed=seed)
    some, unseen = made[:1000], others[:500]

    def near(samples: Tensor) -> Tensor:
        return -torch.cdist(samples.flatten(1), made.flatten(1)).amin(1)

    with torch.no_grad():
        scores = [trained.critics[0](samples) for samples in (seen, unseen)]
    return (
        frechet_distance(features(some), features(others)),
        coverage(features(some), features(others)),
        energy_distance(some, others),
        memorization(some, seen, others),
        auc(near(seen), near(unseen)),
        auc(*scores),
        seconds,
    )


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    everything, _ = datasets.load(compose().data)
    features = train_features(everything.images, everything.labels)
    print("| images | epsilon | " + " | ".join(COLUMNS) + " |\n" + "|---" * 9 + "|")
    for n, epsilon in ROWS:
        runs = [row(everything.images, features, n, epsilon, seed) for seed in given.seeds]
        figures = " | ".join(f"{fmean(values):.3g}" for values in zip(*runs, strict=True))
        print(f"| {n} | {epsilon or '-'} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
