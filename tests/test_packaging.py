"""One import name everywhere: wheel, Flower App Bundle and plain checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.fresh import ROOT

PROBE = """
import sys
from pathlib import Path

import fl_wb
import fl_wb.clients
import fl_wb.strategies
from fl_wb import client_app, server_app
from fl_wb.app.config import compose

root = Path(sys.argv[1])
for module in (fl_wb, fl_wb.strategies, fl_wb.clients, server_app, client_app):
    assert root in Path(module.__file__).parents, module
assert compose("experiment=non_overlapping").data.targets == [[8, 9]]
assert "strategies" not in sys.modules and "clients" not in sys.modules
"""

# By the process's own time, as other processes may keep it waiting.
IMPORT = """
import time
import torch
began = time.process_time()
import fl_wb, fl_wb.strategies, fl_wb.clients
print(time.process_time() - began)
"""


def probe(root: Path, folder: Path) -> None:
    """Import from ``root`` in a fresh process that finds FL-WB nowhere else."""
    # -S keeps an installed FL-WB out of reach; the other packages come by their folder's path,
    # where the finder of an editable install is not run.
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *folders])}
    subprocess.run(
        [sys.executable, "-S", "-c", PROBE, str(root)], cwd=folder, env=environment, check=True
    )


def test_the_wheel(programs: Path, away: Path) -> None:
    (site,) = programs.parent.glob("lib/python*/site-packages")
    made = {path.name for path in site.iterdir()}
    assert made == {"fl_wb", "fl_wb-0.1.0.dist-info", "shared.pth"}
    assert (site / "fl_wb" / "py.typed").exists()
    assert {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")} == {
        path.relative_to(site / "fl_wb" / "conf") for path in (site / "fl_wb").rglob("*.yaml")
    }
    subprocess.run([programs / "python", "-c", PROBE, str(site)], check=True)


def test_fl_wb_is_quickly_imported(programs: Path, away: Path) -> None:
    command = [programs / "python", "-c", IMPORT]
    took = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert took < 1.5


def test_the_bundle(checkout: Path, tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    environment = os.environ | {"FLWR_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [str(flwr), "build", "--app", str(checkout)],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    (bundle,) = tmp_path.glob("*.fab")
    root = tmp_path / "bundle"

    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(root)

    assert "warn" not in (done.stdout + done.stderr).lower()
    assert bundle.stat().st_size < 1e6
    probe(root, tmp_path)
    # Flower Hub's manifest, whose rules `flwr build` checks from this format version on
    manifest = tomllib.loads((root / "pyproject.toml").read_text())
    assert manifest["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert (root / manifest["project"]["license"]["file"]).read_bytes()


def test_the_plain_checkout(checkout: Path, tmp_path: Path) -> None:
    probe(checkout, tmp_path)


def imported(folder: Path) -> Iterator[str]:
    """Yield the top-level modules that the code of a folder imports."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_declared() -> None:
    # Prepare
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=~! ]", text)[0].lower().replace("_", "-") for text in requirements}

    def undeclared(folders: tuple[str, ...], declared: set[str]) -> set[str]:
        known = packages_distributions()
        modules = {module for folder in folders for module in imported(ROOT / folder)}
        modules -= {*sys.stdlib_module_names, "fl_wb", "strategies", "clients", "conf"}
        modules -= {"tests", "benchmarks"}
        found = {m: {d.lower().replace("_", "-") for d in known.get(m, [m])} for m in modules}
        return {module for module, homes in found.items() if not homes & declared}

    # Assert
    needed = names(project["dependencies"])
    brought = {"datasets", "ray"}  # by flwr-datasets, and by flwr[simulation], which pins it
    optional = {"flwr_datasets", "torch_fidelity", "torchmetrics", "matplotlib", "opacus"}
    assert undeclared(("fl_wb", "strategies", "clients"), needed) <= optional | brought
    everywhere = ("fl_wb", "strategies", "clients", "tests", "benchmarks")
    assert undeclared(everywhere, needed | names(extras)) <= brought
    (everything,) = project["optional-dependencies"]["all"]
    assert everything == "fl-wb[datasets,inception,plots,privacy]"
