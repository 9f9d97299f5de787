"""Checkpoints of a training: all that its next iteration depends on, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn

from fl_wb.persistence.tensor_files import below


class Checkpoint(Protocol):
    """Where a training keeps its state (`fl_wb.persistence.stage_store` has the one on disk)."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the last saved state, or None."""

    def discard(self, reason: str) -> None:
        """Set aside a saved state that does not fit."""

    def due(self) -> bool:
        """Whether the state should be saved now."""

    def save(self, state: dict[str, Tensor]) -> None:
        """Save the state in place of the last one."""


class TrainingState:
    """Modules, optimizers, random generator and iteration of one training.

    Parameters
    ----------
    modules, optimizers : mapping
        By name; the names are those in the saved state.
    rng : torch.Generator
        The source of all the training's randomness.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        rng: torch.Generator,
    ) -> None:
        self.modules, self.optimizers, self.rng, self.iteration = modules, optimizers, rng, 0

    def tensors(self) -> dict[str, Tensor]:
        """Copy the state, flat: "module/weight/key", "optimizer/slot/parameter/slot name"."""
        flat = {
            f"{name}/weight/{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                flat |= {f"{name}/slot/{index}/{key}": value for key, value in slots.items()}
        flat["rng"], flat["iteration"] = self.rng.get_state(), torch.tensor(self.iteration)
        return {name: tensor.clone() for name, tensor in flat.items()}

    def resume(self, checkpoint: Checkpoint) -> bool:
        """Take up the checkpoint's state; False if there is none, or none that fits."""
        flat = checkpoint.load()
        if flat is None:
            return False
        before = self.tensors()
        expected = {k: (v.shape, v.dtype) for k, v in before.items() if "/weight/" in k}
        found = {k: (v.shape, v.dtype) for k, v in flat.items() if "/weight/" in k}
        if expected != found:
            checkpoint.discard("it holds the state of other networks")
            return False
        try:
            self._take(flat)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            # such as the random state of another device
            self._take(before)
            checkpoint.discard(f"{type(error).__name__}: {error}")
            return False
        return True

    def _take(self, flat: Mapping[str, Tensor]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(below(flat, f"{name}/weight/"))
        for name, optimizer in self.optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in below(flat, f"{name}/slot/").items():
                index, slot = key.split("/")
                # cloned: the optimizer keeps and changes what it is given, and a checkpoint in
                # memory is not a copy
                slots.setdefault(int(index), {})[slot] = value.clone()
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
            _check_slots(name, optimizer)
        self.rng.set_state(flat["rng"])
        self.iteration = int(flat["iteration"])

    def save_if_due(self, checkpoint: Checkpoint) -> None:
        """Save the state if enough time has passed since the last time."""
        if checkpoint.due():
            checkpoint.save(self.tensors())


class Snapshots:
    """A `Checkpoint` that keeps what training would return if it ended there, and resumes nothing.

    Parameters
    ----------
    iterations : int
        Of the training.
    number : int
        How many snapshots are taken, evenly spaced, the last at the end.

    Attributes
    ----------
    taken
        For each: iterations done, seconds since this object was made, and the averaged
        generator's state.
    """

    def __init__(self, iterations: int, number: int) -> None:
        self.at = {round(iterations * k / number) for k in range(1, number + 1)}
        self.taken: list[tuple[int, float, dict[str, Tensor]]] = []
        self._done, self._began = 0, perf_counter()

    def load(self) -> None:
        """Return that there is nothing to resume."""

    def discard(self, reason: str) -> None:
        """Do nothing: nothing is ever loaded."""

    def due(self) -> bool:
        """Whether a snapshot is to be taken; a training asks after each iteration."""
        self._done += 1
        return self._done in self.at

    def save(self, state: dict[str, Tensor]) -> None:
        """Keep the moving average in a training's state."""
        seconds = perf_counter() - self._began
        self.taken.append((self._done, seconds, below(state, "average/weight/")))


def _check_slots(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer's slots are of one kind, and of their parameters' shapes."""
    if len({frozenset(slots) for slots in optimizer.state.values()}) > 1:
        raise ValueError(f"the parameters of {name} have different slots")
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{slot} of {name} is {tuple(value.shape)}")
