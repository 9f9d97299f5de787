"""Continual learning: sources of other digits arrive one a round, and leave again.

    python -m benchmarks.stream [--seeds 10 11 12] [--plot stream.png]

The networks and the training of examples/gan, 1,200 steps a node. In round r node r alone takes
part, with digits 2r - 2 and 2r - 1; it starts from the global generator. After each round the
global generator is compared with held-out digits of all classes seen so far: FedAvg's, ours, and
one generator trained anew on all digits seen (r times as many steps), which no node has: the
ceiling. Figures are means of draws, given as mean and standard deviation over the seeds. --plot
draws the Frechet distance by round, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from benchmarks.quality import DRAWS
from benchmarks.rounds import BATCH, digits, everything, task
from fl_wb.generators.sampling import generate
from fl_wb.metrics import Reference, train_features
from fl_wb.reporting import tables
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid

NODES, STEPS = 5, 1200
METHODS = ("FedAvg", "AdaptiveCoalescence", "retrained on everything")
FIGURES = ("frechet", "energy", "coverage")

Found = dict[tuple[str, str], list[list[float]]]
"""Of each method and figure: by seed, by round."""


def trained(generator: nn.Module, images: Tensor, steps: int, seed: int) -> nn.Module:
    """Train a generator, in place, against a fresh discriminator."""
    torch.manual_seed(seed)
    task.train(generator, task.Discriminator(), images, round(steps / -(-len(images) // BATCH)))
    return generator.eval()


def compared(generator: nn.Module, reference: Reference, n: int) -> dict[str, float]:
    """Return the figures of a generator."""
    drawn = (generate(generator, n, seed=s, latent_dim=task.LATENT) for s in range(DRAWS))
    rows = [reference.compare(samples) for samples in drawn]
    return {name: statistics.fmean(row[name] for row in rows) for name in FIGURES}


def run(method: str, seed: int) -> list[dict[str, float]]:
    """Return the figures after each round."""
    images, held_out = digits("classes", NODES, seed)
    unseen, features = held_out.tensor_split(NODES), train_features(*everything())
    rounds: list[dict[str, float]] = []

    def judge(generator: nn.Module) -> None:
        seen = torch.cat(unseen[: len(rounds) + 1])
        rounds.append(compared(generator, Reference(seen, features=features), len(seen)))

    if method == METHODS[2]:
        for r in range(1, NODES + 1):
            torch.manual_seed(seed)
            judge(trained(task.Generator(), torch.cat(images[:r]), r * STEPS, seed))
        return rounds

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        generator = task.Generator()
        generator.load_state_dict(message.content["arrays"].to_torch_state_dict())
        trained(generator, images[node], STEPS, 100 * seed + node)
        arrays = ArrayRecord(generator.state_dict())
        metrics = MetricRecord({"num-examples": len(images[node])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app)

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        grid.nodes.clear()  # they are evaluated before the first round and after each
        grid.add({"partition-id": server_round}, node_id=11 + server_round)
        if server_round:
            generator = task.Generator()
            generator.load_state_dict(arrays.to_torch_state_dict())
            judge(generator.eval())

    torch.manual_seed(seed)
    strategy_of(method, seed).start(
        grid=grid,
        initial_arrays=ArrayRecord(task.Generator().state_dict()),
        num_rounds=NODES,
        evaluate_fn=evaluate,
    )
    return rounds


def strategy_of(method: str, seed: int) -> Strategy:
    """Return the strategy of a method."""
    alone = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    if method == METHODS[0]:
        return FedAvg(**alone)
    return AdaptiveCoalescence(
        **alone,
        generator=task.Generator,
        critic=task.Discriminator,
        latent_dim=task.LATENT,
        seed=seed,
        callback=lambda *_: None,
    )


def table(found: Found) -> str:
    """Lay out the figures by round, as Markdown."""
    cells = [["", "after round", *map(str, range(1, NODES + 1))]]
    for (method, figure), seeds in found.items():
        by_round = [[rounds[r] for rounds in seeds] for r in range(NODES)]
        cells.append([method, figure, *map(tables.mean, by_round)])
    return tables.markdown(cells)


def draw(found: Found, path: Path) -> None:
    """Draw the Frechet distance by round: means over the seeds and their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, number = figure.subplots(), range(1, NODES + 1)
    for method in METHODS:
        by_round = [[rounds[r - 1] for rounds in found[method, FIGURES[0]]] for r in number]
        (line,) = axes.plot(number, list(map(statistics.fmean, by_round)), label=method)
        ends = list(map(min, by_round)), list(map(max, by_round))
        axes.fill_between(number, *ends, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="round: two more digits in each", ylabel="Frechet distance", yscale="log")
    axes.set_xticks(number)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all methods; print the table after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--plot", type=Path, help="where to draw")
    given = parser.parse_args()
    if given.plot and not importlib.util.find_spec("matplotlib"):
        parser.error('--plot needs matplotlib, which is not installed: pip install "fl-wb[plots]"')
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    found: Found = defaultdict(list)
    for seed in given.seeds:
        for method in METHODS:
            rounds = run(method, seed)
            for name in FIGURES:
                found[method, name].append([row[name] for row in rounds])
        print(f"# after seed {seed}\n{table(found)}\n", flush=True)
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
