"""Real processes on loopback, TLS and node authentication: a whole run, and what may go wrong."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Context, RecordDict
from PIL import Image
from sklearn.datasets import load_digits

from fl_wb import ternary
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.client_app import app as client_app
from fl_wb.persistence.tensor_files import digest, load_tensors
from fl_wb.server_app import app as server_app
from fl_wb.testing.in_process_grid import InProcessGrid
from tests.deployment import PATIENCE, Deployment, Recorder, ended, find, wait
from tests.test_replies import forms

pytestmark = pytest.mark.timeout(900)  # a loaded machine takes three times as long

SETTINGS = (
    "network.width=16",
    "client.source.iterations=8",
    "strategy.stage.distillation.iterations=600",
    "strategy.stage.training.iterations=100",
    "strategy.stage.training.warmup=2",
    "strategy.checkpoint_seconds=0.2",
    "client.adaptation.training.iterations=2",
    "client.adaptation.training.warmup=2",
    "client.ternarization.iterations=4",
    "client.evaluation.samples=40",
    "client.weights=radius",  # weights of its own, and no gate, which takes half of an evaluation
    "data.samples_per_class=3",
    "data.targets=[[0,1,2,3,4,5,6,7,8,9],[0,1,2]]",
)
LONG = "strategy.stage.distillation.iterations=1000000"  # a stage that does not end by itself
LEAST = ("client.weights=shares", "client.adaptation.method=plain", "client.ternarize=false")
UNFINISHED = "barycenter/stages/*-unfinished.safetensors"
NODES = ("source-0", "source-1", "target-0", "target-1")


class Recorded(Deployment):
    """A deployment of whose nodes all that they say is kept."""

    recorder: Recorder


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Start two sources; three nodes are to have data of their own, one a partition."""
    folder = tmp_path_factory.mktemp("deployment")
    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.astype(np.uint8)
    idx(folder / "data 0", images[labels < 5], labels[labels < 5])
    pictures(folder / "data 1", images[labels > 4][:60], labels[labels > 4][:60])
    idx(folder / "data 2", images[-60:], labels[-60:])
    with Recorded(folder / "flower") as made:
        made.recorder = Recorder(made)
        add(made, "source-0", "source-1")
        yield made


def add(deployment: Recorded, *names: str) -> None:
    """Start nodes that are recorded."""
    for name in names:
        config = node_config(deployment.folder.parent, name)
        words = " ".join(f"{k}={v!r}" for k, v in config.items())
        deployment.add(name, NODES.index(name), words, address=deployment.recorder.address)


def node_config(folder: Path, name: str) -> dict[str, Any]:
    """Return what a node says of itself."""
    key, role = NODES.index(name), name.partition("-")[0]
    own = {"data": str(folder / f"data {key}")} if key < 3 else {"partition-id": 1}
    cache = {"cache": str(folder / "cache")} if key == 0 else {}
    return {"role": role, **own, **cache}


def idx(folder: Path, images: Any, labels: Any) -> None:
    """Write IDX files."""
    folder.mkdir()
    for name, kind, array in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
        header = np.array([0x0800 + kind, *array.shape], ">i4").tobytes()
        (folder / f"{name}-ubyte").write_bytes(header + array.tobytes())


