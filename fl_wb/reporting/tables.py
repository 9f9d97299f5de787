"""Tables, as plain text and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

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
    lines = [columns(cells)]
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
    return columns(cells)


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells, names first, as plain text; all but the first column to the right."""
    aligned = ("left", *("right" for _ in cells[0][1:]))
    lines = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=aligned).split("\n")
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells, names first, as Markdown."""
    return tabulate(cells[1:], cells[0], "github", disable_numparse=True)


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Write the mean of figures, with their standard deviation if there are several."""
    if not values:
        return ""
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def number(value: float) -> str:
    """Write a figure with three digits, as the tables and the progress lines show it."""
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
