"""Wasserstein-1 barycenters of generators: a stage, and the recursion of stages.

Imports `training` and what lies below it.
"""

from __future__ import annotations

from fl_wb.barycenter.optimality import optimality_gap
from fl_wb.barycenter.recursion import FAN_IN, barycenter_of, recursive_barycenter
from fl_wb.barycenter.stage import GEODESICS, STARTS, Merge, Stage
from fl_wb.barycenter.teachers import Measure

__all__ = [
    "FAN_IN",
    "GEODESICS",
    "STARTS",
    "Measure",
    "Merge",
    "Stage",
    "barycenter_of",
    "optimality_gap",
    "recursive_barycenter",
]
