"""Hostile uploads: what they do to the barycenter, and what screening leaves of it.

    python -m benchmarks.hostile --classes disjoint
    python -m benchmarks.hostile --limits

Eight sources of real digits, of five classes each (overlapping) or one (disjoint); then two of the
uploads are replaced by hostile ones: untrained weights, noise (random pixels), inverted (samples
negated), collapsed (nearly one picture), dimmed (trained on half the ink), marked (trained on
digits of which 80% have a white corner). The table gives the Frechet distance of the barycenter to
held-out digits of the sources' classes, in the features of a small classifier, without and with
screening, and in units of that of the eight honest uploads: mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn

from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.app.schema import Config
from fl_wb.barycenter import recursive_barycenter
from fl_wb.clients.training import train_source
from fl_wb.data import datasets
from fl_wb.generators.copies import seeded
from fl_wb.generators.sampling import generate
from fl_wb.messages.screening import outliers
from fl_wb.metrics import frechet_distance, train_features

SOURCES = {
    "overlapping": "[[0,1,2,3,4],[5,6,7,8,9],[2,3,4,5,6],[7,8,9,0,1],"
    "[4,5,6,7,8],[9,0,1,2,3],[1,3,5,7,9],[0,2,4,6,8]]",
    "disjoint": "[[0],[1],[2],[3],[4],[5],[6],[7]]",
}
SAMPLES = 256  # of each upload, as the strategy screens
DRAWS = 5
INK, SHARES = (1.0, 0.95, 0.9, 0.8, 0.5), (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)  # of `limits`


def noise(network: nn.Module, seed: int) -> nn.Module:
    """Return a generator of random pixels: its last layer's weights are random and large."""
    network = deepcopy(network)
    weight, bias = list(network.parameters())[-2:]
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(10 * torch.randn(weight.shape, generator=rng))
        bias.zero_()
    return network


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


def marked(images: Tensor, share: float = 0.8, at: int = 0) -> Tensor:
    """Make a small square of a share of the images white, in a corner or so far from it."""
    images[: int(share * len(images)), :, at : at + 2, at : at + 2] = 1
    return images


def one_seed(config: Config, seed: int, threshold: float) -> dict[str, tuple[float, str]]:
    """Return the Frechet distance of each set of uploads, and what was screened out."""
    generator, critic = factories(config)
    everything, _ = datasets.load(config.data)
    classes = sorted({label for source in config.data.sources for label in source})
    real = datasets.held_out(config.data, classes)
    features = train_features(everything.images, everything.labels)

    def frechet(networks: Sequence[nn.Module]) -> float:
        stage = config.strategy.stage
        merged = recursive_barycenter(networks, critic=critic, stage=stage, seed=seed)
        wanted = features(real.images)
        draws = (generate(merged, len(wanted), seed=draw) for draw in range(DRAWS))
        return fmean(frechet_distance(features(x), wanted) for x in draws)

    def trained(index: int, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
        images = spoil(datasets.source_samples(config.data, index).images.clone())
        settings, start = config.client.source, seeded(generator, seed)
        return train_source(start, critic, images, settings, seed=100 * seed + index)[0].generator

    honest = [trained(index) for index in range(8)]
    attacks: dict[str, Callable[[int], nn.Module]] = {
        "none": lambda index: honest[index],
        "untrained": lambda index: seeded(generator, 99 + index),
        "noise": lambda index: noise(honest[index], index),
        "inverted": lambda index: inverted(honest[index]),
        "collapsed": lambda index: collapsed(honest[index]),
        "dimmed": lambda index: trained(index, lambda x: (x + 1) / 2 - 1),
        "marked": lambda index: trained(index, marked),
    }
    found: dict[str, tuple[float, str]] = {}
    known: dict[tuple[nn.Module, ...], float] = {}  # most attacks leave the same uploads
    for name, attack in attacks.items():
        uploads = [attack(0), attack(1), *honest[2:]]
        samples = [generate(network, SAMPLES) for network in uploads]
        out = [index for index, _ in outliers(samples, threshold=threshold)]
        kept = tuple(network for index, network in enumerate(uploads) if index not in out)
        for title, networks in ((name, tuple(uploads)), (f"{name}, screened", kept)):
            if networks not in known:
                known[networks] = frechet(networks)
            found[title] = known[networks], str(out) if "screened" in title else ""
            print(f"seed {seed}: {title}: {found[title]}", flush=True)
    return found


def limits(threshold: float) -> None:
    """Print how often screening sees what is moderate: 8 sets of real digits, one of them changed.

    Sets of real digits are what sources' generators are at best; nothing is trained.
    """
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        **{f"ink x {ink}": partial(torch.lerp, -torch.ones(()), weight=ink) for ink in INK},
        **{f"corner mark {share:.0%}": partial(marked, share=share) for share in SHARES},
        **{f"middle mark {share:.0%}": partial(marked, share=share, at=3) for share in SHARES},
    }
    everything, _ = datasets.load(compose().data)
    print("| change of one set | " + " | ".join(SOURCES) + " |\n|---|---|---|")
    for name, change in changes.items():
        seen = {kind: 0 for kind in SOURCES}
        for kind, spoiled in itertools.product(SOURCES, range(8)):
            rng, sets = torch.Generator().manual_seed(spoiled), []
            for classes in json.loads(SOURCES[kind]):
                of_class = torch.isin(everything.labels, torch.tensor(classes)).nonzero()[:, 0]
                drawn = torch.randint(len(of_class), (SAMPLES,), generator=rng)
                sets.append(everything.images[of_class[drawn]])
            sets[spoiled] = change(sets[spoiled].clone())
            out = [index for index, _ in outliers(sets, threshold=threshold)]
            assert not set(out) - {spoiled}, "an honest set was dropped"
            seen[kind] += spoiled in out
        print(f"| {name} | " + " | ".join(f"{count}/8" for count in seen.values()) + " |")


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", choices=SOURCES, default="overlapping")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=400, help="of a source's training")
    parser.add_argument("--merge", type=int, default=200, help="of a stage's distillation")
    parser.add_argument("--threshold", type=float, default=3.0)
    parser.add_argument("--limits", action="store_true", help="how moderate what is seen may be")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.limits:
        return limits(given.threshold)
    began, runs = time.process_time(), []
    for seed in given.seeds:
        settings = [
            f"data.sources={SOURCES[given.classes]}",
            f"data.seed={seed}",
            f"client.source.iterations={given.iterations}",
            f"strategy.stage.distillation.iterations={given.merge}",
            f"strategy.stage.training.iterations={given.merge // 4}",
        ]
        runs.append(one_seed(compose(settings), seed, given.threshold))
    print(f"\n{'two of eight':<22}{'Frechet':>16}{'of clean':>16}   screened out, by seed")
    for title in runs[0]:
        values = [run[title][0] for run in runs]
        shares = [run[title][0] / run["none"][0] for run in runs]
        columns = (f"{fmean(v):.2f} ±{pstdev(v):.2f}" for v in (values, shares))
        print(f"{title:<22}" + "".join(f"{column:>16}" for column in columns), end="   ")
        print(*(run[title][1] for run in runs))
    print(f"{time.process_time() - began:.0f} s of one core")


if __name__ == "__main__":
    main()
