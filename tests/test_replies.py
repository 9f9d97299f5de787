"""Odd replies in whole runs of the app: none ends a run or loses results, and each is said."""

from __future__ import annotations

import json
import logging
import math
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from PIL import Image

from benchmarks.attacks import EVALUATE, Spoil, metric, picture, renamed
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.app.results import Results
from fl_wb.app.schema import Config
from fl_wb.client_app import app
from fl_wb.data import datasets
from fl_wb.data.datasets import held_out, load_own, source_samples, target_samples
from fl_wb.messages import keys, replies
from fl_wb.messages.records import InvalidUpload
from fl_wb.persistence.tensor_files import digest
from fl_wb.reporting.tracker import Tracker
from fl_wb.server_app import app as server_app
from fl_wb.strategies import RoleFedAvg
from fl_wb.testing.in_process_grid import InProcessGrid, through_the_wire
from tests.test_own_data import folder_of
from tests.test_simulation import BRIEF, TINY

TARGETS = "data.targets=[[0,1],[2,3]]"
BAD = 14  # the second target


class Odd(InProcessGrid):
    """Spoils the replies of one node, and keeps everybody's."""

    def __init__(self, nodes: int, config: dict[str, Any], spoil: Spoil, kind: str) -> None:
        super().__init__(app, nodes, config)
        self.spoil, self.kind, self.kept = spoil, kind, list[Message]()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        found = list(super().send_and_receive(messages, timeout=timeout))
        for reply in found:
            bad = BAD if self.kind == "evaluate" else 12
            asked = self.nodes[bad].received[-1:] == [self.kind]
            if reply.metadata.src_node_id == bad and asked and not reply.has_error():
                self.spoil(reply.content)
        self.kept += found
        return found


def run(
    output: Path, spoil: Spoil = lambda content: None, kind: str = "evaluate", *overrides: str
) -> tuple[dict[str, Any], Odd]:
    words = " ".join([*TINY, TARGETS, "client.features=pixels", *overrides])
    config = {"overrides": words, "output": str(output)}
    grid = Odd(4, config, spoil, kind)
    server_app(grid, Context(7, 1, {}, RecordDict(), config))
    return json.loads((output / "metrics.json").read_text(encoding="utf-8")), grid


WHOLE = "dropped the reply of node 14: "
PART = "node 14: its "
ODD: dict[str, str] = {
    "another key": "",
    "no metrics": WHOLE + "it has 0 MetricRecords",
    "a list": "node 14 has metrics unlike the others'",
    "nan": "node 14 has metrics unlike the others'",
    "infinite": "node 14 has metrics unlike the others'",
    "huge": "node 14 has metrics unlike the others'",
    "a long name": WHOLE + "a name in it, 'xxx",
    "many names": WHOLE + "it has 20",
    "a long list": WHOLE + "it has 200",
    "many records": WHOLE + "it has 23 records, more than 16",
    "bytes for a partition": "",
    "the partition of another": "is not the first target that says",
    "a ternary text": PART + "ternary generator: left out: .* str",
    "a ternary of garbage": PART + "ternary generator",
    "a ternary of megabytes": PART + "ternary generator",
    "a curve of texts": PART + "curve: left out: its 'curve/w1'",
    "a curve of bytes": PART + "curve: left out: its 'curve/w1'",
    "a 0-d picture": PART + r"pictures: left out: .* the shape \(\)",
    "a wide picture": PART + r"pictures: .*\(1, 1, 1, 100000\)",
    "many pictures": PART + "pictures",
    "a picture of a lie": PART + "pictures",
    "a picture of no step": PART + "pictures: .* no step",
}
assert ODD.keys() == EVALUATE.keys()


@pytest.fixture(scope="module")
def config() -> Config:
    """Return the configuration of all these runs."""
    return compose([*TINY, TARGETS])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    """Return the grid of a run that is well, which keeps all replies."""
    return run(tmp_path_factory.mktemp("story"))[1]


