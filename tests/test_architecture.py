"""The arrows between modules point one way (read from the imports, so that it stays so)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower layers first. A module imports from its own layer and from those below, never from above.
MATHEMATICS = (
    {
        "readers",
        "hub",
        "storage",
        "isolation",
        "networks",
        "transport",
        "checkpoint",
        "store",
        "sample_sets",
    },
    {
        "wgan",
        "distillation",
        "metrics",
        "features",
        "datasets",
        "mixture",
        "variation",
        "rotation",
        "packing",
        "screening",
        "numpy_reader",
    },
    {"stage", "barycenter", "adaptation", "ternary", "pairing"},
)
LAYERS = (
    *MATHEMATICS,
    {"limits", "overrides", "config", "records", "parts", "tracking"},
    {"strategies", "clients", "results", "task"},
    {"server_app", "client_app"},
    {"launcher", "cli", "certificates", "plots"},
    {"report"},
)


def modules() -> dict[str, list[Path]]:
    """Return the files of each module of fl_wb, by its name below fl_wb."""
    files = {path.stem: [path] for path in (ROOT / "fl_wb").glob("*.py") if path.stem[0] != "_"}
    return files | {name: sorted((ROOT / name).glob("*.py")) for name in ("strategies", "clients")}


def imports(paths: list[Path]) -> set[str]:
    """Return the full names of all that some files import, at any depth."""
    names = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8")))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(names: set[str]) -> set[str]:
    """Return the modules of fl_wb among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("fl_wb.")}


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) >= set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_module_imports_upwards(module: str) -> None:
    level = next(level for level, layer in enumerate(LAYERS) if module in layer)
    above = set().union(*LAYERS[level + 1 :])

    assert not within(imports(modules()[module])) & above


@pytest.mark.parametrize("module", sorted(set().union(*MATHEMATICS)))
def test_the_mathematics_is_free_of_flower_hydra_and_tensorboard(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(modules()[module])}

    assert not packages & {"flwr", "hydra", "omegaconf", "tensorboard"}
    assert not any(
        name.startswith("torch.utils.tensorboard") for name in imports(modules()[module])
    )


def test_strategies_and_clients_meet_only_in_messages() -> None:
    assert "clients" not in within(imports(modules()["strategies"]))
    assert "strategies" not in within(imports(modules()["clients"]))


@pytest.mark.parametrize("module", sorted(set().union(*MATHEMATICS)))
def test_files_of_the_mathematics_fit_one_reading(module: str) -> None:
    for path in modules()[module]:
        assert len(path.read_text("utf-8").splitlines()) <= 300, path.name
