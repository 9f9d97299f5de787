"""Conditional generators on digits: merge, adaptation, ternarization, what samples are good for.

    python -m benchmarks.conditional [overrides] [--seeds 10 11 12]

Two sources of five digits each, whose generators are told the label, trained as shipped; a target
of all ten. `the pool` is the sources' own samples, each label's of the source that has it. `energy`
is the mean of 10 draws of 10,000 samples, each against the held-out digits: one draw of as many as
are held out tells nothing of distances so small, and of n samples whose labels are dealt out evenly
it is about 1.3 / n too little. The other figures are means of five draws
of as many. `own source` is the share of samples that are nearer to what the
source that has their label makes of it than to what the other one does. `accuracy` is that of
`fl_wb.metrics.augmentation`. Given as mean and standard deviation over the seeds; seconds are of
one core's time.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import torch
from torch import Tensor, nn

from benchmarks.quality import DRAWS, OVERLAPPING, Bench, Table, timed
from fl_wb.adaptation import adapt
from fl_wb.barycenter import recursive_barycenter
from fl_wb.clients.training import train_source
from fl_wb.data import datasets
from fl_wb.generators.networks import make_generator
from fl_wb.generators.sampling import generate
from fl_wb.metrics import augmentation, energy_distance, evaluate
from fl_wb.reporting import tables
from fl_wb.ternary import ternarize
from fl_wb.training.conditional import label_counts

LABELS = 10
MANY, TIMES = 10_000, 10  # samples of the energy distance, and how often they are drawn
DRAWN = 500  # of each label, that say whose it is
FIGURES = ("right-labels", "frechet", "coverage", "memorization")
COLUMNS = (*FIGURES, "energy", "energy ratio", "own source", "accuracy", "seconds")
DIGITS = {"energy": 4}  # others have three


class Pool(nn.Module):
    """What the sources make, each label by the one that has most of it."""

    def __init__(self, sources: list[nn.Module], counts: list[list[int]]) -> None:
        super().__init__()
        self.sources, self.owner = nn.ModuleList(sources), torch.tensor(counts).argmax(0)
        self.latent_dim = int(sources[0].latent_dim)  # type: ignore[arg-type]

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """Map latents (n, latent_dim) and labels (n,) to samples (n, ...)."""
        made = torch.stack([source(z, label) for source in self.sources])
        return made[self.owner[label], torch.arange(len(z))]


class Conditional(Bench):
    """One seed's data and yardsticks, its trained sources and how often they have each label."""

    def __init__(self, overrides: str, seed: int) -> None:
        super().__init__(f"{OVERLAPPING} network.labels={LABELS} {overrides}", seed)
        data, network = self.config.data, self.config.network
        self.own, held_out = (
            datasets.target_samples(data, 0),
            datasets.held_out(data, range(LABELS)),
        )
        self.few_pair = self.own.images, self.own.labels
        self.judges = held_out.images, held_out.labels
        shape = tuple(held_out.images.shape[1:])
        torch.manual_seed(seed)
        start = make_generator(
            network.generator,
            shape,
            latent_dim=network.latent_dim,
            width=network.width,
            labels=LABELS,
        )
        self.trained: list[nn.Module] = []
        self.counts: list[list[int]] = []
        for k in range(data.source_count):
            own = datasets.source_samples(data, k)
            found, _ = train_source(
                start,
                self.make_critic,
                own.images,
                self.config.client.source,
                own_labels=own.labels,
                labels=LABELS,
                seed=1000 * seed + k,
            )
            self.trained.append(found.generator.eval())
            self.counts.append(label_counts(own.labels, LABELS))
        self.pool = Pool(self.trained, self.counts).eval()

    def figures(self, generator: nn.Module) -> dict[str, float]:
        """Return a generator's figures against the held-out digits, and whose samples it makes."""
        rows = [
            evaluate(
                generator,
                self.held_out,
                few=self.few,
                features=self.features,
                seed=draw,
                labels=LABELS,
            )
            for draw in range(DRAWS)
        ]
        energies = (
            energy_distance(generate(generator, MANY, labels=LABELS, seed=s), self.held_out)
            for s in range(TIMES)
        )
        return {name: statistics.fmean(row[name] for row in rows) for name in FIGURES} | {
            "energy": statistics.fmean(energies),
            "own source": self.own_source(generator),
        }

    def own_source(self, generator: nn.Module) -> float:
        """Return the share of samples that are nearest to those of the source with their label."""
        shares = []
        for label, owner in enumerate(self.pool.owner.tolist()):
            often = [float(label == each) for each in range(LABELS)]
            theirs = torch.cat(
                [
                    generate(s, DRAWN, labels=often, seed=k).flatten(1)
                    for k, s in enumerate(self.trained)
                ]
            )
            mine = generate(generator, DRAWN, labels=often, seed=99).flatten(1)
            nearest = torch.cdist(mine, theirs).argmin(1) // DRAWN
            shares.append(float((nearest == owner).double().mean()))
        return statistics.fmean(shares)


def run(seed: int, table: Table, overrides: str) -> None:
    """Merge, adapt and ternarize; add a row of each step."""
    bench = Conditional(overrides, seed)
    client, labels = bench.config.client, bench.own.labels
    made, seconds = timed(
        lambda: recursive_barycenter(
            bench.trained,
            [float(sum(counts)) for counts in bench.counts],
            stage=bench.config.strategy.stage,
            labels=LABELS,
            label_counts=bench.counts,
            seed=seed,
        )
    )
    steps = [("the pool", bench.pool, None), ("barycenter", made, seconds)]
    adapted, seconds = timed(
        lambda: adapt(
            made,
            bench.few,
            critic=bench.make_critic,
            settings=client.adaptation,
            labels=LABELS,
            few_labels=labels,
            seed=seed,
        )
    )
    steps.append(("adapted", adapted, seconds))
    small, seconds = timed(
        lambda: ternarize(adapted, settings=client.ternarization, labels=LABELS, seed=seed)
    )
    steps.append(("ternary", small, seconds))
    pools = 0.0
    for name, generator, seconds in steps:
        row = bench.figures(generator)
        pools = pools or row["energy"]
        row |= {"energy ratio": row["energy"] / pools}
        table[name].append(row | ({} if seconds is None else {"seconds": seconds}))
    everything = bench.everything.images, bench.everything.labels
    found = augmentation(small, bench.few_pair, bench.judges, real=everything, seed=seed)
    for name, key in (
        ("the few samples", "few"),
        ("ternary", "augmented"),
        ("as many real", "real"),
    ):
        rows = table[name]
        if name == "ternary":
            rows[-1]["accuracy"] = found[key]
        else:
            rows.append({"accuracy": found[key]})


def main() -> None:
    """Run the benchmark and print its table as Markdown after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("overrides", nargs="*", help="as for fl-wb")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table: Table = defaultdict(list)
    for seed in given.seeds:
        run(seed, table, " ".join(given.overrides))
        cells = [["", *COLUMNS]]
        for name, rows in table.items():
            found = ((c, [row[c] for row in rows if c in row]) for c in COLUMNS)
            cells.append([name, *(tables.mean(f, DIGITS.get(c, 3)) for c, f in found)])
        print(f"# after seed {seed}\n{tables.markdown(cells)}\n", flush=True)


if __name__ == "__main__":
    main()
