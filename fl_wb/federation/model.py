"""The model that travels: a generator, which is coalesced, and perhaps more, which is averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import WARNING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.common.logger import log
from torch import Tensor, nn

from fl_wb.messages import generator_part, numpy_client, records

State = dict[str, Tensor]


class Model:
    """What the nodes send and get, and which of its arrays are the generator's.

    Parameters
    ----------
    arrays : ArrayRecord
        The initial model: names, shapes and types of everything that travels.
    network : nn.Module
        A generator whose arrays are among them.
    part : tuple of str or slice, optional
        Prefixes or places of the generator's arrays; None if there are no others.
    refit : callable, optional
        As in `AdaptiveCoalescence`.

    Attributes
    ----------
    all
        Arrays of the names, shapes and types that an upload has.
    """

    def __init__(
        self,
        arrays: ArrayRecord,
        network: nn.Module,
        part: generator_part.Part | None,
        refit: Callable[[State], Mapping[str, Tensor]] | None,
    ) -> None:
        generative, others = generator_part.split(arrays, part)
        own = network.state_dict()
        self._initial, self._refit = arrays, refit
        names = dict(zip(own_arrays(generative, own), generative, strict=True))
        self._names = {name: names[name] for name in own}  # the model's, by the generator's own
        self._others = {name: _template(name, array) for name, array in others.items()}
        self.all = {self._names[name]: value.cpu() for name, value in own.items()} | self._others

    def read(self, arrays: ArrayRecord) -> State:
        """Return an upload's arrays, checked, under the model's names; a list is in their order.

        Raises
        ------
        InvalidUpload
            If they are not what this model is made of; see `fl_wb.messages.records.validate`.
        """
        return records.validate(numpy_client.named(arrays, self._initial), self.all)

    def generator(self, state: State) -> State:
        """Return the generator's arrays, under its own names."""
        return {own: state[name] for own, name in self._names.items()}

    def record(self, state: State) -> ArrayRecord:
        """Return a model as it travels: names, order and types of the initial arrays."""
        return records.like(state, self._initial)

    def whole(self, generator: State, others: State) -> ArrayRecord:
        """Put a merged generator, under its own names, and all other arrays together."""
        whole = {self._names[own]: value for own, value in generator.items()}
        whole |= {name: others[name] for name in self._others}
        if self._refit is not None:
            whole |= self._refitted(whole)
        return self.record(whole)

    @property
    def has_others(self) -> bool:
        """Whether there is more to the model than its generator."""
        return bool(self._others)

    def _refitted(self, whole: State) -> State:
        """Return the other arrays as refit makes them; none if it comes to nothing.

        The averages that it is given are of what strangers sent: that may break it, and not a run.
        """
        assert self._refit is not None
        try:
            fitted = self._refit({name: whole[name].clone() for name in self._initial})
        except Exception as error:
            return _not_refitted(f"{type(error).__name__}: {error}")
        own = set(self._names.values())
        found = {name: fitted[name].detach() for name in fitted if name not in own}
        try:  # names, shapes and types, which are refit's own, and then the values
            records.validate(
                ArrayRecord({name: torch.zeros_like(value) for name, value in found.items()}),
                self._others,
            )
        except records.InvalidUpload as error:
            raise ValueError(f"refit returned arrays that do not fit: {error}") from error
        try:
            return records.validate(ArrayRecord(found), self._others)
        except records.InvalidUpload as error:
            return _not_refitted(str(error))


def _not_refitted(why: str) -> State:
    log(WARNING, "aggregate_train: refit failed (%s): the averaged arrays stay", why)
    return {}


def own_arrays(arrays: ArrayRecord, own: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a generator's arrays under its own names, in the order in which they were.

    Raises
    ------
    InvalidUpload
        If they are a list, longer or shorter than the generator's state.
    """
    return generator_part.own(numpy_client.named(arrays, own), own)[0]


def average(parts: Iterable[tuple[State, float]]) -> State:
    """Return the weighted average of states, as FedAvg makes it; whole numbers are rounded.

    One state is held at a time, beside the sum.
    """
    total = 0.0
    mean: State = {}
    kinds: dict[str, torch.dtype] = {}
    for state, weight in parts:
        total += weight
        for name, value in state.items():
            kinds[name] = value.dtype
            before = mean.get(name, torch.zeros_like(value, dtype=torch.float64))
            mean[name] = before + (value.double() - before) * (weight / total)
    return {
        name: (value if kinds[name].is_floating_point else value.round()).to(kinds[name])
        for name, value in mean.items()
    }


def _template(name: str, array: Array) -> Tensor:
    values = torch.from_numpy(np.array(array.numpy()))
    # FedAvg makes a floating number of this counter, nodes' networks an integer again.
    return values.long() if name.endswith("num_batches_tracked") else values
