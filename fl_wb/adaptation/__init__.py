"""Fast adaptation of a generator to a few samples.

Imports `training` and what lies below it.
"""

from __future__ import annotations

from fl_wb.adaptation.anchor import choose_anchor
from fl_wb.adaptation.fast_adaptation import METHODS, POOL, Adaptation, adapt
from fl_wb.adaptation.gates import fit_gate, own_start
from fl_wb.adaptation.variation import BANK, affordable, transport_pairs, variation_bank
from fl_wb.adaptation.weights import WEIGHTS, fit_weights, folded

__all__ = [
    "BANK",
    "METHODS",
    "POOL",
    "WEIGHTS",
    "Adaptation",
    "adapt",
    "affordable",
    "choose_anchor",
    "fit_gate",
    "fit_weights",
    "folded",
    "own_start",
    "transport_pairs",
    "variation_bank",
]
