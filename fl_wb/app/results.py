"""What the server keeps of a run: figures, pictures, generators, and the table at the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.app.album import APART, COLUMNS, OWN, ROWS, Album, by_number
from fl_wb.app.provenance import provenance
from fl_wb.app.schema import Config
from fl_wb.generators.code import code_of
from fl_wb.generators.copies import seeded
from fl_wb.generators.mixture import fitting
from fl_wb.generators.sampling import generate
from fl_wb.messages import records, replies
from fl_wb.persistence.tensor_files import save_tensors, write_atomic
from fl_wb.reporting.bars import stacked_bars
from fl_wb.reporting.progress import progress
from fl_wb.reporting.tables import partition_table, summary_table
from fl_wb.reporting.tracker import Tracker
from fl_wb.ternary import parse

log = logging.getLogger("flwr")

STEPS = ("few", "bank", "barycenter", "reweighted", "adapted", "ternary", "real")
EVENTS = 20  # iterations between two points of a loss curve
GATE = 1 << 16  # bytes, at most, of the gate in a target's packed generator


class Results:
    """Observes a strategy (`fl_wb.strategies.role_fedavg.Observer`) and writes the output folder.

    Nodes go by the number that they say they have; one that says none, or another's, by its id.

    Parameters
    ----------
    tracker : Tracker
        Of the output folder.
    config, generator
        The run's configuration, and the factory of its generators.
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
        self.partition: Mapping[str, Mapping[int, int]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.targets: dict[str, dict[str, Any]] = {}
        self.left_out: Counter[str] = Counter()  # parts of replies, by node
        self._names: dict[tuple[str, str], int] = {}  # (source or target, name): node id
        self._ternary: dict[str, int] = {}  # bytes
        network = seeded(generator, 0)
        self._shape = tuple(self._drawn(network, 2).shape[1:])
        self._album = Album(tracker, self._shape)
        self._most = sum(len(a.data) for a in records.to_arrays(network).values())
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

    def train(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        """Keep the sources' figures, and pictures of what the first of them uploaded."""
        names = {node: self._name("source", node, contents[node]) for node in sorted(contents)}
        self.sources |= {name: replies.figures(contents[node]) for node, name in names.items()}
        for node_id in sorted(names, key=lambda node: by_number(names[node]))[:ROWS]:
            name, content = names[node_id], contents[node_id]
            with self._part(node_id, "its generator's pictures"):
                network = records.load(replies.model(content), self.generator())
                self._album.put("source", name, self._drawn(network, COLUMNS))
        self._album.draw("source", "sources")

    def evaluate(self, server_round: int, contents: Mapping[int, RecordDict]) -> None:
        """Keep the targets' figures, ternary generators and pictures."""
        for node_id, content in sorted(contents.items()):
            name = self._name("target", node_id, content)
            self.targets[name] = replies.figures(content)
            self._ternary.pop(name, None)
            with self._part(node_id, "its curve"):
                if curve := replies.curve(content):
                    self.targets[name]["curve"] = curve
            with self._part(node_id, "its ternary generator"):
                self._keep_ternary(name, content)
            with self._part(node_id, "its pictures"):
                for step, samples in replies.pictures(content, STEPS, self._shape).items():
                    self._album.put(step, name, samples)
        for step in OWN:
            self._album.draw(step, step)

    @contextmanager
    def _part(self, node_id: int, what: str) -> Iterator[None]:
        """Leave out a part of a reply that is no use, say so and count it."""
        try:
            yield
        except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
            self.left_out[str(node_id)] += 1
            log.warning("node %d: %s: left out: %s", node_id, what, error)

    def _name(self, role: str, node_id: int, content: RecordDict) -> str:
        number = replies.partition(content)
        name = str(node_id if number is None else number)
        if self._names.setdefault((role, name), node_id) != node_id:
            log.warning("node %d is not the first %s that says it is %s", node_id, role, name)
            name = f"{name}-{node_id}"
        return name

    def finish(self, result: Result, error: BaseException | None = None) -> str:
        """Write what is left at the end of a run, and return its table.

        Parameters
        ----------
        result : Result
            Of the strategy; an empty one where it failed.
        error : BaseException, optional
            What ended the run: the result file is written all the same, and says it.

        Raises
        ------
        OSError
            If the model or the result file cannot be written.
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
        lost: OSError | None = None
        size = 0
        try:
            size = self._keep_generator(result)
        except OSError as failed:
            lost = OSError(f"{self.model}.safetensors cannot be written: {failed}")
            error = error or lost
        self._album.draw_overview()
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
                    "ternary": [*self._ternary.values()],  # the same on the wire and on disk
                },
                "left-out": self.left_out,
                "error": None if error is None else f"{type(error).__name__}: {error}",
                "seconds": perf_counter() - self._began,
                "overrides": self.overrides,
                "made-by": provenance(self.config),
                "config": asdict(self.config),
            },
        )
        if lost is not None:
            raise lost
        if error is not None:
            return ""
        if not result.arrays:
            raise RuntimeError("no source delivered a valid generator: the log above says why")
        if not last:
            raise RuntimeError("no target evaluated the generator: the log above says why")
        return summary_table(self._rows_of(last, size))

    def cells(self, arrays: ArrayRecord, shares: Sequence[float], cells: Mapping[int, int]) -> None:
        """Draw what each source contributed to the final barycenter.

        Parameters
        ----------
        arrays : ArrayRecord
            The barycenter's.
        shares : sequence of float
            Of its code's cells.
        cells : mapping
            Which cell is whose, by node id; empty where there is no code, and nothing to draw.
        """
        network = records.load(arrays, self.generator())
        names = {node: name for (role, name), node in self._names.items() if role == "source"}
        whose = {names.get(node, str(node)): cell for node, cell in cells.items()}
        for name in sorted(whose, key=by_number)[:ROWS]:
            made = generate(network, COLUMNS, source=whose[name], code=code_of(tuple(shares)))
            self._album.put("cell", name, made)
        self._album.draw("cell", "cells")

    def _rows_of(self, mean: dict[str, dict[str, float]], size: int) -> dict[str, Any]:
        """Return the table's rows: of each target if they are few, else of their mean."""
        titles = {"barycenter": self.model, "few": "few, resampled", "real": "as many real ones"}
        targets = sorted(self.targets, key=by_number)
        apart = {
            f", target {name}": (_steps(self.targets[name]), self._ternary.get(name, 0))
            for name in targets
        }
        if not 1 < len(targets) <= (len(targets) if self.config.data.in_turn else APART):
            apart = {"": (mean, max(self._ternary.values(), default=0))}
        sizes = dict.fromkeys(("barycenter", "reweighted", "adapted"), size)
        return {
            titles.get(step, step) + whose: steps[step]
            | ({"kB": kept / 1000} if (kept := (sizes | {"ternary": packed}).get(step)) else {})
            for step in mean
            for whose, (steps, packed) in apart.items()
            if step in steps
        }

    def _keep_ternary(self, name: str, content: RecordDict) -> None:
        # An ensemble is of as many generators as there are sources.
        packed = replies.packed(content, self._most * max(len(self.sources), 1) + GATE)
        if packed is None:
            return
        ternary.unpack(packed, self._network(_shapes(parse(packed)[1])))
        write_atomic(self.output / f"ternary/target-{name}.flwb", packed)
        self._ternary[name] = len(packed)

    def _drawn(self, network: nn.Module, n: int) -> Tensor:
        return generate(network, n, labels=self.config.network.labels)

    def _keep_generator(self, result: Result) -> int:
        """Save the final generator; return its size in bytes."""
        if not result.arrays:
            return 0
        network = records.load(result.arrays, self._network(_shapes(result.arrays)))
        state = network.state_dict()
        self._album.draw_model(self._drawn(network, COLUMNS * 4))
        save_tensors(self.output / f"{self.model}.safetensors", state)
        return sum(value.numel() * value.element_size() for value in state.values())

    def _network(self, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
        """Make the network that a model's arrays are of: an ensemble has several generators."""
        if self.config.strategy.name != "ensemble":
            return self.generator()
        return fitting(shapes, self.generator, most=len(self.sources))


def _steps(figures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Sort figures named ``<step>/<name>`` by step."""
    found: dict[str, dict[str, float]] = {}
    for step in STEPS:
        values = {
            name.removeprefix(f"{step}/"): float(value)
            for name, value in figures.items()
            if name.startswith(f"{step}/") and isinstance(value, int | float)
        }
        if values:
            found[step] = values
    return found


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _shapes(arrays: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {name: array.shape for name, array in arrays.items()}
