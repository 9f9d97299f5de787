"""The baseline "transfer": one source's generator, as it was uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fl_wb.strategies.combining import Combining


class Transfer(Combining):
    """Hand one source's generator to the targets.

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

    def combine(self, uploads: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
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
        return uploads[self.source][1]
