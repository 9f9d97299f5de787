"""A target's own barycenter: weights without training, beside training and other starts.

    python -m benchmarks.weights resembling|halves|mixed|dirichlet [overrides] [--seeds 10 11 12]
        [--starts]

Ten samples a class. `resembling`: ten sources of one class each, targets of 1, 2, 3, 5 and 10 of
these. `halves`: two sources of five classes each, targets of 2, 3 and 4 across both. `mixed` and
`dirichlet`: the experiments of these names. Sources are trained with the shipped settings, by the
seed, and merged once. Rows of each target: the barycenter itself (its weights the shares), uniform
weights, the paper's inverse radii, fitted weights, and what the app starts from: fitted weights
with, where samples ask for it, a gate. Then what training makes: of the app's start, adapted, then
ternary; of the barycenter and of uniform weights, adapted; the nearest source (by exact W1),
fine-tuned on the few samples and with our adaptation. With --starts, no row that trains.

Seconds are of one core's time (`time.process_time`, one thread), those of a ternary generator
without its adaptation's. Figures are means of five draws, given as mean and standard deviation over
the seeds; "mean" rows are of all targets. The last table is these rows alone, or, where targets are
not alike, the others.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks.quality import Bench, Table, markdown, timed
from fl_wb.adaptation import adapt, fit_weights, own_start
from fl_wb.app.config import compose
from fl_wb.barycenter import recursive_barycenter
from fl_wb.data import datasets
from fl_wb.generators.code import Code
from fl_wb.generators.reweighted import reweighted
from fl_wb.generators.sampling import generate
from fl_wb.ternary import ternarize
from fl_wb.transport import wasserstein1

EXPERIMENTS = {
    "resembling": "data.sources=[[0],[1],[2],[3],[4],[5],[6],[7],[8],[9]]"
    " data.targets=[[4],[0,4],[1,3,7],[2,3,5,8,9],[0,1,2,3,4,5,6,7,8,9]]",
    "halves": "data.sources=[[0,1,2,3,4],[5,6,7,8,9]] data.targets=[[4,9],[1,3,7],[2,5,8,9]]",
    "mixed": "experiment=mixed",
    "dirichlet": "experiment=dirichlet",
}
NEAREST = 500
"""Samples of each source that say which one is nearest."""

Make = Callable[[], nn.Module]


def rows_of(bench: Bench, sources: list[nn.Module], nu: nn.Module, code: Code) -> dict[str, Make]:
    """Return what makes each row's generator, in the order of the table."""
    few, client, seed = bench.few, bench.config.client, bench.seed
    plain = compose("client=paper").client.adaptation
    plain = replace(plain, training=replace(client.adaptation.training, iterations=800))
    made: dict[str, nn.Module] = {}

    def kept(name: str, make: Make) -> Make:
        def once() -> nn.Module:
            made[name] = make()
            return made[name]

        return once

    def weighed(method: str) -> nn.Module:
        return reweighted(nu, code, fit_weights(nu, code, few, method=method, seed=seed))

    def trained(start: nn.Module, settings: object = client.adaptation) -> nn.Module:
        return adapt(start, few, critic=bench.make_critic, settings=settings, seed=seed)  # type: ignore[arg-type]

    def nearest() -> nn.Module:
        def away(source: nn.Module) -> float:
            return float(wasserstein1(generate(source, NEAREST, seed=seed), few))

        return min(sources, key=away)

    return {
        "the barycenter (shares)": lambda: nu,
        "uniform weights": kept("uniform", lambda: weighed("uniform")),
        "inverse radii": lambda: weighed("radius"),
        "fitted weights": lambda: weighed("fitted"),
        "own start (fitted, gate)": kept("own", lambda: own_start(nu, code, few, seed=seed)),
        "own start, adapted": kept("adapted", lambda: trained(made["own"])),
        "own start, adapted, ternary": lambda: ternarize(
            made["adapted"], settings=client.ternarization, seed=seed
        ),
        "the barycenter, adapted": lambda: trained(nu),
        "uniform weights, adapted": lambda: trained(made["uniform"]),
        "the nearest source, fine-tuned": lambda: trained(nearest(), plain),
        "the nearest source, adapted": lambda: trained(nearest()),
    }


STARTS = 5
"""Rows, from the first, that train nothing."""


def run(name: str, seed: int, table: Table, overrides: str, starts: bool) -> None:
    """Merge the sources of an experiment, and measure all rows of all targets."""
    overrides = f"{EXPERIMENTS[name]} {overrides}"
    bench = Bench(overrides, seed)
    data, stage = bench.config.data, bench.config.strategy.stage
    sources = bench.sources()
    weights = [
        float(len(datasets.source_samples(data, k).images)) for k in range(data.source_count)
    ]
    nu = recursive_barycenter(sources, weights, critic=bench.make_critic, stage=stage, seed=seed)
    code = Code(weights)
    for k, classes in enumerate(data.targets):
        bench = Bench(overrides, seed, k)
        makes = list(rows_of(bench, sources, nu, code).items())
        for row, make in makes[:STARTS] if starts else makes:
            generator, seconds = timed(make)
            found = bench.of(generator) | {"seconds": seconds}
            table[f"target {','.join(map(str, classes))}: {row}"].append(found)
            table[f"mean: {row}"].append(found)


def main() -> None:
    """Run one experiment and print its table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("overrides", nargs="*", help="as for fl-wb, e.g. data=mnist data.root=DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: Table = defaultdict(list)
    for seed in arguments.seeds:
        overrides = " ".join(arguments.overrides)
        run(arguments.what, seed, table, overrides, arguments.starts)
        print(f"# after seed {seed}\n{markdown(table)}\n", flush=True)
    alike = arguments.what != "resembling"
    print(
        markdown({name: rows for name, rows in table.items() if name.startswith("mean") is alike})
    )


if __name__ == "__main__":
    main()
