"""How a target compares its generators: with how many samples, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from fl_wb.picks import spread_out
from fl_wb.settings import Settings, at_least


@dataclass
class Evaluation(Settings):
    """How a target compares its generators with held-out samples.

    Attributes
    ----------
    most
        Of the held-out samples that are compared with, taken evenly from all of them: exact W1
        takes cubic time. Over the choice of 2,000 of MNIST's, W1 spreads by 0.3%, the energy
        distance by 1.3% and coverage by 0.016 (``python -m benchmarks.sample_sizes``); of 500 by
        two to three times as much in W1 and energy, and 4,000 take four times as long.
    samples
        That a generator draws; None: as many as are compared with.
    draws
        Of so many samples, whose figures are averaged.
    bank
        Whether the raw variation bank, which needs no training, is evaluated too.
    snapshots
        How often the generator is evaluated during its adaptation, for a plot of convergence.
    """

    most: Annotated[int, at_least(2)] = 2000
    samples: Annotated[int, at_least(2)] | None = None
    draws: Annotated[int, at_least(1)] = 1
    bank: bool = False
    snapshots: Annotated[int, at_least(0)] = 0


def evenly(samples: Tensor, most: int) -> Tensor:
    """Return at most so many samples, taken evenly from all; see `spread_out`."""
    return samples if len(samples) <= most else samples[spread_out(len(samples), most)]
