"""Keeping a training apart from its caller: copies of modules, random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
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

    ``torch.nn.utils.weight_norm`` does, and many a user's network that remembers an activation;
    ``copy.deepcopy`` alone refuses tensors that are part of a graph.
    """
    kept = (value for part in module.modules() for value in vars(part).values())
    graph = {id(t): t.detach() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    return deepcopy(module, dict(graph))  # the memo: what stands in for each


def trainable_copy(module: nn.Module) -> nn.Module:
    """Copy a module that is to be trained: what is frozen stays so, unless all of it is.

    All of it is where a network was handed over that only generates.
    """
    copied = copy_of(module)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        copied.requires_grad_(True)
    return copied
