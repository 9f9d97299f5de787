"""Real processes on loopback, TLS and node authentication: a whole run, and what may go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fl_wb import ternary
from fl_wb.config import compose
from fl_wb.storage import digest, load_tensors
from fl_wb.task import factories
from tests.deployment import Deployment, find, wait

pytestmark = pytest.mark.timeout(400)

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
    "client.evaluation_samples=40",
    "data.samples_per_class=3",
    "data.targets=[[0,1,2,3,4,5,6,7,8,9],[0,1,2]]",
)
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
            made.add(name, key, f"role=\"{role}\" data='{folder / f'data {key}'}'")
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


@pytest.fixture(scope="module")
def unbroken(deployment: Deployment) -> Path:
    """Return the output folder of a run that nothing disturbs."""
    output = deployment.folder / "unbroken"
    process = deployment.run("unbroken", *SETTINGS, f"output={output}")
    assert process.wait(timeout=200) == 0, deployment.log("unbroken")
    return output


def test_a_run_on_real_nodes_leaves_its_results(deployment: Deployment, unbroken: Path) -> None:
    # Assert: the same results as a simulation's
    found = json.loads((unbroken / "metrics.json").read_text(encoding="utf-8"))
    assert set(found["final"]) == {"barycenter", "adapted", "ternary"}
    assert found["rounds"]["1"]["train"]["uploads-merged"] == 2
    assert len(found["sources"]) == len(found["targets"]) == 2
    for name in ("sources", "barycenter", "few", "adapted", "ternary", "overview"):
        assert (unbroken / f"{name}.png").is_file()
    packed = sorted((unbroken / "ternary").glob("target-*.flwb"))
    assert len(packed) == 2
    for path in packed:
        ternary.load(path, factories(compose(SETTINGS))[0]())
    assert "Results:" in deployment.log("unbroken")


@pytest.fixture(scope="module")
def bereaved(deployment: Deployment, unbroken: Path) -> Path:
    """Return the output of a run whose ServerApp is killed, and then a SuperNode of the next."""
    output = deployment.folder / "bereaved"
    first = deployment.run("first", *SETTINGS, f"output={output}")
    wait(lambda: list(output.glob("barycenter/*-unfinished.safetensors")))
    deployment.kill(wait(deployment.serverapp))
    deployment.kill(first)  # it would wait for a minute until the SuperLink misses the ServerApp
    assert list(output.glob("barycenter/*-unfinished.safetensors"))
    assert not (output / "barycenter.safetensors").exists()
    second = deployment.run("second", *SETTINGS, f"output={output}")
    wait(lambda: "configure_evaluate: Sampled 2" in deployment.log("second"), 200)
    node = deployment.nodes["target-1"]
    wait(lambda: find(node, "flwr-clientapp"))
    deployment.kill(node)
    assert second.wait(timeout=200) == 0, deployment.log("second")
    return output


def test_a_serverapp_killed_inside_a_stage_is_resumed(unbroken: Path, bereaved: Path) -> None:
    first, second = (load_tensors(f / "barycenter.safetensors")[0] for f in (unbroken, bereaved))
    assert digest(first) == digest(second)
    stages = [path.name for path in (bereaved / "barycenter").iterdir()]
    assert stages == [path.name for path in (unbroken / "barycenter").iterdir()]


def test_a_round_goes_on_without_a_killed_supernode(deployment: Deployment, bereaved: Path) -> None:
    found = json.loads((bereaved / "metrics.json").read_text(encoding="utf-8"))
    assert set(found["final"]) == {"barycenter", "adapted", "ternary"}
    assert len(found["targets"]) == len(list((bereaved / "ternary").iterdir())) == 1
    assert "aggregate_evaluate: node" in deployment.log("second")
