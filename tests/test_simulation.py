"""The whole app on real digits: once as users run it, the rest on the in-process Grid."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.superlink.grid import InMemoryGrid

from fl_wb import ternary
from fl_wb.app.config import compose
from fl_wb.app.factories import factories
from fl_wb.client_app import app as client_app
from fl_wb.messages.records import check_samples
from fl_wb.persistence.locks import InUseError, locked
from fl_wb.persistence.tensor_files import load_tensors
from fl_wb.server_app import app as server_app
from fl_wb.testing.in_process_grid import InProcessGrid

TINY = [
    "network.width=16",
    "client.source.iterations=8",
    "strategy.stage.training.iterations=4",
    "strategy.stage.training.warmup=2",
    "strategy.stage.distillation.iterations=8",
    "client.adaptation.training.iterations=2",
    "client.adaptation.training.warmup=2",
    "client.adaptation.transport.iterations=4",
    "client.ternarization.iterations=4",
    "client.evaluation.samples=40",
    "client.evaluation.most=60",
    "client.source.batch_size=16",
    "strategy.stage.training.batch_size=16",
    "strategy.stage.distillation.batch_size=16",
    "client.adaptation.training.batch_size=16",
    "client.ternarization.batch_size=16",
    "data.samples_per_class=3",
]
BRIEF = "client.weights=shares"  # no gate, which takes half of a run: where targets are no matter
STEPS = ("few", "barycenter", "adapted", "ternary")  # of every run; some are reweighted, too
NAMES = ("w1", "frechet", "kid", "energy", "density", "coverage", "memorization")
PNG = b"\x89PNG\r\n\x1a\n"


def run_in_process(output: Path, *overrides: str, nodes: int = 3, **options: Any) -> InProcessGrid:
    """Run our ServerApp and ClientApp in this process."""
    config = {"overrides": " ".join([*TINY, *overrides]), "output": str(output)}
    grid = InProcessGrid(client_app, nodes, config)
    for node_id, killed in options.get("killed", {}).items():
        grid.nodes[node_id].killed = killed
    for node_id, words in options.get("said", {}).items():
        grid.nodes[node_id].context.node_config.update(words)
    server_app(grid, Context(7, 1, {}, RecordDict(), config))
    return grid


def check_results(output: Path, *overrides: str, targets: int = 1, rounds: int = 1) -> Any:
    """Assert that a run left what it promises; return its metrics."""
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert set(found["final"]) - {"reweighted"} == set(STEPS)
    for figures in found["final"].values():
        assert set(figures) == set(NAMES)
        assert all(isinstance(figures[name], float) for name in ("w1", "energy", "coverage"))
    assert set(found["rounds"]) == {str(number) for number in range(1, rounds + 1)}
    assert set(found["targets"]) == {str(index) for index in range(targets)}
    for name in ("sources", "barycenter", "adapted", "ternary", "overview"):
        assert (output / f"{name}.png").read_bytes().startswith(PNG), name
    assert not (output / "few.png").exists()  # no real sample leaves a node
    assert list((output / "tensorboard").glob("events.*"))
    generator, _ = factories(compose([*TINY, *overrides]))
    for index in range(targets):
        network = ternary.load(output / "ternary" / f"target-{index}.flwb", generator())
        check_samples(network)
        layers = [layer for _, layer in ternary.ternarizable(network)]
        weights = [layer.get_parameter("weight") for layer in layers]
        assert all(3 <= len(weight.unique()) <= 9 for weight in weights)  # of a plane or two
        assert len(max(weights, key=torch.Tensor.numel).unique()) == 3
    return found


def test_a_simulation_leaves_its_results(programs: Path, away: Path, tmp_path: Path) -> None:
    # Execute: the program that the wheel installs
    done = subprocess.run(
        [programs / "fl-wb", *TINY, f"output={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=240,
    )

    # Assert
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "memorization",
        "coverage",
        "few, resampled",
        *STEPS,
        f"Results: {tmp_path / 'run'}",
    ):
        assert word in done.stdout
    found = check_results(tmp_path / "run")
    assert (tmp_path / "run" / "cells.png").read_bytes().startswith(PNG)
    assert found["rounds"]["1"]["train"]["uploads-merged"] == 2
    gate = 10_000  # bytes, of which this tiny generator has fewer itself
    assert found["bytes"]["ternary"][0] < found["bytes"]["generator"] + gate
    state, _ = load_tensors(tmp_path / "run" / "barycenter.safetensors")
    factories(compose(TINY))[0]().load_state_dict(state)
    assert len(list((tmp_path / "run" / "barycenter" / "stages").glob("*.safetensors"))) == 1


def test_later_rounds_train_nothing_anew(tmp_path: Path) -> None:
    # Prepare: three sources, two targets, and two nodes more than the configuration has
    overrides = (
        BRIEF,
        "rounds=2",
        "data.sources=[[0,1],[2,3],[4,5]]",
        "data.targets=[[0,2],[6,7]]",
    )

    # Execute
    grid = run_in_process(tmp_path, *overrides, nodes=7)

    # Assert
    found = check_results(tmp_path, *overrides, targets=2, rounds=2)
    first, second = found["rounds"]["1"]["train"], found["rounds"]["2"]["train"]
    # train-seconds too: the second time, the cached generator was sent. (Nodes are sampled in any
    # order, which rounds the means' last digit.)
    assert first == pytest.approx(second, rel=1e-9)
    assert first["uploads-merged"] == 3
    work = [node.received for node in grid.nodes.values()]
    assert (
        work
        == [["query", "train", "train"]] * 3
        + [["query", "evaluate", "evaluate"]] * 2
        + [["query"]] * 2
    )


def test_fedavg_is_one_setting_away(tmp_path: Path) -> None:
    run_in_process(tmp_path, "strategy=fedavg", "rounds=2")
    found = check_results(tmp_path, rounds=2)
    assert not (tmp_path / "cells.png").exists()  # an average has none
    rounds = found["rounds"]
    assert rounds["1"]["train"]["critic-loss"] != rounds["2"]["train"]["critic-loss"]
    assert (tmp_path / "fedavg.safetensors").is_file()


def test_convolutions_with_batch_normalisation_make_the_whole_journey(tmp_path: Path) -> None:
    # Prepare: two classes of 28x28 images as IDX files
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 24).astype(np.uint8)
    images = (rng.integers(0, 100, (48, 28, 28)) + 100 * labels[:, None, None]).astype(np.uint8)
    for name, kind, array in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
        header = np.array([0x0800 + kind, *array.shape], ">i4").tobytes()
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    overrides = (
        "data=mnist",
        f"data.root={tmp_path}",
        "data.sources=[[0],[1]]",
        "data.targets=[[0,1]]",
        "network.width=8",
    )

    # Execute
    run_in_process(tmp_path / "run", *overrides)

    # Assert
    found = check_results(tmp_path / "run", *overrides)
    assert found["rounds"]["1"]["train"]["uploads-merged"] == 2


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    finals = []
    for folder in ("first", "second"):
        run_in_process(tmp_path / folder)
        finals.append(check_results(tmp_path / folder)["final"])
    assert finals[0] == finals[1]


def test_a_simulation_with_too_few_nodes_says_how_to_size_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_wb.server_app.SIMULATION_SECONDS", -1.0)
    grid = type("Simulated", (InProcessGrid, InMemoryGrid), {})(client_app, 2)
    context = Context(7, 1, {}, RecordDict(), {"overrides": "", "output": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r'2 nodes, .* 3 .*"num-supernodes=3 '):
        server_app(grid, context)


def test_an_output_folder_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"folder .*file/run cannot be written"):
        run_in_process(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("message_type", "reason"),
    [("train", "no source delivered a valid generator"), ("evaluate", "no target evaluated")],
)
def test_a_run_without_results_fails(tmp_path: Path, message_type: str, reason: str) -> None:
    def killed(message: Message) -> bool:
        return message.metadata.message_type == message_type

    with pytest.raises(RuntimeError, match=reason):
        run_in_process(tmp_path, BRIEF, killed=dict.fromkeys((11, 12, 13), killed))
    assert (tmp_path / "metrics.json").is_file()


def test_a_disk_that_fails_costs_an_artefact_and_not_the_run(tmp_path: Path) -> None:
    # Prepare: a file stands where the ternary ones should go
    (tmp_path / "ternary").touch()

    # Execute
    run_in_process(tmp_path, BRIEF)

    # Assert
    final = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["final"]
    assert set(final) - {"reweighted"} == set(STEPS)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


@pytest.mark.parametrize("name", ["barycenter.safetensors", "metrics.json"])
def test_a_run_without_its_model_or_result_file_fails_and_one_with_room_goes_on(
    tmp_path: Path, name: str
) -> None:
    # Prepare: a folder stands in the way
    (tmp_path / name).mkdir()

    # Execute and assert
    with pytest.raises(OSError, match=f"{name} cannot be written"):
        run_in_process(tmp_path, BRIEF)
    if name != "metrics.json":
        found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
        assert "cannot be written" in found["error"]
        assert found["made-by"]["torch"] == torch.__version__
    (tmp_path / name).rmdir()
    run_in_process(tmp_path, BRIEF)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["error"] is None
    assert (tmp_path / "barycenter.safetensors").is_file()


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InUseError, match="in use by another run"):
        run_in_process(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
