"""Round after round: FedAvg, adaptive coalescence and the chain of pairs, on the example's GAN.

    python -m benchmarks.rounds FOLDER [--splits classes iid] [--nodes 4 20] [--seeds 10 11 12]
        [--methods fedavg ours chain] [--rounds 10] [--fraction 0.3]

The networks, their training and the digits of examples/gan, on nodes that keep their
discriminators; about 400 steps a node and round. `classes`: each node has digits of its own;
`dirichlet0.1`, `dirichlet0.4`, `iid`: see `fl_wb.data.partition`. After each round the global
generator is compared with held-out digits, and so is the pool, the exact mixture of the nodes'
latest generators; figures are means of draws. Seconds are of one core's time (one thread), of the
server alone.

Each finished run is a line of FOLDER/rounds.jsonl: what is there is not run again. Prints a table
of all that is there, and draws it (FOLDER/rounds.png) where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import random
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.quality import DRAWS
from fl_wb.data.partition import deal, piles
from fl_wb.generators.mixture import Mixture
from fl_wb.generators.sampling import generate
from fl_wb.metrics import Reference, train_features
from fl_wb.persistence.tensor_files import write_atomic
from fl_wb.reporting import tables
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid

TASK = Path(__file__).parents[1] / "examples" / "gan" / "after" / "gan_app" / "task.py"
_spec = importlib.util.spec_from_file_location("benchmarks.gan_task", TASK)
assert _spec is not None
assert _spec.loader is not None
task = importlib.util.module_from_spec(_spec)  # under a name of its own: apps have one of that
_spec.loader.exec_module(task)

SPLITS = ("classes", "dirichlet0.1", "dirichlet0.4", "iid")
METHODS = ("fedavg", "ours", "chain")
STEPS, BATCH = 400, 64
SHOWN = (1, 2, 3, 5, 8, 10)  # rounds in the table
FIGURES = ("energy", "coverage")


@dataclass(frozen=True)
class Run:
    """What is run."""

    split: str
    nodes: int
    fraction: float
    method: str
    seed: int


def everything() -> tuple[Tensor, Tensor]:
    """Return all digits, as the example has them, and their labels."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    return images, torch.tensor(bunch.target)


