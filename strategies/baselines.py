"""What adaptive coalescence is compared with: no source, one source, all of them pooled.

FedAvg of the generators' weights is `fl_wb.strategies.role_fedavg`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from fl_wb.generators.mixture import states_as_mixture
from fl_wb.messages import keys, records
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


@dataclass(frozen=True)
class Whole:
    """A valid upload; its critic, if it has one, is for a target to check."""

    weight: float
    state: dict[str, Tensor]
    critic: ArrayRecord | None = None


class Combining(RoleFedAvg):
    """Sources train from the initial model; `combine` makes the targets' of their uploads.

    The arguments are those of `RoleFedAvg`. An upload that does not fit the initial arrays is
    dropped with a warning; where none is left, the model stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._initial = ArrayRecord()

    @abstractmethod
    def combine(self, uploads: Sequence[Whole]) -> dict[str, Tensor]:
        """Return the model's state, made of uploads in the order of their partitions.

        A node that does not say its partition comes by its node id.
        """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training: from the initial arrays, in every round."""
        if server_round == 1 or not self._initial:
            self._initial = arrays
        return super().configure_train(server_round, self._initial, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the valid uploads; the arrays are None (the model stays) if there is none."""
        template = self._initial.to_torch_state_dict()
        kept, uploads = [], []
        for node_id, content in self._received(replies, is_train=True):
            try:
                weight, sent = self._weight(content), dict(content.array_records)
                critic = sent.pop(keys.CRITIC, None)
                if len(sent) != 1:
                    raise records.InvalidUpload(f"it has {len(sent)} models, not one")
                state = records.validate(next(iter(sent.values())), template)
            except records.InvalidUpload as error:
                log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, error)
                continue
            kept.append((node_id, content))
            info = content.config_records.get(keys.INFO, ConfigRecord())
            place = info.get(keys.PARTITION, node_id)
            place = place if isinstance(place, int) else node_id
            uploads.append((place, Whole(weight, state, critic)))
        if not kept:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
            return None, None
        uploads.sort(key=lambda upload: upload[0])
        alike = self._alike(kept, "aggregate_train")
        combined = self.combine([upload for _, upload in uploads])
        return ArrayRecord(combined), self.train_metrics_aggr_fn(alike, self.weighted_by_key)


class Ensemble(Combining):
    """Hand all generators to the targets, which draw from each as often as its weight says.

    The model is a `fl_wb.generators.mixture.Mixture`: K times as large as a barycenter, on the wire
    and at the target, and what no single generator can beat by much. The arguments are those of
    `flwr.serverapp.strategy.FedAvg`; the value under `weighted_by_key` is a node's weight.
    """

    def combine(self, uploads: Sequence[Whole]) -> dict[str, Tensor]:
        """Return the state of the mixture."""
        weights = torch.tensor([upload.weight for upload in uploads])
        return states_as_mixture([upload.state for upload in uploads], weights)


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
                message.content[keys.CRITIC] = self._critic
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
