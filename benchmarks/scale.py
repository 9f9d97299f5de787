"""Many sources in one stage, beside the paper's recursion: quality, core seconds, shares.

    python -m benchmarks.scale [overrides] [--sources 2 10] [--seeds 10 11 12] [--chain]
    python -m benchmarks.scale [overrides] --nodes 2 10 64 1000

K sources of digits of one class each (of two sources, five each; of more than ten, two each),
trained as shipped; their barycenter in one stage and, with --chain, in K - 1 (`fan_in=2`), against
held-out digits and beside the exact pool of the sources. Figures are means of five draws, given as mean and standard
deviation over the seeds; ratios are to the pool's. `least` and `most` are the smallest and the
largest share of a source in the barycenter's samples (by the nearest of all sources' samples),
over its weight. Seconds are of one core's time (`time.process_time`, one thread).

With --nodes, what a round costs the server: so many nodes send generators of the shipped network,
with weights drawn anew in every round, which cost as much as trained ones. Seconds are those of all
that the strategy does with the uploads, as ratios to the first number's of nodes: in the first
round, in the second, and in the second with `screening=3`. MB are the most that the process, one a
cell, has had beyond what it began with, the uploads included.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
from collections import defaultdict
from collections.abc import Sequence
from time import process_time
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from benchmarks.quality import Bench, Table, timed
from fl_wb.app.config import compose
from fl_wb.barycenter import recursive_barycenter
from fl_wb.generators.mixture import Mixture
from fl_wb.generators.networks import make_critic, make_generator
from fl_wb.generators.sampling import generate
from fl_wb.reporting import tables
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid

FIGURES = ("frechet", "energy", "coverage")
COLUMNS = (*FIGURES, "frechet ratio", "coverage ratio", "least", "most", "seconds")
DRAWN = 2000  # samples of each source that say which source a sample is of


def sources_of(k: int) -> str:
    """Return the override of K sources: five classes each of two, one of up to ten, else two."""
    if k == 2:
        return "data.sources=[[0,1,2,3,4],[5,6,7,8,9]]"
    classes = [[i % 10] if k <= 10 else [i % 10, (i + 1 + i // 10) % 10] for i in range(k)]
    return f"data.sources={classes}".replace(" ", "")


def found_shares(generator: nn.Module, sources: list[nn.Module]) -> Tensor:
    """Return the share (K,) of a generator's samples that is nearest to each source's."""
    theirs = torch.cat([generate(s, DRAWN, seed=k).flatten(1) for k, s in enumerate(sources)])
    mine = generate(generator, DRAWN, seed=99).flatten(1)
    nearest = torch.cat([torch.cdist(part, theirs).argmin(1) for part in mine.split(200)])
    return (nearest // DRAWN).bincount(minlength=len(sources)) / len(mine)


def run(k: int, seed: int, table: Table, overrides: str, chain: bool) -> None:
    """Merge K sources and compare."""
    bench = Bench(f"{sources_of(k)} {overrides}", seed)
    sources = bench.sources()
    exact = bench.of(Mixture(sources).eval())
    title = f"{k} sources"
    table[f"{title}: the pool itself"].append(exact)
    stage = bench.config.strategy.stage
    for name, fan_in in (("one stage", None), ("fan_in=2", 2))[: 1 + chain]:
        merged, seconds = timed(
            lambda fan_in=fan_in: recursive_barycenter(  # type: ignore[misc]
                sources, critic=bench.make_critic, stage=stage, fan_in=fan_in, seed=seed
            )
        )
        row = bench.of(merged) | {"seconds": seconds}
        row |= {f"{n} ratio": row[n] / exact[n] for n in ("frechet", "coverage")}
        ratio = found_shares(merged, sources) / found_shares(Mixture(sources).eval(), sources)
        row |= {"least": float(ratio.min()), "most": float(ratio.max())}
        table[f"{title}: {name}"].append(row)


def megabytes() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rounds_of(nodes: int, screening: float | None, overrides: str) -> list[float]:
    """Run two rounds; return the server's core seconds of each, and the memory."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = compose(overrides)
    network, shape = config.network, (1, 8, 8)

    def generator() -> nn.Module:
        return make_generator(
            network.generator, shape, latent_dim=network.latent_dim, width=network.width
        )

    app, marks = ClientApp(), list[float]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.manual_seed(1_000_000 * len(marks) + context.node_id)
        metrics = MetricRecord({"num-examples": 1})
        arrays = ArrayRecord(generator().state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    class Timed(AdaptiveCoalescence):
        def aggregate_train(self, *args: Any) -> Any:
            began = process_time()
            found = super().aggregate_train(*args)
            marks.append(process_time() - began)
            return found

    generator()(torch.randn(2, network.latent_dim))
    before = megabytes()
    Timed(
        min_available_nodes=1,
        generator=generator,
        critic=lambda: make_critic(network.critic, shape),
        stage=config.strategy.stage,
        screening=screening,
        callback=lambda *_: None,
    ).start(
        grid=InProcessGrid(app, nodes=nodes),
        initial_arrays=ArrayRecord(generator().state_dict()),
        num_rounds=2,
        evaluate_fn=lambda *_: None,
    )
    return [*marks, megabytes() - before]


def costs(numbers: Sequence[int], overrides: str) -> None:
    """Print what a round costs the server, for each number of nodes."""
    cells = [["nodes", "round 1", "round 2", "screened", "round 2, s", "MB"]]
    unit: list[float] = []
    for nodes in numbers:
        found = []
        for screening in (None, 3.0):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(rounds_of, (nodes, screening, overrides)))
        (first, second, memory), (_, screened, _) = found
        unit = unit or [first, second, second]
        ratios = (a / b for a, b in zip((first, second, screened), unit, strict=True))
        numbers_shown = [*(f"{ratio:.2f}" for ratio in ratios), f"{second:.1f}", f"{memory:.0f}"]
        cells.append([str(nodes), *numbers_shown])
        print(f"{tables.markdown(cells)}\n", flush=True)


def main() -> None:
    """Run the benchmark and print its table as Markdown after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--nodes", type=int, nargs="+", help="what a round costs, instead")
    parser.add_argument("--chain", action="store_true", help="the recursion of pairs, too")
    parser.add_argument("overrides", nargs="*", help="as for fl-wb")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.nodes:
        costs(given.nodes, " ".join(given.overrides))
        return
    table: Table = defaultdict(list)
    for seed in given.seeds:
        for k in given.sources:
            run(k, seed, table, " ".join(given.overrides), given.chain)
            cells = [["", *COLUMNS]]
            for name, rows in table.items():
                found = ([row[c] for row in rows if c in row] for c in COLUMNS)
                cells.append([name, *map(tables.mean, found)])
            print(f"# after seed {seed}, {k} sources\n{tables.markdown(cells)}\n", flush=True)


if __name__ == "__main__":
    main()
