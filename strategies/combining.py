"""What the baselines share that make a model of whole uploads, without averaging weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from fl_wb import records
from fl_wb.strategies.role_fedavg import RoleFedAvg


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
                critic = sent.pop(records.CRITIC, None)
                if len(sent) != 1:
                    raise records.InvalidUpload(f"it has {len(sent)} models, not one")
                state = records.validate(next(iter(sent.values())), template)
            except records.InvalidUpload as error:
                log(WARNING, "aggregate_train: dropped the upload of node %d: %s", node_id, error)
                continue
            kept.append((node_id, content))
            info = content.config_records.get(records.INFO, ConfigRecord())
            place = info.get(records.PARTITION, node_id)
            place = place if isinstance(place, int) else node_id
            uploads.append((place, Whole(weight, state, critic)))
        if not kept:
            log(WARNING, "no valid upload in round %d: the model stays", server_round)
            return None, None
        uploads.sort(key=lambda upload: upload[0])
        alike = self._alike(kept, "aggregate_train")
        combined = self.combine([upload for _, upload in uploads])
        return ArrayRecord(combined), self.train_metrics_aggr_fn(alike, self.weighted_by_key)
