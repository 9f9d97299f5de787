"""Ternary generators: how they are learned, packed and read, with torch and without.

Imports `training` and what lies below it; `numpy_reader` imports nothing of FL-WB at all.
"""

from __future__ import annotations

from fl_wb.ternary.numpy_reader import PackedFileError, parse
from fl_wb.ternary.packing import load, pack, save, unpack
from fl_wb.ternary.planes import Ternary, ternarizable
from fl_wb.ternary.ternarization import Ternarization, ternarize

__all__ = [
    "PackedFileError",
    "Ternarization",
    "Ternary",
    "load",
    "pack",
    "parse",
    "save",
    "ternarizable",
    "ternarize",
    "unpack",
]
