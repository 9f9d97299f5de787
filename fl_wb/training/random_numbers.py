"""Random numbers of a training's own, apart from those of whoever called it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