def digits(split: str, nodes: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Return each node's training images, and held-out ones, class by class."""
    images, labels = everything()
    order = labels.argsort(stable=True)
    test = torch.arange(len(order)) % 5 == 0
    held_out, order = images[order[test]], order[~test]
    if split == "classes":
        return [images[part] for part in order.tensor_split(nodes)], held_out
    name, alpha = ("iid", 1.0) if split == "iid" else ("dirichlet", float(split[9:]))
    there = piles(labels[order].numpy(), seed)
    dealt = deal(there, name, [], nodes, alpha=alpha, per_source=1, seed=seed)
    own = [torch.cat([torch.from_numpy(pile) for pile in each.values()]) for each in dealt]
    return [images[order[part]] for part in own], held_out


class Federation:
    """The nodes of a run, and what they know of their generators."""

    def __init__(self, run: Run) -> None:
        self.images, self.held_out = digits(run.split, run.nodes, run.seed)
        self.reference = Reference(self.held_out, features=train_features(*everything()))
        self.latest: dict[int, nn.Module] = {}  # of each node that has trained
        self.app, self.ended, self.rounds = ClientApp(), 0.0, list[dict[str, float]]()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            node = int(context.node_config["partition-id"])
            server_round = message.content["config"]["server-round"]
            torch.manual_seed(10_000 * run.seed + 100 * server_round + node)
            generator, discriminator = task.Generator(), task.Discriminator()
            generator.load_state_dict(message.content["arrays"].to_torch_state_dict())
            if "discriminator" in context.state:
                kept = context.state["discriminator"].to_torch_state_dict()
                discriminator.load_state_dict(kept)
            images = self.images[node]
            epochs = round(STEPS / -(-len(images) // BATCH))
            task.train(generator, discriminator, images, epochs)
            context.state["discriminator"] = ArrayRecord(discriminator.state_dict())
            self.latest[node], self.ended = generator.eval(), process_time()
            arrays = ArrayRecord(generator.state_dict())
            metrics = MetricRecord({"num-examples": len(images)})
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> None:
        """Compare the global generator and the pool with held-out digits."""
        if not server_round:
            return
        seconds = process_time() - self.ended
        generator = task.Generator()
        generator.load_state_dict(arrays.to_torch_state_dict())
        nodes = sorted(self.latest)
        weights = [float(len(self.images[node])) for node in nodes]
        pool = Mixture([self.latest[node] for node in nodes], weights, latent_dim=task.LATENT)
        row = {"seconds": seconds, **self.figures(generator.eval())}
        row |= {f"pool {name}": value for name, value in self.figures(pool.eval()).items()}
        self.rounds.append(row)

    def figures(self, generator: nn.Module) -> dict[str, float]:
        """Return the figures of a generator."""
        n = len(self.held_out)
        drawn = (generate(generator, n, seed=s, latent_dim=task.LATENT) for s in range(DRAWS))
        rows = [self.reference.compare(samples) for samples in drawn]
        return {name: statistics.fmean(row[name] for row in rows) for name in FIGURES}


def strategy_of(run: Run) -> Strategy:
    """Return the strategy of a run."""
    shared = {"fraction_train": run.fraction, "fraction_evaluate": 0.0, "min_train_nodes": 1}
    if run.method == "fedavg":
        return FedAvg(**shared)
    return AdaptiveCoalescence(
        **shared,
        generator=task.Generator,
        critic=task.Discriminator,
        latent_dim=task.LATENT,
        fan_in=2 if run.method == "chain" else None,
        seed=run.seed,
        callback=lambda *_: None,
    )


def rounds_of(run: Run, number: int) -> list[dict[str, float]]:
    """Run a federation; return the figures after each round."""
    torch.manual_seed(run.seed)
    random.seed(run.seed)  # by which strategies sample nodes
    federation = Federation(run)
    strategy_of(run).start(
        grid=InProcessGrid(federation.app, nodes=run.nodes),
        initial_arrays=ArrayRecord(task.Generator().state_dict()),
        num_rounds=number,
        evaluate_fn=federation.evaluate,
    )
    return federation.rounds


Found = dict[Run, list[dict[str, float]]]


def load(path: Path) -> Found:
    """Return the finished runs."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {Run(**entry["run"]): entry["rounds"] for entry in map(json.loads, lines)}


def save(path: Path, found: Found) -> None:
    """Write the finished runs, a line each, in one step."""
    entries = [{"run": asdict(run), "rounds": rounds} for run, rounds in found.items()]
    write_atomic(path, "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())


def by_row(found: Found) -> dict[tuple[str, str], list[list[dict[str, float]]]]:
    """Return the runs of all seeds, by what they ran on and the method."""
    rows = defaultdict(list)
    for run, rounds in found.items():
        part = "" if run.fraction == 1 else f", {run.fraction:g} of them a round"
        rows[f"{run.split}, {run.nodes} nodes{part}", run.method].append(rounds)
    return rows


def table(found: Found) -> str:
    """Lay out energy, coverage and the server's seconds by round, as Markdown."""
    last = max(map(len, found.values()))
    shown = [r for r in SHOWN if r <= last]
    cells = [["", "(the pool's) after round", *map(str, shown), "seconds a round"]]
    for (title, method), runs in by_row(found).items():
        for name in FIGURES:
            row = [title, f"{method}, {name}"]
            for number in shown:
                there = [rounds[number - 1] for rounds in runs if len(rounds) >= number]
                mine, pool = ([each[key] for each in there] for key in (name, f"pool {name}"))
                row.append(f"{tables.mean(mine)} ({statistics.fmean(pool):.3f})" if there else "")
            seconds = [statistics.fmean(each["seconds"] for each in rounds) for rounds in runs]
            cells.append([*row, tables.mean(seconds, 1) if name == FIGURES[0] else ""])
    return tables.markdown(cells)


def draw(found: Found, path: Path) -> None:
    """Draw the figures by round: means over the seeds, their range, and the pool's, dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = by_row(found)
    titles = list(dict.fromkeys(title for title, _ in rows))
    figure = Figure(figsize=(4 * len(titles), 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(titles), sharex=True, sharey="row", squeeze=False)
    for (title, method), runs in rows.items():
        for axes, name in zip(grid[:, titles.index(title)], FIGURES, strict=True):
            number = range(1, min(map(len, runs)) + 1)
            by_round = [[rounds[r - 1][name] for rounds in runs] for r in number]
            pool = [
                statistics.fmean(rounds[r - 1][f"pool {name}"] for rounds in runs) for r in number
            ]
            (line,) = axes.plot(number, list(map(statistics.fmean, by_round)), label=method)
            colour = line.get_color()
            axes.plot(number, pool, ":", color=colour)
            axes.fill_between(
                number,
                list(map(min, by_round)),
                list(map(max, by_round)),
                color=colour,
                alpha=0.15,
                lw=0,
            )
            axes.set(title=title if name == FIGURES[0] else "", ylabel=name)
    grid[1, 0].set_xlabel("round")
    grid[0, 0].legend()
    figure.savefig(path)


def main() -> None:
    """Run what is not there yet, and show all that is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the nodes in a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "rounds.jsonl"
    for seed, split, nodes, method in itertools.product(
        given.seeds, given.splits, given.nodes, given.methods
    ):
        run = Run(split, nodes, given.fraction, method, seed)
        if len(load(path).get(run, ())) < given.rounds:
            print(f"# {run}", flush=True)
            found = rounds_of(run, given.rounds)
            save(path, load(path) | {run: found})
    print(table(load(path)))
    if importlib.util.find_spec("matplotlib"):
        draw(load(path), given.folder / "rounds.png")


if __name__ == "__main__":
    main()
