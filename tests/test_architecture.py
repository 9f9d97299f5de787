"""The arrows between rooms point one way: the list in CONTRIBUTING.md, held against the imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACADES = ("barycenter", "adaptation", "ternary", "metrics")


def groups() -> list[list[tuple[str, bool]]]:
    """Return the groups of rooms as CONTRIBUTING.md lists them: name, and whether Flower's."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (block,) = re.findall(r"## The house.*?```text\n(.*?)```", text, re.DOTALL)
    return [
        [(line.split()[0].removeprefix("fl_wb/"), "(F)" in line) for line in group.splitlines()]
        for group in block.split("\n\n")
    ]


LEVELS = [[room for room, _ in group] for group in groups()]
ROOMS = [room for level in LEVELS for room in level]
MATHEMATICS = [room for group in groups() for room, flower in group if not flower]


def files(room: str) -> list[Path]:
    """Return the modules of a room, which may be one module."""
    if room in ("strategies", "clients"):
        return sorted((ROOT / room).glob("*.py"))
    single = ROOT / "fl_wb" / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / "fl_wb" / room).glob("*.py"))


def imports(room: str) -> set[str]:
    """Return the full names of all that a room imports, at any depth."""
    names = set()
    trees = [ast.parse(path.read_text("utf-8")) for path in files(room)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_in(names: set[str]) -> set[str]:
    """Return the rooms of fl_wb among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("fl_wb.")}


def test_every_module_stands_in_a_room_of_the_list() -> None:
    there = {path.stem for path in (ROOT / "fl_wb").glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in (ROOT / "fl_wb").glob("*/__init__.py")}

    assert there | {"strategies", "clients"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_upwards_or_sideways(room: str) -> None:
    level = next(i for i, level in enumerate(LEVELS) if room in level)
    below = {room, *(name for level in LEVELS[:level] for name in level)}

    assert rooms_in(imports(room)) <= below


@pytest.mark.parametrize("room", ROOMS)
def test_a_facade_is_the_only_way_in(room: str) -> None:
    inside = {
        name
        for name in imports(room)
        if re.match(rf"fl_wb\.({'|'.join(FACADES)})\.[a-z_]+\.", name)
    }

    assert {name.split(".")[1] for name in inside} <= {room}


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_is_free_of_flower_hydra_and_tensorboard(room: str) -> None:
    found = imports(room)

    assert not {name.split(".")[0] for name in found} & {"flwr", "hydra", "omegaconf"}
    assert not any("tensorboard" in name for name in found)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_small(room: str) -> None:
    assert len([path for path in files(room) if path.stem != "__init__"]) <= 8


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is(room: str) -> None:
    for path in files(room):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


@pytest.mark.parametrize("room", MATHEMATICS)
def test_files_of_the_mathematics_fit_one_reading(room: str) -> None:
    for path in files(room):
        assert len(path.read_text("utf-8").splitlines()) <= 300, path.name


PRIVATE = ("flwr.common.constant", "flwr.supercore", "flwr.superlink", "hydra._internal")


@pytest.mark.parametrize("room", sorted({*ROOMS} - {"private_apis"}))
def test_private_apis_are_used_in_one_place(room: str) -> None:
    found = {name for name in imports(room) if name.startswith(PRIVATE)}

    assert not found | {name for name in imports(room) if "strategy_utils" in name}


def test_private_apis_are_those_of_the_versions_tested_with() -> None:
    said = ast.get_docstring(ast.parse(files("private_apis")[0].read_text("utf-8")))
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()

    for name in ("flwr", "hydra-core"):
        (version,) = re.findall(rf"{name} (\d+\.\d+\.\d+)", said or "")
        assert f"{name}=={version}" in pinned
