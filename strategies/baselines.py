"""What adaptive coalescence is compared with: no source, one source, all of them pooled.

FedAvg of the generators' weights is `fl_wb.strategies.role_fedavg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fl_wb.generators.mixture import states_as_mixture
from fl_wb.messages import keys
from fl_wb.strategies.role_fedavg import RoleFedAvg, Whole


class EdgeOnly(RoleFedAvg):
    """Hand the initial arrays to the targets. The arguments are those of `RoleFedAvg`."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody to train."""
        self._sent, self._arrays = [], arrays
        self._ask_again()
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the initial arrays: they are the run's model."""
        return self._arrays, None


class Combining(RoleFedAvg):
    """Sources train from the initial model in every round; `combine` makes the targets' of them.

    The arguments are those of `RoleFedAvg`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._initial = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training: from the initial arrays, in every round."""
        if server_round == 1 or not self._initial:
            self._initial = arrays
        return super().configure_train(server_round, self._initial, config, grid)


class Ensemble(Combining):
    """Hand all generators to the targets, which draw from each as often as its weight says.

    The model is a `fl_wb.generators.mixture.Mixture`: K times as large as a barycenter, on the wire
    and at the target, and what no single generator can beat by much. The arguments are those of
    `RoleFedAvg`; the value under `weighted_by_key` is a node's weight.
    """

    def combine(self, uploads: Sequence[Whole], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return the state of the mixture."""
        return states_as_mixture([upload.state for upload in uploads], torch.tensor(weights))


class Transfer(Combining):
    """Hand one source's generator to the targets, and its critic, where the source sent one.

    Parameters
    ----------
    *args, **kwargs
        As in `RoleFedAvg`.
    source : int
        Which one, by the nodes' partitions; of nodes that say none, counted from 0 in the order of
        their ids.
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
                message.content[keys.CRITIC] = self._critic
        return messages

    def combine(self, uploads: Sequence[Whole], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return the state of the source in question.

        Raises
        ------
        ValueError
            If it uploaded nothing: another one in its place would be another experiment.
        """
        found = uploads[self.source :]
        if any(upload.partition is not None for upload in uploads):
            found = [upload for upload in uploads if upload.partition == self.source]
        if not found:
            raise ValueError(
                f"source={self.source} (counted from 0), but of {len(uploads)} sources that "
                "uploaded a valid generator none is that one"
            )
        self._critic = found[0].critic
        return found[0].state
