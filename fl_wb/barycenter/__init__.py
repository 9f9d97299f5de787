"""Wasserstein-1 barycenters of generators: a stage, and the recursion of stages.

Imports `training` and what lies below it.
"""

from __future__ import annotations

from fl_wb.barycenter.recursion import optimality_gap, recursive_barycenter
from fl_wb.barycenter.stage import GEODESICS, STARTS, Stage, mixture_map

__all__ = [
    "GEODESICS",
    "STARTS",
    "Stage",
    "mixture_map",
    "optimality_gap",
    "recursive_barycenter",
]