def pictures(folder: Path, images: Any, labels: Any) -> None:
    """Write class folders of PNG files."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{number}.png")


@dataclass
class Story:
    """What came of the runs of this module, and where they left it."""

    stopped: Path
    resumed: Path
    unbroken: Path
    seconds_to_stop: float = 0.0
    saved: int = 0  # iteration of the checkpoint that the killed run left


@pytest.fixture(scope="module")
def story(deployment: Recorded) -> Story:
    """Run the app three times: stop it; kill its SuperLink; go on, and kill a SuperNode.

    The first two runs end before there are targets. Each message to a node starts a process, which
    imports all of torch.
    """
    told = Story(*(deployment.folder / name for name in ("stopped", "resumed", "unbroken")))

    # A run whose stage would not end is stopped.
    stopped = deployment.run("stopped", *SETTINGS, LONG, "nodes=2", f"output={told.stopped}")
    serverapp = inside_stage(deployment, told.stopped)
    began = time.monotonic()
    deployment.stop("stopped")
    wait(lambda: ended(serverapp))
    told.seconds_to_stop = time.monotonic() - began
    assert stopped.wait(PATIENCE) == 1

    # A run whose SuperLink is killed inside the stage, and with it the ServerApp.
    killed = deployment.run("killed", *SETTINGS, "nodes=2", f"output={told.resumed}")
    wait(lambda: list(told.resumed.glob(UNFINISHED)))
    deployment.kill(deployment.superlink, killed)  # that would ask for it for half a minute
    (path,) = told.resumed.glob(UNFINISHED)
    told.saved = int(load_tensors(path)[0]["iteration"])
    assert not (told.resumed / "barycenter.safetensors").exists()

    # The same again, with targets, of which a SuperNode is killed in the evaluation.
    deployment.start_superlink()
    add(deployment, "target-0", "target-1")
    resumed = deployment.run("resumed", *SETTINGS, f"output={told.resumed}")
    wait(lambda: "configure_evaluate: Sampled 2" in deployment.log("resumed"))
    node = deployment.nodes["target-1"]
    wait(lambda: find(node, "flwr-clientapp"))
    deployment.kill(node)

    # Flower waits a minute for it. Meanwhile the run is made in this process, without a fault.
    in_process(deployment, told.unbroken)
    assert resumed.wait(PATIENCE) == 0, deployment.log("resumed")
    return told


def in_process(deployment: Recorded, output: Path) -> None:
    """Run the app in this process, on nodes of the same data and ids as the deployment's.

    What its targets make of the barycenter is not looked at: they do the least that a target does.
    """
    words = {"overrides": " ".join([*SETTINGS, *LEAST]), "output": str(output)}
    grid = InProcessGrid(client_app, run_config=words)
    for name in NODES:
        (node_id,) = re.findall(r"SuperNode ID: (\d+)", deployment.log(name))
        grid.add(node_config(deployment.folder.parent, name), int(node_id))
    server_app(grid, Context(7, 1, {}, RecordDict(), words))


def metrics(output: Path) -> Any:
    """Return what a run's result file says."""
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def inside_stage(deployment: Deployment, output: Path) -> psutil.Process:
    """Wait until a run has a checkpoint, and return its ServerApp."""
    wait(lambda: list(output.glob(UNFINISHED)))
    return wait(lambda: deployment.serverapp(output))


def test_a_run_on_real_nodes_leaves_its_results(deployment: Recorded, story: Story) -> None:
    # Assert: the same results as a simulation's
    output, found = story.resumed, metrics(story.resumed)
    assert set(found["final"]) == {"few", "barycenter", "reweighted", "adapted", "ternary"}
    assert found["rounds"]["1"]["train"]["uploads-merged"] == 2
    assert len(found["sources"]) == 2
    for name in ("sources", "barycenter", "cells", "adapted", "ternary", "overview"):
        assert (output / f"{name}.png").is_file()
    assert not (output / "few.png").exists()  # no real sample leaves a node
    (packed,) = (output / "ternary").glob("target-*.flwb")
    ternary.load(packed, factories(compose(SETTINGS))[0]())
    assert "Results:" in deployment.log("resumed")


def test_a_round_goes_on_without_a_killed_supernode(deployment: Recorded, story: Story) -> None:
    assert len(metrics(story.resumed)["targets"]) == 1
    assert "aggregate_evaluate: node" in deployment.log("resumed")


def test_flwr_stop_is_honoured(deployment: Recorded, story: Story) -> None:
    assert story.seconds_to_stop < 30
    assert "the run ended as finished:stopped" in deployment.log("stopped")
    assert len(list(story.stopped.glob(UNFINISHED))) == 1  # from which it would go on


def test_a_server_killed_inside_a_stage_is_resumed(deployment: Recorded, story: Story) -> None:
    outputs = (story.unbroken, story.resumed)
    first, second = (load_tensors(f / "barycenter.safetensors")[0] for f in outputs)
    assert digest(first) == digest(second)
    # Only the finished stage is left, the same one.
    first, second = (
        sorted(p.name for p in (f / "barycenter" / "stages").iterdir()) for f in outputs
    )
    assert first == second
    assert len(first) == 1
    began = re.search(r"Barycenter: (\d+)/", deployment.log("resumed"))
    assert began and int(began[1]) == story.saved + 1 > 1


def test_a_source_with_a_cache_trains_once_for_all_runs(deployment: Recorded, story: Story) -> None:
    # source-0 has a cache, source-1 has none: it trains in each of the three runs
    assert len(re.findall("source .*: 8/8", deployment.log("source-0"))) <= 2
    assert len(re.findall("source .*: 8/8", deployment.log("source-1"))) == 3


def test_no_node_says_a_sample_of_its_own(deployment: Recorded, story: Story) -> None:
    # Prepare
    heard = bytes(deployment.recorder.heard)
    (packed,) = (story.resumed / "ternary").glob("target-*.flwb")
    own, *_ = (
        load_tensors(f)[0] for f in (deployment.folder.parent / "cache").rglob("*.safetensors")
    )
    digits = torch.as_tensor(load_digits().images * 15).float()
    private = [digits[:: len(digits) // 40], digits[-60::2]]

    # Assert: what was sent would be found
    assert packed.read_bytes() in heard
    assert any(value.numpy().tobytes() in heard for value in own.values() if value.numel() > 100)
    for images in private:
        found = [form in heard for form in forms((images / 127.5 - 1)[:, None])]
        assert found and not any(found)
