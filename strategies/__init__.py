"""Flower strategies: adaptive coalescence, and the baselines it is compared with."""

from __future__ import annotations

from fl_wb.strategies.adaptive_coalescence import AdaptiveCoalescence
from fl_wb.strategies.baselines import EdgeOnly, Ensemble, Transfer
from fl_wb.strategies.role_fedavg import RoleFedAvg

__all__ = ["AdaptiveCoalescence", "EdgeOnly", "Ensemble", "RoleFedAvg", "Transfer"]
