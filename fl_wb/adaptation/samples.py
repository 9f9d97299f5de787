"""What a few samples must be, whatever they are used for."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_wb.generators.sampling import check_real


def check_samples(samples: Tensor, made: Tensor) -> None:
    """Refuse a few samples that are not such as a generator makes.

    Parameters
    ----------
    samples : Tensor
        What somebody gave.
    made : Tensor
        Some samples (n, ...) of the generator.

    Raises
    ------
    TypeError
        Unless they are a Tensor of floating numbers.
    ValueError
        If there are none, they have another shape, or one is not finite.
    """
    check_real(samples, made, "the samples to adapt to")
    if not len(samples):
        raise ValueError("there are no samples to adapt to: one at least is needed")
    if samples.shape[1:] != made.shape[1:]:
        raise ValueError(
            f"samples of shape {tuple(samples.shape[1:])} for a generator that makes "
            f"{tuple(made.shape[1:])}"
        )
    if not torch.isfinite(samples).all():
        raise ValueError("the samples to adapt to are not all finite")
