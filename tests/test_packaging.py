"""One import name everywhere: wheel, Flower App Bundle and plain checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("fl_wb", "strategies", "clients", "conf")

PROBE = """
import sys
from pathlib import Path

import fl_wb
import fl_wb.clients
import fl_wb.strategies
from fl_wb import client_app, server_app
from fl_wb.config import compose

root = Path(sys.argv[1])
for module in (fl_wb, fl_wb.strategies, fl_wb.clients, server_app, client_app):
    assert root in Path(module.__file__).parents, module
assert compose("experiment=non_overlapping").data.targets == [[8, 9]]
assert "strategies" not in sys.modules and "clients" not in sys.modules
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is in the repository, without caches and earlier builds."""
    copy = tmp_path_factory.mktemp("repository") / "fl-wb"
    copy.mkdir()
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def probe(root: Path, folder: Path) -> None:
    """Import from ``root`` in a fresh process that finds FL-WB nowhere else."""
    # -S keeps an installed FL-WB out of reach; the other packages come by their folder's path,
    # where the finder of an editable install is not run.
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *folders])}
    subprocess.run(
        [sys.executable, "-S", "-c", PROBE, str(root)], cwd=folder, env=environment, check=True
    )


def test_the_wheel(checkout: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(checkout)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]

    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)

    assert {path.name for path in site.iterdir()} <= {"fl_wb", "bin", "fl_wb-0.1.0.dist-info"}
    assert (site / "fl_wb" / "py.typed").exists()
    assert {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")} == {
        path.relative_to(site / "fl_wb" / "conf") for path in (site / "fl_wb").rglob("*.yaml")
    }
    probe(site, tmp_path)


def test_the_bundle(checkout: Path, tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    environment = os.environ | {"FLWR_HOME": str(tmp_path / "home")}
    subprocess.run(
        [str(flwr), "build", "--app", str(checkout)], cwd=tmp_path, env=environment, check=True
    )
    (bundle,) = tmp_path.glob("*.fab")
    root = tmp_path / "bundle"

    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(root)

    assert bundle.stat().st_size < 1e6
    probe(root, tmp_path)


def test_the_plain_checkout(checkout: Path, tmp_path: Path) -> None:
    probe(checkout, tmp_path)
