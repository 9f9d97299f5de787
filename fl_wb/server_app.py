"""The ServerApp: merges the sources' generators and keeps what the targets made of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from logging import INFO
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from fl_wb.app.config import from_run_config, new_folder
from fl_wb.app.factories import factories
from fl_wb.app.results import Results
from fl_wb.app.schema import Config
from fl_wb.data import datasets
from fl_wb.generators.copies import seeded
from fl_wb.messages import records
from fl_wb.persistence.locks import locked
from fl_wb.persistence.stage_store import StageStore
from fl_wb.private_apis import is_simulated
from fl_wb.reporting.tracker import Tracker
from fl_wb.strategies import AdaptiveCoalescence, EdgeOnly, Ensemble, RoleFedAvg, Transfer

app = ServerApp()

TIME = "%Y-%m-%d/%H-%M-%S"  # a run's folder, as Hydra calls it
SIMULATION_SECONDS = 20.0  # in which a simulation has registered all its nodes


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the whole federation.

    Raises
    ------
    OSError
        If the output folder, the model or the result file cannot be written.
    RuntimeError
        If another run uses the output folder, no source delivered a generator, or no target
        evaluated one.
    """
    torch.set_num_threads(1)  # one thread: the same result bit for bit, and small networks faster
    config = from_run_config(context.run_config)
    output = Path(config.output or new_folder(f"{Path.home()}/fl-wb/{datetime.now():{TIME}}"))
    with locked(output):
        table = _run(grid, config, output, str(context.run_config.get("overrides", "")))
    for line in table.splitlines():
        log(INFO, line)
    log(INFO, "Results: %s", output)


def _run(grid: Grid, config: Config, output: Path, overrides: str) -> str:
    """Run the federation in a folder of its own; return the table of its results."""
    tracker = Tracker(output)
    generator, _ = factories(config)
    results = Results(tracker, config, generator, overrides)
    log(INFO, "Results go to %s", output)
    try:
        if config.superlink is None and (config.data.shape is None or config.data.name == "hub"):
            # Of nodes elsewhere, with data of their own, nothing is known here.
            results.dealt(datasets.who_has_what(config.data))
        strategy = make_strategy(config, results)
        wait_for_nodes(grid, config.nodes or config.data.source_count + len(config.data.targets))
        try:
            result = strategy.start(
                grid=grid,
                initial_arrays=records.to_arrays(seeded(generator, config.seed)),
                num_rounds=config.rounds,
                timeout=config.timeout,
            )
        except Exception as error:
            results.finish(Result(), error)
            raise
        table = results.finish(result)
        if isinstance(strategy, AdaptiveCoalescence):
            results.cells(result.arrays, strategy.shares, strategy.cells)
        return table
    finally:
        tracker.close()


def make_strategy(config: Config, results: Results) -> RoleFedAvg:
    """Return the strategy that the configuration names."""
    # All nodes are there when a run starts; one that leaves must not hold up the rest of it.
    arguments: dict[str, Any] = dict.fromkeys(
        ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1
    )
    said = config.strategy
    arguments |= {"observer": results, "max_share": said.max_share, "patience": said.patience}
    strategies: dict[str, Callable[[], RoleFedAvg]] = {
        "adaptive_coalescence": lambda: _coalescence(config, results, arguments),
        "fedavg": lambda: RoleFedAvg(**arguments),
        "transfer": lambda: Transfer(**arguments, source=config.strategy.source),
        "ensemble": lambda: Ensemble(**arguments),
        "edge_only": lambda: EdgeOnly(**arguments),
    }
    return strategies[config.strategy.name]()


def _coalescence(
    config: Config, results: Results, arguments: dict[str, Any]
) -> AdaptiveCoalescence:
    generator, critic = factories(config)
    return AdaptiveCoalescence(
        **arguments,
        generator=generator,
        critic=critic,
        labels=config.network.labels,
        stage=config.strategy.stage,
        seed=config.seed,
        store=StageStore(results.output / "barycenter", seconds=config.strategy.checkpoint_seconds),
        device=config.device,
        screening=config.strategy.screening,
        callback=results.stage,
    )


def wait_for_nodes(grid: Grid, number: int) -> None:
    """Wait until that many nodes are connected, as Flower's strategies do.

    Raises
    ------
    RuntimeError
        If a simulation has fewer nodes: no more will ever come.
    """
    began = monotonic()
    while (connected := len(list(grid.get_node_ids()))) < number:
        if is_simulated(grid) and monotonic() - began > SIMULATION_SECONDS:
            raise RuntimeError(
                f"this simulation has {connected} nodes, and its configuration {number} (each "
                "source and each target is one); run it with `fl-wb`, or give `flwr run` "
                f'--federation-config "num-supernodes={number} client-resources-num-cpus=1"'
            )
        log(INFO, "Waiting for nodes: %d of %d are connected", connected, number)
        sleep(1)
