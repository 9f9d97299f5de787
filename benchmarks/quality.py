"""Quality of the merge, the adaptation and the ternarization, on real digits or IDX images.

    python -m benchmarks.quality merge|adapt|deal [data=mnist data.root=FOLDER]
        [--seeds 10 11 12] [--only WORD]

`merge`: barycenters of two sources by the shipped stage, by displacement and by the paper's recipe,
beside samples of the pool of the sources themselves (their exact mixture). `adapt`: two targets
with 10 samples a class, one of all classes (sources 0-4, 5-9), one of classes that no source has
(8-9; sources 0-3, 4-7): start, variation transfer, its ternary form, plain fine-tuning. `deal`:
what of those targets' energy distance lies in the few samples alone: real ones, moved so that their
mean is the few samples'.
Sources are trained with the shipped settings, by the seed. Seconds are of one core's time
(`time.process_time`, one thread). Every figure is the mean of five draws of the generator,
given as mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from fl_wb.adaptation import adapt
from fl_wb.app.config import compose
from fl_wb.app.schema import Config
from fl_wb.barycenter import recursive_barycenter
from fl_wb.data import datasets
from fl_wb.generators.mixture import Mixture
from fl_wb.generators.networks import make_critic, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.metrics import Reference, evenly, train_features
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import digest
from fl_wb.reporting import tables
from fl_wb.ternary import pack, ternarize
from fl_wb.training.wgan import resample, train_wgan
from fl_wb.transport import energy_distance

COLUMNS = ("w1", "frechet", "kid", "energy", "density", "coverage", "memorization")
OVERLAPPING = "data.sources=[[0,1,2,3,4],[5,6,7,8,9]] data.targets=[[0,1,2,3,4,5,6,7,8,9]]"
NON_OVERLAPPING = "data.sources=[[0,1,2,3],[4,5,6,7]] data.targets=[[8,9]]"
TARGETS = {"all": OVERLAPPING, "new": NON_OVERLAPPING}
MERGES = ("mixture", "displacement")  # two_critics differs from mixture in its WGAN alone
NAMES = {
    "merge": [*MERGES, "the paper's recipe"],
    "adapt": list(TARGETS),
    "deal": list(TARGETS),
}
DRAWS = 5
KEPT_SOURCES = "FL_WB_BENCH_SOURCES"
"""Environment: a folder where trained sources are kept, for benchmarks that share them."""


class Bench:
    """One configuration and seed: its data, networks, sources and a target's yardstick."""

    def __init__(self, overrides: str, seed: int, target: int = 0) -> None:
        self.config: Config = compose(f"{overrides} seed={seed} data.seed={seed}")
        data, network = self.config.data, self.config.network
        self.everything, _ = datasets.load(data)
        held_out = datasets.held_out(data, data.targets[target]).images
        self.held_out = evenly(held_out, self.config.client.evaluation.most)
        self.few = datasets.target_samples(data, target).images
        self.features = train_features(self.everything.images, self.everything.labels)
        self.reference = Reference(self.held_out, few=self.few, features=self.features)
        shape = tuple(held_out.shape[1:])
        self.make_generator = lambda: make_generator(
            network.generator, shape, latent_dim=network.latent_dim, width=network.width
        )
        self.make_critic = lambda: make_critic(network.critic, shape)
        self.seed = seed

    def sources(self) -> list[nn.Module]:
        """Return every source's generator, trained with the shipped settings."""
        count = self.config.data.source_count
        return [self._source(k, StageStore(os.environ.get(KEPT_SOURCES))) for k in range(count)]

    def _source(self, k: int, kept: StageStore) -> nn.Module:
        seed, settings = 1000 * self.seed + k, self.config.client.source
        samples = datasets.source_samples(self.config.data, k).images
        torch.manual_seed(seed)
        generator, critic = self.make_generator(), self.make_critic()
        went_in = {"samples": samples, **generator.state_dict(prefix="g."), **critic.state_dict()}
        said = digest(went_in) + json.dumps([seed, asdict(settings)])
        key = hashlib.sha256(said.encode()).hexdigest()
        if (found := kept.get(key)) is not None:
            generator.load_state_dict(found)
            return generator.eval()
        source = train_wgan(generator, [critic], [resample(samples)], settings, seed=seed)
        kept.put(key, source.generator.state_dict())
        return source.generator

    def row(
        self, draw: Callable[[int, int], Tensor], reference: Reference | None = None
    ) -> dict[str, float]:
        """Metrics of samples that draw(n, seed) makes, averaged over draws."""
        size = len(self.held_out)
        rows = [(reference or self.reference).compare(draw(size, s)) for s in range(DRAWS)]
        return {key: statistics.fmean(row[key] for row in rows) for key in COLUMNS}

    def of(self, generator: nn.Module) -> dict[str, float]:
        """Metrics of a generator."""
        return self.row(lambda n, seed: generate(generator, n, seed=seed))


Table = dict[str, list[dict[str, float]]]


