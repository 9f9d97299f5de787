"""What nodes do: sources train and upload generators, targets adapt, ternarize and evaluate."""

from __future__ import annotations

from fl_wb.clients.fast_adaptation import FastAdaptation
from fl_wb.clients.source import source_train
from fl_wb.clients.target import target_evaluate

__all__ = ["FastAdaptation", "source_train", "target_evaluate"]
