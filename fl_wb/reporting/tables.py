"""Figures as a table of plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fl_wb.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER


def summary_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out figures as plain text.

    Parameters
    ----------
    rows : mapping of str to mapping of str to float
        Title of a row to its figures by name. Columns stand in the order in which names first
        appear; a figure that is missing or nan is shown as "-".

    Returns
    -------
    str
        The table, with a line below that says in which direction known figures are better.
    """
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["", *names]]
    for title, figures in rows.items():
        cells.append([title, *(number(figures.get(name, math.nan)) for name in names)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(names) + 1)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * len(names)))
    for direction, known in (("lower", LOWER_IS_BETTER), ("higher", HIGHER_IS_BETTER)):
        if shown := [name for name in names if name in known]:
            lines.append(f"{direction} is better: {', '.join(shown)}")
    return "\n".join(lines)


def number(value: float) -> str:
    """Write a figure with three digits, as the tables and the progress lines show it."""
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
