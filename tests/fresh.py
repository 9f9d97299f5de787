"""FL-WB as users get it: the wheel, in an environment of its own with no checkout in reach."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ("fl_wb", "strategies", "clients", "conf")


def copy_repository(folder: Path) -> Path:
    """Copy what is in the repository, without caches and earlier builds."""
    folder.mkdir()
    for name in SHIPPED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def app_toml(name: str, *config: str) -> str:
    """Return the pyproject.toml of a Flower app of one module, whose settings are texts."""
    settings = "\n".join(f'{key} = ""' for key in config)
    return f"""
[project]
name = "{name}"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "{name}:server"
clientapp = "{name}:client"

[tool.flwr.app.config]
{settings}
"""


def make_environment(folder: Path, checkout: Path) -> Path:
    """Make a virtual environment with the checkout's wheel; returns its folder of programs.

    What FL-WB needs comes from this environment's folders, as they are: what stands in their .pth
    files, the finder of an editable FL-WB among it, is not run there.
    """
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    _run(*build, "--outdir", folder / "dist", checkout)
    (wheel,) = (folder / "dist").glob("*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "shared.pth").write_text("\n".join(shared), "utf-8")
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    for program in distribution("flwr").entry_points.select(group="console_scripts"):
        script = python.with_name(program.name)
        call = (
            f"import sys\nfrom {program.module} import {program.attr}\nsys.exit({program.attr}())"
        )
        script.write_text(f"#!{python}\n{call}\n", "utf-8")
        script.chmod(0o755)
    return python.parent


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
