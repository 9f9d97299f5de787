"""FL-WB: adaptive coalescence of generative models as a Flower plugin.

Pre-trained generators of many nodes are merged into a recursive Wasserstein-1 barycenter; a node
with a handful of samples adapts that barycenter in seconds, ternarizes it, and evaluates it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

# Where each public name lives; imported when it is first asked for, so that `import fl_wb` costs
# next to nothing.
_PUBLIC = {
    "Adaptation": "fl_wb.adaptation",
    "AdaptiveCoalescence": "fl_wb.strategies",
    "FastAdaptation": "fl_wb.clients",
    "Stage": "fl_wb.barycenter",
    "Ternarization": "fl_wb.ternary",
    "adapt": "fl_wb.adaptation",
    "evaluate": "fl_wb.metrics",
    "recursive_barycenter": "fl_wb.barycenter",
    "ternarize": "fl_wb.ternary",
    "wasserstein1": "fl_wb.transport",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names, too."""
    return sorted({*globals(), *_PUBLIC})


class _Beside:
    """Finds `fl_wb.strategies`, `fl_wb.clients` and `fl_wb.conf` in the folder above this one.

    Installed, they lie inside this folder (see pyproject.toml). In a plain checkout and in a Flower
    App Bundle they stand beside it: one name everywhere, never a top-level `strategies`, and
    nothing else of that folder.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, short = name.rpartition(".")
        init = Path(__file__).parents[1] / short / "__init__.py"
        if (
            package != __name__
            or short not in ("strategies", "clients", "conf")
            or not init.exists()
        ):
            return None
        return spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])


if not Path(__file__).with_name("strategies").exists():
    # first: an FL-WB that is installed, too, has a finder of its own
    sys.meta_path.insert(0, _Beside)
