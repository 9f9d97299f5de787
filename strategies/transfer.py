"""The baseline "transfer": one source's generator, as it was uploaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_wb import records
from fl_wb.strategies.combining import Combining, Whole


class Transfer(Combining):
    """Hand one source's generator to the targets, and its critic, where the source sent one.

    Parameters
    ----------
    *args, **kwargs
        As in `flwr.serverapp.strategy.FedAvg`.
    source : int
        Which one, counted from 0 in the order of the nodes' partitions (or of their ids).
    """

    def __init__(self, *args: Any, source: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source = source
        self._critic: ArrayRecord | None = None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated evaluation, on targets."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if self._critic is not None:
            for message in messages:
                message.content[records.CRITIC] = self._critic
        return messages

    def combine(self, uploads: Sequence[Whole]) -> dict[str, Tensor]:
        """Return the state of the source in question.

        Raises
        ------
        ValueError
            If fewer sources uploaded: another one in its place would be another experiment.
        """
        if self.source >= len(uploads):
            raise ValueError(
                f"source={self.source} (counted from 0), but {len(uploads)} sources uploaded a "
                "valid generator"
            )
        self._critic = uploads[self.source].critic
        return uploads[self.source].state
