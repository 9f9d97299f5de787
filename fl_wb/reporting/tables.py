"""Figures as a table of plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fl_wb.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER

MOST_CLASSES = 20  # that have a column each in the table of a partition


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
    lines = _aligned(cells)
    for direction, known in (("lower", LOWER_IS_BETTER), ("higher", HIGHER_IS_BETTER)):
        if shown := [name for name in names if name in known]:
            lines.append(f"{direction} is better: {', '.join(shown)}")
    return "\n".join(lines)


def partition_table(partition: Mapping[str, Mapping[int, int]]) -> str:
    """Lay out how many images each node has, in all and of each class, as plain text.

    Parameters
    ----------
    partition : mapping of str to mapping of int to int
        A node's name to its number of images of each class. Of more than ``MOST_CLASSES`` classes
        the table says only how many classes a node has.
    """
    labels = sorted({label for counts in partition.values() for label in counts})
    few = len(labels) <= MOST_CLASSES
    cells = [["", "images", *(map(str, labels) if few else ["classes"])]]
    for node, counts in partition.items():
        each = [str(counts.get(label, "-")) for label in labels] if few else [str(len(counts))]
        cells.append([node, str(sum(counts.values())), *each])
    return "\n".join(_aligned(cells))


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines of columns, with a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def number(value: float) -> str:
    """Write a figure with three digits, as the tables and the progress lines show it."""
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
