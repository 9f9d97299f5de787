"""The figures that judge a generator, and the features in which some of them are taken.

Imports `generators`, `persistence` and `transport`.
"""

from __future__ import annotations

from fl_wb.metrics.augmentation import augmentation
from fl_wb.metrics.evaluation import Evaluation, evenly
from fl_wb.metrics.features import Features, inception_features, train_features
from fl_wb.metrics.figures import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    Reference,
    compare,
    coverage,
    density,
    energy_distance,
    evaluate,
    frechet_distance,
    kernel_distance,
    memorization,
)

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Evaluation",
    "Features",
    "Reference",
    "augmentation",
    "compare",
    "coverage",
    "density",
    "energy_distance",
    "evaluate",
    "evenly",
    "frechet_distance",
    "inception_features",
    "kernel_distance",
    "memorization",
    "train_features",
]
