"""`fl-wb [overrides]`: Hydra in front of `flwr run`, simulated or with `superlink=NAME` deployed.

`fl-wb data=mnist data.root=FOLDER` is one run, `fl-wb -m seed=0,1,2` a sweep; the output folder is
Hydra's run directory. Settings, data and networks are checked before anything starts.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from fl_wb.app.config import CONF, SEARCH, check_absolute, checked, compose, to_run_config
from fl_wb.app.factories import factories
from fl_wb.app.overrides import ConfigError, parse
from fl_wb.app.schema import Config
from fl_wb.commands.launcher import launch, submit
from fl_wb.commands.superlink import RunFailed
from fl_wb.data import datasets
from fl_wb.data.readers import DataError
from fl_wb.metrics import inception_features
from fl_wb.private_apis import hydra_arguments
from fl_wb.reporting.tables import summary_table

# What the runs of one command came to (Hydra's own return values end with the first failure).
_outputs: list[tuple[list[str], Path]] = []
_failures: list[str] = []


def main() -> None:
    """Run the command line interface."""
    arguments = hydra_arguments().parse_args()
    if arguments.config_path:
        sys.exit("fl-wb: --config-path is FL-WB's own; --config-dir=FOLDER adds one of yours")
    try:
        name, folder = arguments.config_name or "config", arguments.config_dir
        for overrides in runs(arguments.overrides, sweep=arguments.multirun):
            check(compose(overrides, name=name, folder=folder))
    except (ConfigError, DataError) as error:
        sys.exit(f"fl-wb: {error}")
    try:
        _job()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C
    if arguments.multirun and _outputs:
        print(report(_outputs))
    if _failures:
        sys.exit("\n".join(f"fl-wb: {failure}" for failure in _failures))


@hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name="config")
def _job(composed: DictConfig) -> None:
    job = HydraConfig.get()
    overrides, output = list(job.overrides.task), Path(job.runtime.output_dir)
    try:
        config = checked(composed)
        if config.superlink is None:
            config = _here(config, output)
            output = Path(config.output or output)
        check(config)
        if config.superlink is not None:
            submit(to_run_config(config, overrides), config.superlink)
        else:
            _simulate(config, overrides)
        _outputs.append((overrides, output))
    except (ConfigError, DataError, RunFailed, OSError) as error:
        _failures.append(f"{output}: {error}")
        if job.mode is RunMode.MULTIRUN:
            print(f"fl-wb: {error}; going on with the sweep", file=sys.stderr)


def _here(config: Config, output: Path) -> Config:
    """Return a simulation's configuration with absolute folders: nodes work in others."""

    def absolute(folder: str) -> str:
        # From where the command was typed, also where Hydra has changed the working directory.
        return str(Path(to_absolute_path(str(Path(folder).expanduser()))).resolve())

    data = config.data
    if data.root is not None:
        data = replace(data, root=absolute(data.root))
    return replace(config, data=data, output=absolute(config.output or str(output)))


def _simulate(config: Config, overrides: Sequence[str]) -> None:
    run_config = to_run_config(config, overrides)
    output = Path(run_config["output"])
    output.mkdir(parents=True, exist_ok=True)
    nodes = config.data.source_count + len(config.data.targets)
    launch(
        run_config,
        nodes=nodes,
        log=output / "superlink.log",
        gpus=1 / nodes if config.device.startswith("cuda") else 0.0,
    )


def runs(overrides: Sequence[str], *, sweep: bool) -> Iterator[list[str]]:
    """Yield the overrides of each run that a command line asks for, without Hydra's own.

    Raises
    ------
    ConfigError
        If an override cannot be parsed.
    """
    choices = []
    for override in parse(overrides):
        key = override.get_key_element()
        if key.lstrip("+~").startswith(("hydra.", "hydra/")) and key != SEARCH:
            continue
        if sweep and key == "output":
            raise ConfigError("output would be one folder for all runs; set hydra.sweep.dir")
        if sweep and override.is_sweep_override():
            if not override.is_discrete_sweep():
                continue  # an interval, for a sweeper that draws from it
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    yield from map(list, itertools.product(*choices))


def report(outputs: Sequence[tuple[Sequence[str], Path]]) -> str:
    """Return the table of a sweep: each setting's figures, as means over its seeds.

    Parameters
    ----------
    outputs : sequence of (overrides, folder)
        The runs that completed.
    """
    rows: dict[str, list[Mapping[str, float | None]]] = {}
    shared = set.intersection(*(set(overrides) for overrides, _ in outputs))
    for overrides, folder in outputs:
        own = [text for text in overrides if text not in shared and not text.startswith("seed=")]
        file = folder / "metrics.json"
        if not file.exists():  # a full disk; the run has said so
            continue
        metrics = json.loads(file.read_text(encoding="utf-8"))
        for step, figures in metrics["final"].items():
            rows.setdefault(" ".join([*own, step]), []).append(figures)
    means = {}
    for title, runs_ in rows.items():
        found = {
            name: [value for figures in runs_ if (value := figures.get(name)) is not None]
            for name in runs_[0]
        }
        means[title] = {name: fmean(values) for name, values in found.items() if values}
    return f"Means of {len(outputs)} runs, by setting:\n{summary_table(means)}"


def check(config: Config) -> None:
    """Refuse data, networks and devices that this machine could not run.

    Raises
    ------
    ConfigError, DataError
        Naming the setting and what is wrong with it.
    """
    if config.superlink is not None:
        # What other machines have cannot be seen from here, nor what their folders hold.
        check_absolute(config)
        if config.data.shape is None and config.data.name != "digits":
            return
    else:
        _check_machine(config)
    generator, critic = factories(config)
    try:
        generator(), critic()
    except ValueError as error:
        raise ConfigError(f"network.generator={config.network.generator!r}: {error}") from error


def _check_machine(config: Config) -> None:
    """Refuse a device that is not here, and data that does not suffice for all nodes."""
    if config.nodes is not None:
        raise ConfigError("nodes=... is for a superlink; a simulation has those of data.*")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={config.device!r}: there is no CUDA device here; use cpu")
    if config.client.features == "inception":
        try:
            inception_features()
        except (ImportError, OSError) as error:
            raise ConfigError(f"client.features=inception: {error}") from error
    for index in range(config.data.source_count):
        datasets.source_samples(config.data, index)
    for index in range(len(config.data.targets)):
        datasets.target_samples(config.data, index)
        datasets.held_out(config.data, config.data.targets[index])


if __name__ == "__main__":
    main()
