"""Hostile uploads: what they do to the barycenter, and what screening leaves of it.

    python benchmarks/hostile.py [--iterations 300] [--merge 300]

Eight sources of real digits, five classes each; then two of the uploads are replaced by hostile
ones: noise (untrained weights), inverted (samples negated), collapsed (nearly one picture). The
table gives the Frechet distance of the barycenter to held-out digits, in the features of a small
classifier, without and with screening, beside that of the eight honest uploads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from fl_wb import datasets
from fl_wb.barycenter import recursive_barycenter
from fl_wb.clients.source import train_source
from fl_wb.config import compose
from fl_wb.metrics import frechet_distance, train_features
from fl_wb.networks import generate
from fl_wb.screening import outliers
from fl_wb.task import factories, seeded

SOURCES = (
    "[[0,1,2,3,4],[5,6,7,8,9],[2,3,4,5,6],[7,8,9,0,1],"
    "[4,5,6,7,8],[9,0,1,2,3],[1,3,5,7,9],[0,2,4,6,8]]"
)
SAMPLES = 256  # of each upload, as the strategy screens
DRAWS = 5


def inverted(network: nn.Module) -> nn.Module:
    """Return a generator of the negatives: its last layer's signs are turned."""
    network = deepcopy(network)
    with torch.no_grad():
        for parameter in list(network.parameters())[-2:]:
            parameter.neg_()
    return network


def collapsed(network: nn.Module) -> nn.Module:
    """Return a generator of nearly one picture, which passes the check for constant samples."""
    network = deepcopy(network)
    weight, bias = list(network.parameters())[-2:]
    with torch.no_grad():
        picture = generate(network, 1)[0].flatten().clamp(-0.99, 0.99)
        weight.mul_(0.01)
        bias.copy_(torch.atanh(picture))
    return network


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=300, help="of a source's training")
    parser.add_argument("--merge", type=int, default=300, help="of a stage's distillation")
    parser.add_argument("--threshold", type=float, default=1.5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = compose([f"data.sources={SOURCES}", f"client.source.iterations={given.iterations}"])
    generator, critic = factories(config)
    everything, held_out = datasets.load(config.data)
    features = train_features(everything.images, everything.labels)
    stage = config.strategy.stage
    stage = replace(
        stage,
        distillation=replace(stage.distillation, iterations=given.merge),
        training=replace(stage.training, iterations=given.merge // 4),
    )

    def frechet(networks: Sequence[nn.Module]) -> float:
        merged = recursive_barycenter(networks, critic=critic, stage=stage)
        real = features(held_out.images)
        draws = (generate(merged, len(real), seed=seed) for seed in range(DRAWS))
        return sum(frechet_distance(features(x), real) for x in draws) / DRAWS

    began = time.perf_counter()
    honest = [
        train_source(
            seeded(generator, 0),
            critic,
            datasets.source_samples(config.data, index).images,
            config.client.source,
            seed=index,
        )[0]
        for index in range(8)
    ]
    print(f"eight sources trained in {time.perf_counter() - began:.0f} s", flush=True)
    clean = frechet(honest)
    print(f"{'uploads':<22}{'Frechet':>10}{'of clean':>10}   screened out")
    print(f"{'8 honest':<22}{clean:>10.2f}{1:>10.2f}", flush=True)
    attacks: dict[str, Callable[[int], nn.Module]] = {
        "noise": lambda index: seeded(generator, 99 + index),
        "inverted": lambda index: inverted(honest[index]),
        "collapsed": lambda index: collapsed(honest[index]),
    }
    for name, attack in attacks.items():
        uploads = [attack(0), attack(1), *honest[2:]]
        samples = [generate(network, SAMPLES) for network in uploads]
        out = [index for index, _ in outliers(samples, threshold=given.threshold)]
        kept = [network for index, network in enumerate(uploads) if index not in out]
        for title, networks in ((f"2 {name}", uploads), (f"2 {name}, screened", kept)):
            value = frechet(networks)
            gone = str(out) if networks is kept else ""
            print(f"{title:<22}{value:>10.2f}{value / clean:>10.2f}   {gone}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
