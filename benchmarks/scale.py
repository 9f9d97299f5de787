"""Many sources in one stage, beside the paper's recursion: quality, core seconds, shares.

    python -m benchmarks.scale [--sources 2 10] [--seeds 10 11 12] [--chain] [overrides]

K sources of digits of one class each (of two sources, five each), trained as shipped;
their barycenter in one stage and, with --chain, in K - 1 (`fan_in=2`), against held-out digits and
beside the exact pool of the sources. Figures are means of five draws, given as mean and standard
deviation over the seeds; ratios are to the pool's. `least` and `most` are the smallest and the
largest share of a source in the barycenter's samples (by the nearest of all sources' samples),
over its weight. Seconds are of one core's time (`time.process_time`, one thread).
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor, nn

from benchmarks.quality import Bench, Table, timed
from fl_wb.barycenter import recursive_barycenter
from fl_wb.generators.mixture import Mixture
from fl_wb.generators.sampling import generate
from fl_wb.reporting import tables

FIGURES = ("frechet", "energy", "coverage")
COLUMNS = (*FIGURES, "frechet ratio", "coverage ratio", "least", "most", "seconds")
DRAWN = 2000  # samples of each source that say which source a sample is of


def sources_of(k: int) -> str:
    """Return the override of K sources: five classes each of two, else one each, in turn."""
    if k == 2:
        return "data.sources=[[0,1,2,3,4],[5,6,7,8,9]]"
    return f"data.sources=[{','.join(f'[{i % 10}]' for i in range(k))}]"


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


def main() -> None:
    """Run the benchmark and print its table as Markdown after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--chain", action="store_true", help="the recursion of pairs, too")
    parser.add_argument("overrides", nargs="*", help="as for fl-wb")
    given = parser.parse_args()
    torch.set_num_threads(1)
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
