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
from PIL import Image
from sklearn.datasets import load_digits

from fl_wb import ternary
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.persistence.tensor_files import digest, load_tensors
from tests.deployment import PATIENCE, Deployment, ended, find, wait

pytestmark = pytest.mark.timeout(900)  # a loaded machine takes three times as long

SETTINGS = (
    "network.width=16",
    "client.source.iterations=8",
    "strategy.stage.distillation.iterations=1500",
    "strategy.stage.training.iterations=300",
    "strategy.stage.training.warmup=2",
    "strategy.checkpoint_seconds=0.2",
    "client.adaptation.training.iterations=2",
    "client.adaptation.training.warmup=2",
    "client.ternarization.iterations=4",
    "client.evaluation.samples=40",
    "data.samples_per_class=3",
    "data.targets=[[0,1,2,3,4,5,6,7,8,9],[0,1,2]]",
)
LONG = "strategy.stage.distillation.iterations=1000000"  # a stage that does not end by itself
UNFINISHED = "barycenter/stages/*-unfinished.safetensors"
NODES = ("source-0", "source-1", "target-0", "target-1")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Start two sources and two targets: three with data of their own, one with a partition."""
    folder = tmp_path_factory.mktemp("deployment")
    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.astype(np.uint8)
    idx(folder / "data 0", images[labels < 5], labels[labels < 5])
    pictures(folder / "data 1", images[labels > 4][:60], labels[labels > 4][:60])
    idx(folder / "data 2", images[-60:], labels[-60:])
    with Deployment(folder / "flower") as made:
        for key, name in enumerate(NODES[:3]):
            role = name.partition("-")[0]
            cache = f" cache='{folder / 'cache'}'" if key == 0 else ""
            made.add(name, key, f"role=\"{role}\" data='{folder / f'data {key}'}'{cache}")
        made.add(NODES[3], 3, 'role="target" partition-id=1')
        yield made


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

    unbroken: Path
    stopped: Path
    resumed: Path
    seconds_to_stop: float = 0.0
    saved: int = 0  # iteration of the checkpoint that the stopped run left


@pytest.fixture(scope="module")
def story(deployment: Deployment) -> Story:
    """Run the app unbroken; stop it; kill its SuperLink, and at last a SuperNode.

    A run waits most of the time, so two of them go on at once.
    """
    told = Story(*(deployment.folder / name for name in ("unbroken", "stopped", "resumed")))

    # One run that nothing disturbs, and one that is stopped inside its stage and started again.
    unbroken = deployment.run("unbroken", *SETTINGS, f"output={told.unbroken}")
    stopped = deployment.run("stopped", *SETTINGS, LONG, f"output={told.stopped}")
    serverapp = inside_stage(deployment, told.stopped)
    began = time.monotonic()
    deployment.stop("stopped")
    wait(lambda: ended(serverapp))
    told.seconds_to_stop = time.monotonic() - began
    (path,) = told.stopped.glob(UNFINISHED)
    told.saved = int(load_tensors(path)[0]["iteration"])
    assert stopped.wait(PATIENCE) == 1
    again = deployment.run("again", *SETTINGS, LONG, f"output={told.stopped}")
    wait(lambda: "Barycenter: " in deployment.log("again"))
    deployment.kill(inside_stage(deployment, told.stopped), again)
    assert unbroken.wait(PATIENCE) == 0, deployment.log("unbroken")

    # A new one, whose SuperLink is killed inside the stage, and with it the ServerApp.
    killed = deployment.run("killed", *SETTINGS, f"output={told.resumed}")
    wait(lambda: list(told.resumed.glob(UNFINISHED)))
    deployment.kill(deployment.superlink, killed)  # that would ask for it for half a minute
    assert list(told.resumed.glob(UNFINISHED))
    assert not (told.resumed / "barycenter.safetensors").exists()

    # The same again; in its evaluation a SuperNode is killed.
    deployment.start_superlink()
    resumed = deployment.run("resumed", *SETTINGS, f"output={told.resumed}")
    wait(lambda: "configure_evaluate: Sampled 2" in deployment.log("resumed"))
    node = deployment.nodes["target-1"]
    wait(lambda: find(node, "flwr-clientapp"))
    deployment.kill(node)
    assert resumed.wait(PATIENCE) == 0, deployment.log("resumed")
    return told


def inside_stage(deployment: Deployment, output: Path) -> psutil.Process:
    """Wait until a run has a checkpoint, and return its ServerApp."""
    wait(lambda: list(output.glob(UNFINISHED)))
    return wait(lambda: deployment.serverapp(output))


def test_a_run_on_real_nodes_leaves_its_results(deployment: Deployment, story: Story) -> None:
    # Assert: the same results as a simulation's
    output = story.unbroken
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert set(found["final"]) == {"few", "barycenter", "reweighted", "adapted", "ternary"}
    assert found["rounds"]["1"]["train"]["uploads-merged"] == 2
    assert len(found["sources"]) == len(found["targets"]) == 2
    for name in ("sources", "barycenter", "adapted", "ternary", "overview"):
        assert (output / f"{name}.png").is_file()
    assert not (output / "few.png").exists()  # no real sample leaves a node
    packed = sorted((output / "ternary").glob("target-*.flwb"))
    assert len(packed) == 2
    for path in packed:
        ternary.load(path, factories(compose(SETTINGS))[0]())
    assert "Results:" in deployment.log("unbroken")


def test_flwr_stop_is_honoured_and_the_run_goes_on_later(
    deployment: Deployment, story: Story
) -> None:
    assert story.seconds_to_stop < 30
    assert "the run ended as finished:stopped" in deployment.log("stopped")
    first = re.search(r"Barycenter: (\d+)/", deployment.log("again"))
    assert first and int(first[1]) == story.saved + 1 > 1


def test_a_server_killed_inside_a_stage_is_resumed(story: Story) -> None:
    outputs = (story.unbroken, story.resumed)
    first, second = (load_tensors(f / "barycenter.safetensors")[0] for f in outputs)
    assert digest(first) == digest(second)
    # Only the finished stage is left, the same one.
    first, second = (
        sorted(p.name for p in (f / "barycenter" / "stages").iterdir()) for f in outputs
    )
    assert first == second
    assert len(first) == 1


def test_a_source_with_a_cache_trains_once_for_all_runs(
    deployment: Deployment, story: Story
) -> None:
    # source-0 has a cache, source-1 has none: it trains in each of the five runs
    assert len(re.findall("source .*: 8/8", deployment.log("source-0"))) <= 2
    assert len(re.findall("source .*: 8/8", deployment.log("source-1"))) == 5


def test_a_round_goes_on_without_a_killed_supernode(deployment: Deployment, story: Story) -> None:
    found = json.loads((story.resumed / "metrics.json").read_text(encoding="utf-8"))
    assert set(found["final"]) == {"few", "barycenter", "reweighted", "adapted", "ternary"}
    assert len(found["targets"]) == len(list((story.resumed / "ternary").iterdir())) == 1
    assert "aggregate_evaluate: node" in deployment.log("resumed")
