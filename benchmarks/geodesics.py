"""The barycenter on measures whose answer is known: Gaussians in the plane.

    python -m benchmarks.geodesics [--seeds 0 1 2]

Two Gaussians, means 4 apart, standard deviation 0.5, merged at t: (W1(nu, mu1) + W1(nu, mu2)) /
W1(mu1, mu2), which is 1 on a geodesic; how far the mean is from (1-t) m1 + t m2; and the share of
samples nearest the second mean. Four separated sources of weights .4, .3, .2, .1, merged in two
orders: the largest error of a share. Three corners of an equilateral triangle: the objective over
that of POT's linear programme on the same samples. Exact transport on 2,000 samples (triangle:
60), shipped settings of a stage.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict

import numpy as np
import ot
import torch
from torch import Tensor

from fl_wb.barycenter import GEODESICS, optimality_gap, recursive_barycenter
from fl_wb.generators.sampling import generate
from fl_wb.transport import wasserstein1
from tests.points import Gaussian

WEIGHTS = (0.4, 0.3, 0.2, 0.1)
Columns = dict[str, list[float]]


def shares(samples: Tensor, means: list[tuple[float, float]]) -> Tensor:
    """Share of samples nearest each mean."""
    nearest = torch.cdist(samples, torch.tensor(means)).argmin(1)
    return nearest.bincount(minlength=len(means)) / len(samples)


def two(seed: int, table: dict[str, Columns]) -> None:
    """Two Gaussians, by each geodesic and t."""
    means = [(-2.0, 0.0), (2.0, 0.0)]
    sources = [Gaussian(mean) for mean in means]
    first, second = (generate(g, 2000, seed=k + 1) for k, g in enumerate(sources))
    for geodesic in GEODESICS:
        for t in (0.25, 0.5, 0.75):
            began = time.process_time()
            nu = recursive_barycenter(sources, [1 - t, t], geodesic=geodesic, seed=seed)
            seconds = time.process_time() - began
            x = generate(nu, 2000, seed=7)
            sums = wasserstein1(x, first) + wasserstein1(x, second)
            row = table[f"{geodesic}, t = {t}"]
            row["(W1 + W1) / W1"].append(sums / wasserstein1(first, second))
            row["error of the mean"].append(
                (x.mean(0) - torch.lerp(*torch.tensor(means), t)).norm().item()
            )
            row["share of the second"].append(shares(x, means)[1].item())
            row["seconds"].append(seconds)


def four(seed: int, table: dict[str, Columns]) -> None:
    """Four sources of unequal weights, in two orders of arrival."""
    means = [(-3.0, -3.0), (3.0, -3.0), (-3.0, 3.0), (3.0, 3.0)]
    for name, order in (("heaviest first", [0, 1, 2, 3]), ("lightest first", [3, 2, 1, 0])):
        nu = recursive_barycenter(
            [Gaussian(means[k]) for k in order], [WEIGHTS[k] for k in order], seed=seed
        )
        error = (shares(generate(nu, 4000, seed=7), means) - torch.tensor(WEIGHTS)).abs().max()
        table[f"four sources, mixture, {name}"]["largest error of a share"].append(error.item())


def triangle(seed: int, table: dict[str, Columns]) -> None:
    """Three corners: the objective over the linear programme's optimum."""
    means = [
        (2 * math.cos(a), 2 * math.sin(a))
        for a in (math.pi / 2 + 2 * math.pi / 3 * k for k in range(3))
    ]
    sources = [Gaussian(mean) for mean in means]
    samples = [generate(g, 60, seed=k + 1) for k, g in enumerate(sources)]
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7))
    optimum = linear_programme(samples, torch.cat([*samples, grid]))
    for geodesic in GEODESICS:
        nu = recursive_barycenter(sources, geodesic=geodesic, seed=seed)
        objective, bound = optimality_gap(generate(nu, 60, seed=7), samples)
        row = table[f"triangle, {geodesic}"]
        row["objective / optimum"].append(objective / optimum)
        row["bound / optimum"].append(bound / optimum)


def linear_programme(samples: list[Tensor], support: Tensor) -> float:
    """Least mean W1 to sample sets, over measures on a support that begins with these sets."""
    cost = torch.cdist(support.double(), support.double()).numpy()
    histograms = np.zeros((len(support), len(samples)))
    begin = 0
    for k, part in enumerate(samples):
        histograms[begin : begin + len(part), k] = 1 / len(part)
        begin += len(part)
    nu = np.clip(ot.lp.barycenter(histograms, cost), 0, None)
    return statistics.fmean(ot.emd2(nu / nu.sum(), h.copy(), cost) for h in histograms.T)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    torch.set_num_threads(1)
    table: dict[str, Columns] = defaultdict(lambda: defaultdict(list))
    for seed in parser.parse_args().seeds:
        for work in (two, four, triangle):
            work(seed, table)
    for name, columns in table.items():
        cells = [
            f"{key} {statistics.fmean(v):.3f}" + (f" (worst {max(v):.3f})" if len(v) > 1 else "")
            for key, v in columns.items()
        ]
        print(f"- {name}: " + "; ".join(cells))


if __name__ == "__main__":
    main()
