"""The baseline "ensemble": all generators, pooled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_wb.mixture import states_as_mixture
from fl_wb.strategies.combining import Combining, Whole


class Ensemble(Combining):
    """Hand all generators to the targets, which draw from each as often as its weight says.

    The model is a `fl_wb.mixture.Mixture`: K times as large as a barycenter, on the wire and at
    the target, and what no single generator can beat by much. The arguments are those of
    `flwr.serverapp.strategy.FedAvg`; the value under `weighted_by_key` is a node's weight.
    """

    def combine(self, uploads: Sequence[Whole]) -> dict[str, Tensor]:
        """Return the state of the mixture."""
        weights = torch.tensor([upload.weight for upload in uploads])
        return states_as_mixture([upload.state for upload in uploads], weights)
