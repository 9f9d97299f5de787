"""The whole comparison: every baseline, on its own and with our adaptation, over seeds.

    python -m benchmarks.baselines digits [--output FOLDER] [overrides]
    python -m benchmarks.baselines mnist data.root=FOLDER [--output FOLDER] [overrides]

Each row is a run of the whole app, made of overrides as `fl-wb` takes them: ServerApp, strategies,
clients and messages, the nodes one after another in one process. What runs of one seed have in
common is trained once: sources keep their generators, and a merge is taken up from the folder of
the run before. Finished runs are skipped, so that a command that was stopped can be given again.
Prints the tables of all that is there, as ``fl-wb-report FOLDER`` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from fl_wb.app.config import compose
from fl_wb.app.provenance import comparable, provenance
from fl_wb.app.schema import Config
from fl_wb.client_app import app as client_app
from fl_wb.commands.report import markdown, read
from fl_wb.server_app import app as server_app
from fl_wb.testing.in_process_grid import InProcessGrid

COMMON = "client.evaluation.draws=5 client.evaluation.bank=true"
CURVE = "client.evaluation.snapshots=8"
DATA = {
    "digits": "data=digits",
    # 160 s of one core a source, and 1,000 samples, with which an exact W1 takes a second
    "mnist": "data=mnist data.held_out=0.2 client.source.iterations=8000"
    " client.evaluation.samples=1000",
}
# fine-tuning for as many seconds as `client=default` adapts for, with the network of the data
PLAIN = {"digits": "plain", "mnist": "plain client.adaptation.training.iterations=450"}
FULL = ("overlapping", "non_overlapping")  # experiments with every row
FEW = (5, 20, 100)  # samples a class, beside the usual 10
BARE = "client.ternarize=false"


@dataclass(frozen=True)
class Group:
    """The runs of one experiment and seed, which share their sources."""

    base: str
    plain: str
    experiment: str
    seed: int
    folder: Path
    counts: tuple[int, ...]
    trained: dict[str, Path] = field(default_factory=dict)  # merges, by what made them

    def rows(self, count: int) -> list[str]:
        """Return the overrides of each run with so many samples a class, in the order to run."""
        sources = range(compose(f"experiment={self.experiment}").data.source_count)
        transfers = [f"strategy=transfer strategy.source={k}" for k in sources]
        fedavg, ensemble = "strategy=fedavg", "strategy=ensemble"
        edge, ours = "strategy=edge_only", "strategy=adaptive_coalescence"
        if self.experiment not in FULL:
            bare = [f"{start} client=default" for start in (*transfers, ensemble)]
        elif count == 10:
            starts = (*transfers, fedavg, ensemble, edge)
            bare = [f"{start} client={c}" for start in starts for c in (self.plain, "default")]
            bare += ["strategy=paper client=paper", "strategy=paper client=default"]
            bare += [f"{ours} {CURVE} client={self.plain}"]
        else:
            bare = [f"{start} client=default" for start in (*transfers, ours)]
            bare += [f"{start} client={self.plain}" for start in (edge, ours)]
        rows = [f"{row} {BARE}" for row in bare]
        if count == 10:
            rows += [f"{ours} client=default {CURVE}"]
            if self.experiment in FULL:
                rows += [f"{ours} client.ternarization.threshold_lr=0"]
        return rows

    def jobs(self) -> list[str]:
        """Return the overrides of all runs. What displaces the kept sources comes last."""
        rows = [
            f"{row} data.samples_per_class={count}"
            for count in self.counts
            for row in self.rows(count)
        ]
        if self.experiment in FULL and 10 in self.counts:
            # as many iterations as two sources together
            iterations = 2 * compose(self.base).client.source.iterations
            full = f"strategy=full_data client.source.iterations={iterations}"
            rows.append(f"{full} client={self.plain} {BARE} data.samples_per_class=10")
        return [
            f"{self.base} {COMMON} experiment={self.experiment} seed={self.seed} {row}"
            for row in rows
        ]

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
        own = overrides.replace(f"{self.base} {COMMON} ", "")
        output = self.folder / re.sub(r"[^\w.=-]+", "_", own)
        began, config = time.perf_counter(), compose(overrides)
        made = str(config.strategy)
        if (output / "metrics.json").exists():
            check_version(output / "metrics.json", config)
            if (output / "barycenter" / "stages").exists():
                self.trained[made] = output / "barycenter"
            return
        if made in self.trained:
            # the stages alone: the nodes of another run are none of this one's
            stages = output / "barycenter" / "stages"
            shutil.copytree(self.trained[made] / "stages", stages, dirs_exist_ok=True)
        settings = {"overrides": overrides, "output": str(output)}
        grid = InProcessGrid(client_app, run_config=settings)
        nodes = config.data.source_count + len(config.data.targets)
        for node in range(nodes):
            cache = str(self.folder / "sources")
            grid.add({"partition-id": node, "num-partitions": nodes, "cache": cache})
        server_app(grid, Context(1, 1, {}, RecordDict(), settings))
        if (output / "barycenter" / "stages").exists():
            self.trained[made] = output / "barycenter"
        print(f"{time.perf_counter() - began:6.1f} s  {output.name}", flush=True)


def check_version(result: Path, config: Config) -> None:
    """Refuse to mix the results of two versions; SystemExit says which file is of another."""
    found = comparable(json.loads(result.read_text()).get("made-by", {}))
    if found != (ours := comparable(provenance(config))):
        raise SystemExit(f"{result} is of version {found}, not {ours}: use another --output")


def main() -> None:
    """Run the comparison in some processes, one thread each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--output", type=Path, default=Path("baselines"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--samples", type=int, nargs="+", default=[10, *FEW])
    parser.add_argument("--experiments", nargs="+", default=[*FULL, "three_sources", "unequal"])
    parser.add_argument("--workers", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    base = " ".join([DATA[arguments.data], *overrides])
    compose(base)  # refuses what is wrong before anything starts
    groups = [
        Group(
            base,
            PLAIN[arguments.data],
            experiment,
            seed,
            arguments.output.resolve() / arguments.data / f"{experiment}-{seed}",
            tuple(arguments.samples if experiment in FULL else (10,)),
        )
        for experiment in arguments.experiments
        for seed in arguments.seeds
    ]
    began = time.perf_counter()
    # without this, a parent that is told to stop leaves its workers running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # Fresh processes: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for done in pool.imap_unordered(Group.run, groups):
            print(f"# {done}", flush=True)
    print(f"# all: {time.perf_counter() - began:.0f} s")
    print(markdown(read([arguments.output])))


if __name__ == "__main__":
    main()
