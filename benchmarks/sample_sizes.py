"""How far figures spread over the choice of samples, and what they take, by the number of samples.

``python -m benchmarks.sample_sizes FOLDER`` with a folder of IDX files: half of its images, made
noisy, are compared with as many of the other half, several times. Seconds are of one core's time.
"""

from __future__ import annotations

import argparse
from statistics import fmean, stdev
from time import process_time

import torch

from fl_wb.data.datasets import DataConfig, load
from fl_wb.metrics import Reference, train_features
from fl_wb.reporting.tables import summary_table

NOISE, FEW, TIMES = 0.3, 100, 4


def main() -> None:
    """Run the command line interface."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, other = load(DataConfig(name="idx", root=arguments.root, held_out=0.5))
    features, few = train_features(first.images, first.labels), first.images[:FEW]
    rng = torch.Generator().manual_seed(0)
    noisy = (first.images + NOISE * torch.randn(first.images.shape, generator=rng)).clamp(-1, 1)
    rows: dict[str, dict[str, float]] = {}
    for size in arguments.sizes:
        found, began = [], process_time()
        for seed in range(TIMES):
            rng = torch.Generator().manual_seed(seed)
            x = noisy[torch.randperm(len(noisy), generator=rng)[:size]]
            y = other.images[torch.randperm(len(other), generator=rng)[:size]]
            found.append(Reference(y, few=few, features=features).compare(x))
        seconds = (process_time() - began) / TIMES
        columns = {name: [figures[name] for figures in found] for name in found[0]}
        rows[f"{size}, mean"] = {k: fmean(v) for k, v in columns.items()} | {"seconds": seconds}
        rows[f"{size}, spread"] = {name: stdev(values) for name, values in columns.items()}
    print(summary_table(rows))


if __name__ == "__main__":
    main()
