"""Wasserstein-1 barycenters of generators: a stage, and the recursion of stages.

Imports `training` and what lies below it.
"""

from __future__ import annotations

from fl_wb.barycenter.executors import check_executor
from fl_wb.barycenter.merge import Merge
from fl_wb.barycenter.optimality import optimality_gap
from fl_wb.barycenter.recursion import (
    FAN_IN,
    barycenter_of,
    check_fan_in,
    recursive_barycenter,
    shares_learned,
)
from fl_wb.barycenter.stage import GEODESICS, STARTS, VERSION, Stage, check_conditional, stage_of
from fl_wb.barycenter.teachers import Measure, UselessMeasures

__all__ = [
    "FAN_IN",
    "GEODESICS",
    "STARTS",
    "VERSION",
    "Measure",
    "Merge",
    "Stage",
    "UselessMeasures",
    "barycenter_of",
    "check_conditional",
    "check_executor",
    "check_fan_in",
    "optimality_gap",
    "recursive_barycenter",
    "shares_learned",
    "stage_of",
]
