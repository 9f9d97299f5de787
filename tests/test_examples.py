"""The examples, before and after the swap in process; after it, as users run them."""

from __future__ import annotations

import importlib
import inspect
import io
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import unified_diff
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk  # what `flwr build` calls
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fl_wb import ternary
from fl_wb.clients import FastAdaptation
from fl_wb.strategies import AdaptiveCoalescence
from fl_wb.testing.in_process_grid import InProcessGrid
from fl_wb.training.distillation import Distillation
from fl_wb.training.encoder import fit_encoder
from tests.fresh import ROOT
from tests.toys import ADAPTATION, STAGE, TERNARIZATION

EXAMPLES = ROOT / "examples"
NAMES = ("gan", "conditional", "dcgan", "vae", "tabular", "numpy_client")
PARTS = ("server", "client")
SETTINGS = {"num-server-rounds": 2, "local-epochs": 2}


@contextmanager
def example(name: str, version: str) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Import an example's server and client modules, and forget them again."""
    package = f"{name}_app"
    sys.path.insert(0, str(EXAMPLES / name / version))
    try:
        yield tuple(importlib.import_module(f"{package}.{part}_app") for part in PARTS)  # type: ignore[misc]
    finally:
        sys.path.pop(0)
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            del sys.modules[module]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Make every default setting tiny, and collect what strategies return."""
    monkeypatch.setattr("fl_wb.barycenter.recursion.Stage", lambda: STAGE)
    monkeypatch.setattr("fl_wb.adaptation.fast_adaptation.Adaptation", lambda: ADAPTATION)
    monkeypatch.setattr("fl_wb.adaptation.fast_adaptation.POOL", 100)
    monkeypatch.setattr("fl_wb.clients.fast_adaptation.Ternarization", lambda: TERNARIZATION)
    monkeypatch.setattr("fl_wb.adaptation.weights.FOLDING", Distillation(20))
    monkeypatch.setattr("fl_wb.adaptation.gates.ITERATIONS", 20)
    brief = partial(fit_encoder, iterations=50)
    monkeypatch.setattr("fl_wb.training.encoder.fit_encoder", brief)
    found: list[Result] = []
    start = Strategy.start

    @wraps(start)  # its signature is read
    def noted(self: Strategy, *args: Any, **kwargs: Any) -> Result:
        found.append(start(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Strategy, "start", noted)
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "numpy_client"])
@pytest.mark.parametrize("version", ["before", "after"])
def test_an_example_runs(name: str, version: str, results: list[Result]) -> None:
    # Prepare
    with example(name, version) as (server, client):
        grid = InProcessGrid(client.app, nodes=2, run_config=SETTINGS)

        # Execute
        server.app(grid, Context(7, 1, {}, RecordDict(), dict(SETTINGS)))

        # Assert
        (result,) = results
        network = (server.Net if name == "vae" else server.Generator)()
        network.load_state_dict(result.arrays.to_torch_state_dict())  # strict
        for server_round in (1, 2):
            assert "loss" in result.train_metrics_clientapp[server_round]
            merged = result.train_metrics_clientapp[server_round].get("uploads-merged")
            assert merged == (2 if version == "after" else None)
            assert result.evaluate_metrics_clientapp[server_round]
            figures = result.evaluate_metrics_serverapp[server_round]
            assert all(0 <= value < 100 for value in figures.values())  # type: ignore[operator]


@pytest.mark.parametrize("version", ["before", "after"])
def test_numpy_clients_run_and_their_discriminator_is_averaged(
    version: str, results: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num-server-rounds": 3, "local-epochs": 4}
    with example("numpy_client", version) as (server, client):
        # Prepare: note what each node's list is in the end
        lists: dict[int, tuple[int, list[Any]]] = {}
        fit = client.DigitsClient.fit

        def noted(self: Any, parameters: Any, config: Any) -> Any:
            found = fit(self, parameters, config)
            lists[len(self.images)] = (found[1], found[0])
            return found

        monkeypatch.setattr(client.DigitsClient, "fit", noted)
        grid = InProcessGrid(client.app, nodes=2, run_config=settings)

        # Execute
        server.app(grid, Context(7, 1, {}, RecordDict(), dict(settings)))

        # Assert: three rounds, better than at the start, and the list's other arrays averaged
        (result,) = results
        figures = [m["energy-distance"] for m in result.evaluate_metrics_serverapp.values()]
        assert len(figures) == 4
        assert figures[3] < figures[0]  # type: ignore[operator]
        places = len(server.Generator().state_dict())
        final = result.arrays.to_numpy_ndarrays()
        (n, first), (m, second) = lists.values()
        assert len(final) == len(first) > places
        for got, a, b in list(zip(final, first, second, strict=True))[places:]:
            assert np.allclose(got, (n * a + m * b) / (n + m), atol=1e-6)
        if version == "after":
            merged = result.train_metrics_clientapp[3]
            assert (merged["uploads-merged"], merged["uploads-dropped"]) == (2, 0)
            assert "loss" in merged
            assert result.evaluate_metrics_clientapp[3].keys() == {"loss", "energy-distance"}


def test_the_tabular_examples_nodes_evaluate_a_ternary_generator(results: list[Result]) -> None:
    with example("tabular", "after") as (server, client):
        # Prepare
        replies = []

        class Watched(InProcessGrid):
            def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
                found = list(super().send_and_receive(messages, timeout=timeout))
                replies.extend(m for m in found if m.metadata.message_type == "evaluate")
                return found

        # Execute
        server.app(
            Watched(client.app, 2, SETTINGS), Context(7, 1, {}, RecordDict(), dict(SETTINGS))
        )

        # Assert
        assert len(replies) == 4
        for reply in replies:
            packed = reply.content["ternary"]["ternary"]
            network = ternary.unpack(packed, server.Generator())
            assert len(network.layers[0].weight.unique()) == 3
            whole = sum(p.numel() for p in network.parameters()) * 4
            assert len(packed) < whole / 3


def files(folder: Path) -> dict[str, list[str]]:
    return {
        str(path.relative_to(folder)): path.read_text("utf-8").splitlines(keepends=True)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".toml")
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_diff_in_the_readme_is_the_whole_swap(name: str) -> None:
    before, after = (files(EXAMPLES / name / version) for version in ("before", "after"))
    assert list(before) == list(after)
    lines = [
        line
        for path in before
        for line in unified_diff(before[path], after[path], f"before/{path}", f"after/{path}", n=1)
    ]
    shown = (EXAMPLES / name / "README.md").read_text("utf-8")
    assert f"```diff\n{''.join(lines)}```" in shown
    changed = {path for path in before if before[path] != after[path]}
    assert all("task" not in path for path in changed)


@pytest.mark.parametrize("name", NAMES)
def test_before_knows_nothing_of_fl_wb(name: str) -> None:
    assert "fl_wb" not in str(files(EXAMPLES / name / "before"))
    assert "fl-wb" not in str(files(EXAMPLES / name / "before"))


LAUNCH = """
import sys
from pathlib import Path

