"""The baseline "edge only": no source trains, a target starts from a fresh network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fl_wb.strategies.role_fedavg import RoleFedAvg


class EdgeOnly(RoleFedAvg):
    """Hand the initial arrays to the targets. The arguments are those of `RoleFedAvg`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._initial = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody to train."""
        self._sent = []
        self._initial = arrays
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the initial arrays: they are the run's model."""
        return self._initial, None
