"""The model that travels: a generator, which is coalesced, and perhaps more, which is averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor, nn

from fl_wb.messages import generator_part, records

State = dict[str, Tensor]


class Model:
    """What the nodes send and get, and which of its arrays are the generator's.

    Parameters
    ----------
    arrays : ArrayRecord
        The initial model: names, shapes and types of everything that travels.
    network : nn.Module
        A generator whose arrays are among them.
    prefixes : tuple of str, optional
        Of the generator's arrays; None if there are no others.
    refit : callable, optional
        As in `AdaptiveCoalescence`.
    """

    def __init__(
        self,
        arrays: ArrayRecord,
        network: nn.Module,
        prefixes: tuple[str, ...] | None,
        refit: Callable[[State], Mapping[str, Tensor]] | None,
    ) -> None:
        generative, others = generator_part.split(arrays, prefixes)
        own = network.state_dict()
        self._initial, self._prefixes, self._refit = arrays, prefixes, refit
        # What the model's names have before the generator's own.
        self._head = generator_part.own(generative, own)[1]
        self._others = {name: _template(name, array) for name, array in others.items()}
        self._all = {self._head + name: value.cpu() for name, value in own.items()} | self._others

    def read(self, arrays: ArrayRecord) -> tuple[State, State]:
        """Return the generator's arrays, under its own names, and the others.

        Raises
        ------
        InvalidUpload
            If they are not what this model is made of; see `fl_wb.messages.records.validate`.
        """
        state = records.validate(arrays, self._all)
        rest = {name: state.pop(name) for name in self._others}
        return {name.removeprefix(self._head): value for name, value in state.items()}, rest

    def whole(self, generator: State, others: Sequence[tuple[int, float, State]]) -> ArrayRecord:
        """Put a merged generator and the average of all other arrays together.

        Parameters
        ----------
        generator : dict
            Under its own names.
        others : sequence
            Of each upload of the round: node id, weight, other arrays.
        """
        generator = {self._head + name: value for name, value in generator.items()}
        if not self._others:
            return records.like(generator, self._initial)
        replies = [
            RecordDict({"arrays": ArrayRecord(rest), "metrics": MetricRecord({"weight": weight})})
            # by node, so that sums keep their order
            for _, weight, rest in sorted(others, key=lambda other: other[0])
        ]
        # As nodes' arrays are read: a counter's average is rounded.
        rest = records.validate(aggregate_arrayrecords(replies, "weight"), self._others)
        if self._refit is not None:
            rest = self._refitted({**generator, **rest})
        return records.like({**generator, **rest}, self._initial)

    def _refitted(self, whole: State) -> State:
        assert self._refit is not None
        fitted = self._refit({name: whole[name].clone() for name in self._initial})
        try:
            found = ArrayRecord({name: fitted[name].detach() for name in fitted})
            return records.validate(generator_part.split(found, self._prefixes)[1], self._others)
        except records.InvalidUpload as error:
            raise ValueError(f"refit returned arrays that do not fit: {error}") from error


def _template(name: str, array: Array) -> Tensor:
    values = torch.from_numpy(np.array(array.numpy()))
    # FedAvg makes a floating number of this counter, nodes' networks an integer again.
    return values.long() if name.endswith("num_batches_tracked") else values
