"""FL-WB: adaptive coalescence of generative models as a Flower plugin.

Pre-trained generators of many nodes are merged into a recursive Wasserstein-1 barycenter; a node
with a handful of samples adapts that barycenter in seconds, ternarizes it, and evaluates it.
"""

from __future__ import annotations

from pathlib import Path

# Installed, `fl_wb.strategies`, `fl_wb.clients` and `fl_wb.conf` lie inside this folder (see
# pyproject.toml). In a plain checkout and in a Flower App Bundle they stand beside it, so the
# folder above joins the package's path: one name everywhere, and never a top-level `strategies`.
if not Path(__file__).with_name("strategies").exists():
    __path__.append(str(Path(__file__).parents[1]))
