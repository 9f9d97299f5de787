"""What the server keeps of a run: figures, pictures, generators, and the table at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.app.config import Config
from fl_wb.generators.mixture import fitting
from fl_wb.generators.sampling import generate
from fl_wb.messages import keys, records
from fl_wb.persistence.tensor_files import save_tensors, write_atomic
from fl_wb.reporting.bars import stacked_bars
from fl_wb.reporting.progress import progress
from fl_wb.reporting.tables import partition_table, summary_table
from fl_wb.reporting.tracker import Tracker
from fl_wb.ternary import parse

log = logging.getLogger("flwr")

COLUMNS = 12  # of a grid of pictures
STEPS = ("few", "bank", "barycenter", "adapted", "ternary")
EVENTS = 20  # iterations between two points of a loss curve


class Results:
    """Observes a strategy through its metric aggregation functions, and writes the output folder.

    Parameters
    ----------
    tracker : Tracker
        Of the output folder.
    config : Config
        Of the run.
    generator : callable
        Factory of the run's generators.
    overrides : str
        What was set, in the user's words: the result file says it beside the whole configuration.
    """

    def __init__(
        self,
        tracker: Tracker,
        config: Config,
        generator: Callable[[], nn.Module],
        overrides: str = "",
    ) -> None:
        self.tracker, self.config, self.generator = tracker, config, generator
        self.overrides = overrides
        # The final model is called what it is.
        name = config.strategy.name
        self.model = "barycenter" if name == "adaptive_coalescence" else name
        self.output: Path = tracker.output
        self.sources: dict[int, dict[str, Any]] = {}
        self.targets: dict[int, dict[str, Any]] = {}
        self.partition: Mapping[str, Mapping[int, int]] = {}
        self.ternary_bytes: list[int] = []
        self._pictures: dict[str, dict[int, Tensor]] = {}
        self._bar = progress("Barycenter")
        self._began = perf_counter()

    def stage(self, done: int, total: int, losses: dict[str, float]) -> None:
        """Show how far the merge is (a `fl_wb.training.wgan.Progress`)."""
        losses = {name: value for name, value in losses.items() if name != "stage"}
        self._bar(done, total, losses)
        if done % EVENTS == 0 or done == total:
            for name, value in losses.items():
                self.tracker.scalar(f"merge/{name}", value, done)

    def dealt(self, partition: Mapping[str, Mapping[int, int]]) -> None:
        """Show and keep how many images of each class each node has, by the node's name."""
        self.partition = partition
        for line in partition_table(partition).splitlines():
            log.info(line)
        self.tracker.picture("partition", lambda: stacked_bars(partition))

    def train(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """Aggregate the sources' metrics, and keep pictures of what they uploaded."""
        for content in contents:
            index = _partition(content)
            self.sources[index] = _figures(content)
            try:
                network = records.load(content.array_records[keys.ARRAYS], self.generator())
            except records.InvalidUpload:  # Flower's FedAvg takes anything
                continue
            self._pictures.setdefault("source", {})[index] = generate(network, COLUMNS)
        self._draw("source", "sources")
        return aggregate_metricrecords(contents, weighted_by_key)

    def evaluate(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """Aggregate the targets' metrics; keep their ternary generators and pictures."""
        self.ternary_bytes = []
        for content in contents:
            index = _partition(content)
            self.targets[index] = _figures(content) | _said(content)
            self._keep_ternary(index, content)
            pictures = content.array_records.get(keys.SAMPLES)
            try:
                tensors = {} if pictures is None else records.to_tensors(pictures)
            except records.InvalidUpload as error:
                log.warning("The pictures of target %d are left out: %s", index, error)
                continue
            for step, samples in tensors.items():
                self._pictures.setdefault(step, {})[index] = samples[:COLUMNS]
        for step in ("few", "adapted", "ternary"):
            self._draw(step, step)
        return aggregate_metricrecords(contents, weighted_by_key)

    def finish(self, result: Result) -> str:
        """Write what is left at the end of a run, and return its table.

        Raises
        ------
        RuntimeError
            If no source delivered a generator, or no target evaluated one.
        """
        rounds = {
            number: {
                "train": dict(result.train_metrics_clientapp.get(number, {})),
                "evaluate": dict(result.evaluate_metrics_clientapp.get(number, {})),
            }
            for number in range(1, self.config.rounds + 1)
        }
        for number, parts in rounds.items():
            for part, figures in parts.items():
                for name, value in figures.items():
                    if not isinstance(value, list):
                        self.tracker.scalar(f"{part}/{name}", value, number)
        # Of the last round that targets evaluated: the run may go on without them.
        last = _steps(next((r["evaluate"] for r in [*rounds.values()][::-1] if r["evaluate"]), {}))
        size = self._keep_generator(result)
        self._draw_overview()
        self.tracker.write_json(
            "metrics.json",
            {
                "final": last,
                "rounds": rounds,
                "partition": self.partition,
                "sources": self.sources,
                "targets": self.targets,
                "bytes": {
                    "generator": size,
                    "generator-on-the-wire": sum(len(a.data) for a in result.arrays.values()),
                    "generator-on-disk": _size_of(self.output / f"{self.model}.safetensors"),
                    "ternary": self.ternary_bytes,  # the same on the wire and on disk
                },
                "seconds": perf_counter() - self._began,
                "overrides": self.overrides,
                "config": asdict(self.config),
            },
        )
        if not result.arrays:
            raise RuntimeError("no source delivered a valid generator: the log above says why")
        if not last:
            raise RuntimeError("no target evaluated the generator: the log above says why")
        packed = max(self.ternary_bytes, default=0)
        sizes = {"barycenter": size, "adapted": size, "ternary": packed}
        titles = {"barycenter": self.model, "few": "few, resampled"}
        return summary_table(
            {
                titles.get(step, step): figures
                | ({"kB": sizes[step] / 1000} if step in sizes else {})
                for step, figures in last.items()
            }
        )

    def _keep_ternary(self, index: int, content: RecordDict) -> None:
        packed = _info(content).get(keys.TERNARY)
        if not isinstance(packed, bytes):
            return
        name = f"ternary/target-{index}.flwb"
        try:
            ternary.unpack(packed, self._network(_shapes(parse(packed)[1])))
            write_atomic(self.output / name, packed)
            self.ternary_bytes.append(len(packed))
        except (ternary.PackedFileError, OSError) as error:
            log.warning("%s is left out: %s", name, error)

    def _keep_generator(self, result: Result) -> int:
        """Save the final generator; return its size in bytes."""
        if not result.arrays:
            return 0
        network = records.load(result.arrays, self._network(_shapes(result.arrays)))
        state = network.state_dict()
        self._pictures["barycenter"] = {0: generate(network, COLUMNS * 4)}
        self.tracker.images("barycenter", self._pictures["barycenter"][0], columns=COLUMNS)
        try:
            save_tensors(self.output / f"{self.model}.safetensors", state)
        except OSError as error:
            log.warning("%s.safetensors is left out: %s", self.model, error)
        return sum(value.numel() * value.element_size() for value in state.values())

    def _network(self, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
        """Make the network that a model's arrays are of: an ensemble has several generators."""
        if self.config.strategy.name != "ensemble":
            return self.generator()
        return fitting(shapes, self.generator, most=len(self.sources))

    def _draw(self, step: str, tag: str) -> None:
        rows = _rows(step, self._pictures.get(step, {}))
        if rows:
            self.tracker.images(tag, rows, columns=COLUMNS)

    def _draw_overview(self) -> None:
        """Draw one picture of the whole run, from the sources to the first target."""
        rows = _rows("source", self._pictures.get("source", {}))
        for step in ("barycenter", "few", "adapted", "ternary"):
            if samples := self._pictures.get(step):
                rows[step] = next(iter(samples.values()))
        if rows:
            self.tracker.images("overview", rows, columns=COLUMNS)


def _rows(step: str, samples: Mapping[int, Tensor]) -> dict[str, Tensor]:
    who = "source" if step == "source" else "target"
    return {f"{who} {index}": samples[index] for index in sorted(samples)}


def _steps(figures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Sort figures named ``<step>/<name>`` by step."""
    found = {
        step: {k.split("/")[1]: float(v) for k, v in figures.items() if k.startswith(f"{step}/")}
        for step in STEPS
    }
    return {step: values for step, values in found.items() if values}


def _figures(content: RecordDict) -> dict[str, Any]:
    return dict(_only(content.metric_records))


def _said(content: RecordDict) -> dict[str, Any]:
    """Return what a target's reply says beside its metrics: its features, and its convergence."""
    info = _info(content)
    said: dict[str, Any] = {"features": info["features"]} if info.get("features") else {}
    curve = {
        name.removeprefix("curve/"): list(values)
        for name, values in info.items()
        if name.startswith("curve/") and isinstance(values, list)
    }
    return said | ({"curve": curve} if curve else {})


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _shapes(arrays: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {name: array.shape for name, array in arrays.items()}


def _partition(content: RecordDict) -> int:
    partition = _info(content).get(keys.PARTITION)
    return partition if isinstance(partition, int) else 0


def _info(content: RecordDict) -> ConfigRecord:
    return content.config_records.get(keys.INFO, ConfigRecord())


def _only(items: Mapping[str, Any]) -> Any:
    return next(iter(items.values()))
