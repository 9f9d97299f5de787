"""Keeping a training apart from its caller: copies of modules, random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn


def seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):  # what the caller draws next is none of our business
        torch.manual_seed(seed)
        return factory()


def copy_of(module: nn.Module) -> nn.Module:
    """Copy a module, also one that keeps tensors of its last forward pass.

    ``torch.nn.utils.weight_norm`` does, and many a user's network that remembers activations;
    ``copy.deepcopy`` alone refuses tensors that are part of a graph.
    """
    known: set[int] = set()
    kept = (tensor for part in module.modules() for tensor in _tensors(vars(part), known))
    graph = {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    return deepcopy(module, dict(graph))  # the memo: what stands in for each


def _tensors(value: object, known: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples and dicts, each of these once: they may be circles."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict) and id(value) not in known:
        known.add(id(value))
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inside, known)


def trainable_copy(module: nn.Module) -> nn.Module:
    """Copy a module that is to be trained: what is frozen stays so, unless all of it is.

    All of it is where a network was handed over that only generates.
    """
    copied = copy_of(module)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        copied.requires_grad_(True)
    return copied