import fl_wb
from fl_wb.commands.launcher import launch

assert Path(sys.prefix) in Path(fl_wb.__file__).parents
settings = {"num-server-rounds": 1, "local-epochs": 2}
launch(settings, nodes=2, log=Path("superlink.log"), app=Path(sys.argv[1]))
"""


# Settings for a first try, shorter than by default: in which file, behind what.
SHORTER = {
    "server_app.py": ("critic=Discriminator, ", "iterations=100, "),
    "client_app.py": (
        "Generator, few, ",
        # no gate, which takes half a minute of both nodes; in process they have one
        'weights="radius", adaptation=Adaptation(training=Training(iterations=2, warmup=2)), '
        "ternarization=Ternarization(iterations=4), ",
    ),
}
IMPORTS = """
from fl_wb.adaptation import Adaptation
from fl_wb.ternary import Ternarization
from fl_wb.training.wgan import Training
"""


def test_an_example_as_users_run_it(programs: Path, away: Path) -> None:
    # Prepare: the one whose nodes train, adapt and evaluate
    app = shutil.copytree(EXAMPLES / "tabular" / "after", away / "app")
    for file, (behind, settings) in SHORTER.items():
        path = app / "tabular_app" / file
        before, after = path.read_text("utf-8").split(behind)
        path.write_text(IMPORTS + before + behind + settings + after, "utf-8")

    # Execute
    done = subprocess.run(
        [programs / "python", "-c", LAUNCH, str(app)], capture_output=True, text=True, timeout=240
    )

    # Assert
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'uploads-merged': 2, 'uploads-dropped': 0" in done.stdout
    assert done.stdout.count("Received 2 results and 0 failures") == 2  # train, evaluate


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", ["before", "after"])
def test_an_example_names_what_it_needs(name: str, version: str) -> None:
    text = (EXAMPLES / name / version / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)
    needs = {need.split(">")[0].split("[")[0] for need in project["project"]["dependencies"]}
    assert needs == {"flwr", "torch", "scikit-learn"} | ({"fl-wb"} if version == "after" else set())
    assert project["tool"]["flwr"]["app"]["components"]["serverapp"] == f"{name}_app.server_app:app"


def test_an_example_is_an_app_to_start_from(tmp_path: Path) -> None:
    for name in NAMES:
        app = shutil.copytree(EXAMPLES / name / "after", tmp_path / f"my-{len(name)}-{name[0]}")
        found = build_fab_from_disk(app)
        files = zipfile.ZipFile(io.BytesIO(found)).namelist()
        assert {f"{name}_app/{part}.py" for part in ("server_app", "client_app", "task")} < {*files}


PAGE = (EXAMPLES.parent / "docs" / "swap-in.md").read_text("utf-8")


@pytest.mark.parametrize("thing", [AdaptiveCoalescence, FastAdaptation])
def test_the_page_has_every_argument(thing: type) -> None:
    flowers = inspect.signature(FedAvg).parameters
    for name in inspect.signature(thing).parameters.keys() - flowers.keys():
        assert re.search(rf"^\|.*`{name}`.*\|.*\|$", PAGE, re.MULTILINE), name


def test_the_pages_messages_are_those_of_the_code() -> None:
    folders = (ROOT / "fl_wb", ROOT / "strategies", ROOT / "clients")
    code = "\n".join(path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)  # strings that go on in the next line
    table = PAGE.split("## Troubleshooting by message")[1]
    flowers = {
        "Invalid message type: query",
        "No query function registered",
        "No solution found when resolving dependencies",
        "Waiting for nodes to connect",
    }
    for messages in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE):
        for message in set(re.findall("`(.*?)`", messages)) - flowers:
            for piece in re.split(r"\.\.\.|: ", message):
                assert piece.strip() in code, message
