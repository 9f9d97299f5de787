"""Keeping a training apart from its caller: copies of modules, random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn


def copy_of(module: nn.Module) -> nn.Module:
    """Copy a module, also one that keeps tensors of its last forward pass.

    ``torch.nn.utils.weight_norm`` does, and many a user's network that remembers an activation;
    ``copy.deepcopy`` alone refuses tensors that are part of a graph.
    """
    kept = (value for part in module.modules() for value in vars(part).values())
    graph = {id(t): t.detach() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    return deepcopy(module, dict(graph))  # the memo: what stands in for each


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Seed torch's global random numbers, which dropout draws, and give them back afterwards.

    It takes some microseconds, where ``torch.manual_seed`` takes a hundred: every iteration can
    have its own, so that one that is resumed draws what it would have drawn.
    """
    generators = (torch.default_generator, *torch.cuda.default_generators)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
