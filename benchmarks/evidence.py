"""The whole comparison: every baseline, on its own and with our adaptation, over seeds.

    python -m benchmarks.evidence digits [--output FOLDER] [overrides]
    python -m benchmarks.evidence mnist data.root=FOLDER [--output FOLDER] [overrides]
    fl-wb-report FOLDER [--plots FOLDER]

Each row is a run of the whole app, made of overrides as `fl-wb` takes them: ServerApp, strategies,
clients and messages, the nodes one after another in one process. What runs of one seed have in
common is trained once: sources keep their generators, and a merge is taken up from the folder of
the run before. Finished runs are skipped, so that a command that was stopped can be given again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from fl_wb.client_app import app as client_app
from fl_wb.config import compose
from fl_wb.server_app import app as server_app
from tests.flower import InProcessGrid

COMMON = "client.evaluation.draws=5 client.evaluation.bank=true"
CURVE = "client.evaluation.snapshots=8"
DATA = {
    "digits": "data=digits",
    # 240 s of one core a source, and 1,000 samples, with which an exact W1 takes a second
    "mnist": "data=mnist client.source.iterations=8000 client.evaluation.samples=1000",
}
FULL = ("overlapping", "non_overlapping")  # experiments with every row
FEW = (5, 20, 100)  # samples a class, beside the usual 10
PLAIN, OURS, BARE = "client=plain", "client=default", "client.ternarize=false"


@dataclass(frozen=True)
class Group:
    """The runs of one experiment and seed, which share their sources."""

    base: str
    experiment: str
    seed: int
    folder: Path
    counts: tuple[int, ...]
    trained: dict[str, Path] = field(default_factory=dict)  # merges, by what made them

    def rows(self, count: int) -> list[str]:
        """Return the overrides of each run with so many samples a class, in the order to run."""
        sources = range(len(compose(f"experiment={self.experiment}").data.sources))
        transfers = [f"strategy=transfer strategy.source={k}" for k in sources]
        if self.experiment not in FULL:
            starts, both = [*transfers, "strategy=ensemble"], []
        elif count != 10:
            starts, both = [], transfers
        else:
            starts = []
            both = [*transfers, "strategy=fedavg", "strategy=ensemble", "strategy=edge_only"]
        rows = [f"{start} {OURS} {BARE}" for start in starts]
        rows += [f"{start} {client} {BARE}" for start in both for client in (PLAIN, OURS)]
        if self.experiment in FULL and count != 10:
            rows += [f"strategy=edge_only {PLAIN} {BARE}"]
        if count == 10:
            rows += [f"strategy=paper client=paper {BARE}", f"strategy=paper {OURS} {BARE}"]
        rows += [f"strategy=adaptive_coalescence {OURS} {CURVE}"]
        if self.experiment in FULL:
            rows += [f"strategy=adaptive_coalescence {PLAIN} {CURVE} {BARE}"]
        return rows

    def jobs(self) -> list[str]:
        """Return the overrides of all runs. Those that displace kept sources come last."""
        rows = [
            f"{row} data.samples_per_class={count}"
            for count in self.counts
            for row in self.rows(count)
        ]
        if self.experiment in FULL and 10 in self.counts:
            learned = f"strategy=adaptive_coalescence {OURS} client.ternarization.threshold_lr=0"
            rows += [f"{learned} data.samples_per_class=10"]
            rows += [f"strategy=full_data {PLAIN} {BARE} data.samples_per_class=10"]
        fixed = f"{self.base} {COMMON} experiment={self.experiment} seed={self.seed}"
        return [f"{fixed} {row}" for row in rows]

    def run(self) -> str:
        """Run what is not there yet; return the time that it took."""
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        began = time.perf_counter()
        for overrides in self.jobs():
            self.run_one(overrides)
        title = f"{self.experiment}, seed {self.seed}"
        return f"{title}: {time.perf_counter() - began:.0f} s"

    def run_one(self, overrides: str) -> None:
        """Run the app with these overrides, its nodes in this process."""
        output = self.folder / re.sub(r"[^\w.=-]+", "_", overrides.replace(self.base, "").strip())
        if (output / "metrics.json").exists():
            return
        began, config = time.perf_counter(), compose(overrides)
        made = str(config.strategy)
        if made in self.trained:
            shutil.copytree(self.trained[made], output / "barycenter", dirs_exist_ok=True)
        settings = {"overrides": overrides, "output": str(output)}
        grid = InProcessGrid(client_app, run_config=settings)
        nodes = len(config.data.sources) + len(config.data.targets)
        for node in range(nodes):
            cache = str(self.folder / "sources")
            grid.add({"partition-id": node, "num-partitions": nodes, "cache": cache})
        server_app(grid, Context(1, 1, {}, RecordDict(), settings))
        if (output / "barycenter").exists():
            self.trained[made] = output / "barycenter"
        print(f"{time.perf_counter() - began:6.1f} s  {output.name}", flush=True)


def main() -> None:
    """Run the comparison in some processes, one thread each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--output", type=Path, default=Path("evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, nargs="+", default=[10, *FEW])
    parser.add_argument("--experiments", nargs="+", default=[*FULL, "three_sources", "unequal"])
    parser.add_argument("--workers", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    base = " ".join([DATA[arguments.data], *overrides])
    compose(base)  # refuses what is wrong before anything starts
    groups = [
        Group(
            base,
            experiment,
            seed,
            arguments.output.resolve() / arguments.data / f"{experiment}-{seed}",
            tuple(arguments.samples if experiment in FULL else (10,)),
        )
        for experiment in arguments.experiments
        for seed in arguments.seeds
    ]
    began = time.perf_counter()
    # Fresh processes: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for done in pool.imap_unordered(Group.run, groups):
            print(f"# {done}", flush=True)
    print(f"# all: {time.perf_counter() - began:.0f} s; fl-wb-report {arguments.output}")


if __name__ == "__main__":
    main()
