"""Flower strategies: adaptive coalescence, and the baselines it is compared with."""

from __future__ import annotations

from fl_wb.strategies.adaptive_coalescence import AdaptiveCoalescence
from fl_wb.strategies.edge_only import EdgeOnly
from fl_wb.strategies.ensemble import Ensemble
from fl_wb.strategies.role_fedavg import RoleFedAvg
from fl_wb.strategies.transfer import Transfer

__all__ = ["AdaptiveCoalescence", "EdgeOnly", "Ensemble", "RoleFedAvg", "Transfer"]