@pytest.mark.parametrize("first", [13, BAD])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_evaluate_reply_costs_no_other_result(
    kind: str,
    first: int,
    story: Odd,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Prepare: the replies of a whole run, of which one is spoiled
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    spoil, reason = EVALUATE[kind], ODD[kind]
    config = replace(config, output=str(tmp_path))
    results = Results(Tracker(tmp_path), config, factories(config)[0])
    strategy = RoleFedAvg(observer=results)
    answers = [through_the_wire(m) for m in story.kept if keys.SAMPLES in m.content]
    answers.sort(key=lambda message: message.metadata.src_node_id != first)
    for message in answers:
        if message.metadata.src_node_id == BAD:
            spoil(message.content)
    model = next(m.content[keys.ARRAYS] for m in story.kept if keys.ARRAYS in m.content)

    # Execute
    figures = strategy.aggregate_evaluate(1, answers)
    assert figures is not None
    results.finish(Result(arrays=model, evaluate_metrics_clientapp={1: figures}))
    results.tracker.close()

    # Assert
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert found["targets"]["0"]["adapted/w1"] > 0
    assert math.isfinite(found["final"]["adapted"]["w1"])
    assert (tmp_path / "adapted.png").is_file()
    assert (tmp_path / "ternary" / "target-0.flwb").is_file()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert not reason or any(re.search(reason, text) for text in warnings), warnings
    assert (found["left-out"] == {"14": 1}) == reason.startswith(PART)
    if kind == "the partition of another":
        assert set(found["targets"]) == {"0", "0-14"}
        assert (tmp_path / "ternary" / "target-0-14.flwb").is_file()


@pytest.mark.parametrize("strategy", ["adaptive_coalescence", "fedavg"])
@pytest.mark.parametrize(
    ("spoil", "left"),
    [(renamed(keys.ARRAYS), 2), (metric("x", [1.0]), 2), (lambda c: c.pop(keys.METRICS), 1)],
    ids=["another key", "a list", "no metrics"],
)
def test_an_odd_train_reply_costs_no_other_result(
    strategy: str, spoil: Spoil, left: int, tmp_path: Path
) -> None:
    found, _ = run(tmp_path, spoil, "train", f"strategy={strategy}", BRIEF)
    assert len(found["sources"]) == left
    assert set(found["targets"]) == {"0", "1"}
    assert math.isfinite(found["final"]["ternary"]["w1"])


def test_a_run_that_fails_leaves_its_result_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **others: Any) -> None:
        raise ZeroDivisionError("of a strategy")

    monkeypatch.setattr("fl_wb.strategies.RoleFedAvg.configure_evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert found["error"] == "ZeroDivisionError: of a strategy"
    assert set(found["sources"]) == {"0", "1"}


def test_declared_sizes_cost_no_memory() -> None:
    content = RecordDict({keys.SAMPLES: ArrayRecord(), keys.METRICS: MetricRecord()})
    picture(1, declared=(1, 1, 1 << 20, 1 << 20))(content)
    tracemalloc.start()
    with pytest.raises(InvalidUpload, match="the shape"):
        replies.pictures(content, ["adapted"], (1, 8, 8))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


# What leaves a node


def forms(images: torch.Tensor) -> list[bytes]:
    """Return the bytes of each image, in all forms that it might travel in."""
    scaled = [images, (images + 1) / 2, (images + 1) * 8, (images + 1) * 127.5]
    found = []
    for image in zip(*scaled, strict=True):
        for value in image:
            found += [value.float().numpy().tobytes(), value.double().numpy().tobytes()]
        for value in image[2:]:
            found.append(value.round().byte().numpy().tobytes())
    return found


def sent(grid: Odd) -> bytes:
    """Return the bytes of all replies."""
    parts: list[bytes] = []
    for reply in grid.kept:
        for record in reply.content.values():
            for name, value in record.items():
                parts.append(name.encode())
                for item in value if isinstance(value, list) else [value]:
                    data = item.data if isinstance(item, Array) else item
                    parts.append(data if isinstance(data, bytes) else str(data).encode())
    return b"\n".join(parts)


@pytest.mark.parametrize("send_few", [False, True])
def test_no_real_sample_leaves_a_node_unless_the_run_says_so(
    send_few: bool, config: Config, tmp_path: Path
) -> None:
    # Execute
    words = ["client.send_few_pictures=true"] if send_few else []
    _, grid = run(tmp_path, lambda content: None, "evaluate", *words)

    # Assert
    data = config.data
    private = [source_samples(data, k) for k in range(2)] + [
        target_samples(data, k) for k in (0, 1)
    ]
    private.append(held_out(data, [0, 1, 2, 3]))
    everything = sent(grid)
    found = sum(form in everything for part in private for form in forms(part.images))
    assert (found > 0) == send_few
    assert (tmp_path / "few.png").is_file() == send_few
    for part in private:
        for images in (part.images, datasets.load(data)[0].images):
            assert digest({"images": images}).encode() not in everything


@pytest.mark.parametrize("strategy", ["adaptive_coalescence", "fedavg"])
def test_no_real_sample_leaves_a_node_of_both_roles_with_data_of_its_own(
    strategy: str, tmp_path: Path
) -> None:
    # Prepare: it trains, adapts and evaluates, beside a source and a target
    folder = folder_of(tmp_path / "own", 0)
    words = " ".join([*TINY, TARGETS, "client.features=pixels", "nodes=3", f"strategy={strategy}"])
    config = {"overrides": words, "output": str(tmp_path / "output")}
    grid = Odd(0, config, lambda content: None, "")
    for node in (
        {"role": "both", "data": str(folder)},
        {"role": "source", "partition-id": 0},
        {"role": "target", "partition-id": 0},
    ):
        grid.add(node)

    # Execute
    server_app(grid, Context(7, 1, {}, RecordDict(), config))

    # Assert
    assert grid.nodes[11].received == ["query", "train", "evaluate"]
    own = load_own(str(folder), compose(words.split()).data)
    everything = sent(grid)
    for part in own:
        assert not any(form in everything for form in forms(part.images))
    raw = [np.asarray(Image.open(file)).tobytes() for file in folder.rglob("*.png")]
    files = [file.read_bytes() for file in folder.rglob("*.png")]
    assert len(raw) == 8 and not any(each in everything for each in raw + files)