def timed(work: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """Return what `work` made, and its core seconds."""
    began = time.process_time()
    made = work()
    return made, time.process_time() - began


def merge(seed: int, table: Table, overrides: str, only: str = "") -> None:
    """Merge by the shipped stage, displacement and the paper's own recipe; draw the exact pool."""
    bench = Bench(f"{OVERLAPPING} {overrides}", seed)
    sources = bench.sources()
    exact = Mixture(sources).eval()

    def pool(n: int, draw: int) -> Tensor:
        rng = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            return exact(torch.randn(n, bench.config.network.latent_dim, generator=rng))

    real = bench.everything.images
    table["real training images"].append(
        bench.row(lambda n, s: real[torch.randperm(len(real), generator=_rng(s))[:n]])
    )
    table["the pool of the sources"].append(bench.row(pool))
    stage = bench.config.strategy.stage
    paper = compose(f"{overrides} strategy=paper").strategy.stage
    recipes = [*(replace(stage, geodesic=geodesic) for geodesic in MERGES), paper]
    for name, settings in zip(NAMES["merge"], recipes, strict=True):
        if only not in name:
            continue
        merged, seconds = timed(
            lambda settings=settings: recursive_barycenter(  # type: ignore[misc]
                sources, critic=bench.make_critic, stage=settings, seed=seed
            )
        )
        table[name].append(bench.of(merged) | {"seconds": seconds})


def adaptation(seed: int, table: Table, overrides: str, only: str = "") -> None:
    """Start, adapted, ternary and plain, for a target of known and one of new classes."""
    for name, classes in TARGETS.items():
        if only not in name:
            continue
        bench = Bench(f"{classes} {overrides}", seed)
        few = bench.few
        start = recursive_barycenter(
            bench.sources(),
            critic=bench.make_critic,
            stage=bench.config.strategy.stage,
            seed=seed,
        )
        table[f"{name}: the few samples, resampled"].append(
            bench.row(lambda n, s, few=few: resample(few)(n, _rng(s)))  # type: ignore[misc]
        )
        table[f"{name}: start (barycenter)"].append(bench.of(start))
        client = bench.config.client
        adapted, seconds = timed(
            lambda start=start, bench=bench: adapt(  # type: ignore[misc]
                start,
                bench.few,
                critic=bench.make_critic,
                settings=bench.config.client.adaptation,
                seed=seed,
            )
        )
        table[f"{name}: adapted"].append(bench.of(adapted) | {"seconds": seconds})
        for label, settings in (
            ("ternary", client.ternarization),
            ("ternary, fixed thresholds", replace(client.ternarization, threshold_lr=0.0)),
            ("rounded, not trained", replace(client.ternarization, iterations=0)),
        ):
            ternary, seconds = timed(
                lambda adapted=adapted, settings=settings: ternarize(  # type: ignore[misc]
                    adapted, settings=settings, seed=seed
                )
            )
            table[f"{name}: {label}"].append(bench.of(ternary) | {"seconds": seconds})
        plain = compose("client=paper").client.adaptation
        plain = replace(plain, training=replace(client.adaptation.training, iterations=800))
        tuned, seconds = timed(
            lambda start=start, bench=bench, plain=plain: adapt(  # type: ignore[misc]
                start, bench.few, critic=bench.make_critic, settings=plain, seed=seed
            )
        )
        table[f"{name}: plain fine-tuning, 800 iterations"].append(
            bench.of(tuned) | {"seconds": seconds}
        )
        size = sum(v.numel() * v.element_size() for v in adapted.state_dict().values())
        print(f"# seed {seed}, {name}: {size} bytes become {len(pack(ternary))}", flush=True)


def deal(seed: int, table: Table, overrides: str, only: str = "") -> None:
    """Energy distance of real samples, moved so that their mean is the few samples'."""
    for name, classes in TARGETS.items():
        if only not in name:
            continue
        bench = Bench(f"{classes} {overrides}", seed)
        held, shift = bench.held_out, bench.few.mean(0) - bench.held_out.mean(0)
        halves = [held[torch.randperm(len(held), generator=_rng(s))].chunk(2) for s in range(DRAWS)]
        for label, moved in (("real samples", 0.0), ("real samples, moved", shift)):
            energy = [energy_distance(a + moved, b).item() for a, b in halves]
            table[f"{name}: {label}"].append({"energy": statistics.fmean(energy)})


def markdown(table: Table) -> str:
    """Rows of mean ± standard deviation over the seeds."""
    columns = (*COLUMNS, "seconds")
    cells = [["", *columns]]
    for name, rows in table.items():
        found = ([row[c] for row in rows if not math.isnan(row.get(c, math.nan))] for c in columns)
        cells.append([name, *map(tables.mean, found)])
    return tables.markdown(cells)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    """Run one benchmark and print its table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument(
        "--only", default="", help="a word in the rows' names (merge), or all or new"
    )
    parser.add_argument("overrides", nargs="*", help="as for fl-wb, e.g. data=mnist data.root=DIR")
    arguments = parser.parse_args()
    names = NAMES[arguments.what]
    if not any(arguments.only in name for name in names):
        parser.error(f"--only {arguments.only!r} is in none of the names: {'; '.join(names)}")
    torch.set_num_threads(1)
    table: Table = defaultdict(list)
    works = {"merge": merge, "adapt": adaptation, "deal": deal}
    for seed in arguments.seeds:
        works[arguments.what](seed, table, " ".join(arguments.overrides), arguments.only)
        print(f"# after seed {seed}\n{markdown(table)}\n", flush=True)


if __name__ == "__main__":
    main()
