"""Plots of convergence: quality over the seconds and the iterations of an adaptation.

The only part that needs matplotlib, which is an extra.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

QUALITIES = ("energy", "coverage")
SCALES = {"seconds": "seconds at the target", "iterations": "generator iterations"}

Curves = Mapping[int, Mapping[str, Sequence[float]]]
"""By seed: columns of equal length, by name."""


class MissingExtra(ImportError):
    """A package is not installed that only some settings need; the text names the extra."""


def convergence(curves: Mapping[str, Curves], title: str, path: Path) -> Path:
    """Draw the curves of several rows: means over their seeds, and the range of the seeds.

    Parameters
    ----------
    curves : mapping
        Title of a row to its curves, with columns "seconds", "iterations" and `QUALITIES`.
    title : str
        Of the picture.
    path : Path
        Of the picture, by whose ending it is a PNG, an SVG or a PDF; its folder is made.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            'plots need matplotlib, which is not installed: pip install "fl-wb[plots]"'
        ) from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(QUALITIES), len(SCALES), sharey="row", squeeze=False)
    for axes_row, quality in zip(grid, QUALITIES, strict=True):
        for axes, (scale, words) in zip(axes_row, SCALES.items(), strict=True):
            for name, by_seed in curves.items():
                x, y = (_columns(by_seed, key) for key in (scale, quality))
                centre = [statistics.fmean(values) for values in x]
                (line,) = axes.plot(centre, [statistics.fmean(values) for values in y], label=name)
                low, high = [min(values) for values in y], [max(values) for values in y]
                axes.fill_between(centre, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axes.set_xlabel(words)
        axes_row[0].set_ylabel(quality)
    figure.suptitle(title)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _columns(by_seed: Curves, name: str) -> list[tuple[float, ...]]:
    """Return, for each point of a curve, the values of all seeds."""
    return list(zip(*(columns[name] for columns in by_seed.values()), strict=True))
