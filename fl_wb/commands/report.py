"""`fl-wb-report FOLDER ...`: the table, and the convergence plots, of runs over several seeds.

Reads every ``metrics.json`` below the folders, puts the runs that differ in nothing but their seed
together, and prints Markdown: a table for each setting of the data, a row for each thing that was
evaluated in it, mean and standard deviation over the seeds. A row says in the user's own overrides
what made it. Steps that several runs share, such as the start of two adaptations, are one row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_wb.app.overrides import split
from fl_wb.reporting import tables
from fl_wb.reporting.convergence import MissingExtra, convergence

STEPS = {
    "few": "the few samples, resampled",
    "bank": "raw variation bank",
    "barycenter": "start",
    "reweighted": "own weights",
    "adapted": "adapted",
    "ternary": "ternary",
    "real": "as many real samples",
}
COLUMNS = (
    "coverage",
    "energy",
    "memorization",
    "frechet",
    "kid",
    "w1",
    "density",
    "right-labels",
    "accuracy",
)
SCALES = {"seconds": "s", "kB": "kB"}

# Where a run is, what its randomness is and how often it is looked at: no part of what was done.
NOWHERE = ("seed", "data.seed", "output", "data.root", "hydra", "client.evaluation")
SETTING = ("data", "network", "experiment", "client.features")  # of a whole table
# What the steps of a target do not depend on yet.
LATER = {
    "few": ("strategy", "client", "rounds", "data"),
    "bank": ("client.adaptation", "client.ternarize", "client.ternarization"),
    "barycenter": (
        "client.weights",
        "client.adaptation",
        "client.ternarize",
        "client.ternarization",
    ),
    "reweighted": ("client.adaptation", "client.ternarize", "client.ternarization"),
    "adapted": ("client.ternarize", "client.ternarization"),
    "ternary": (),
    "real": ("strategy", "client", "rounds"),
}

Figures = dict[str, float]


@dataclass
class Row:
    """One thing that was evaluated: its figures, and its convergence, by seed."""

    step: str
    overrides: list[str]
    settings: dict[str, Any]
    figures: dict[int, Figures] = field(default_factory=dict)
    curves: dict[int, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    note: str = ""

    @property
    def title(self) -> str:
        """What the row is, in the user's overrides."""
        made = f"`{' '.join(self.overrides)}`" if self.overrides else ""
        return ", ".join(filter(None, [made, STEPS[self.step], self.note]))


@dataclass
class Section:
    """The rows of one setting of the data."""

    overrides: list[str]
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What was set, in the user's overrides."""
        return " ".join(self.overrides) or "the default data"


def read(folders: Iterable[Path]) -> list[Section]:
    """Read the runs below some folders, and put together what belongs together.

    Raises
    ------
    ValueError
        If there is no run, or a file is none of a run.
    """
    files = sorted({file for folder in folders for file in folder.rglob("metrics.json")})
    sections: dict[str, Section] = {}
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            _add(run, sections)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not what a run of FL-WB writes: {error!r}") from error
    if not files:
        raise ValueError("there is no metrics.json below " + ", ".join(map(str, folders)))
    for section in sections.values():
        _shorten(section)
        section.rows = {row.title: row for row in _ordered(section.rows.values())}
    return list(sections.values())


def markdown(sections: Sequence[Section]) -> str:
    """Return a table for each section."""
    return "\n\n".join(f"### {section.title}\n\n{_table(section)}" for section in sections)


def _add(run: Mapping[str, Any], sections: dict[str, Section]) -> None:
    words = [w for w in split(run.get("overrides", "")) if not _is(w, NOWHERE)]
    mine = [w for w in words if _is(w, SETTING)]
    section = sections.setdefault(" ".join(sorted(mine)), Section(mine))
    settings = {
        name: value
        for name, value in _flat(run["config"])
        if name == "data.pooled" or not _is(name, NOWHERE + SETTING)
    }
    seed = run["config"]["seed"]
    targets = list(run["targets"].values())
    for step, figures in run["final"].items():
        kept = {name: value for name, value in settings.items() if not _is(name, LATER[step])}
        own = [w for w in words if w not in mine and not _is(w, LATER[step])]
        if step in ("bank", "barycenter", "reweighted"):  # how a target adapts is still to come
            own = [word for word in own if not word.startswith("client=")]
        row = section.rows.setdefault(json.dumps([step, kept]), Row(step, own, kept))
        row.overrides = [word for word in row.overrides if word in own]  # what all its runs share
        row.figures[seed] = {k: v for k, v in figures.items() if v is not None}
        row.figures[seed] |= _cost(step, run["bytes"], targets)
        curves = [target.get("curve") for target in targets]
        if step == "adapted" and all(isinstance(curve, Mapping) for curve in curves):
            row.curves[seed] = _mean(curves)


def _cost(step: str, sizes: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Figures:
    """Return the seconds at the target that a step took, and the size of what it made."""
    adapted = ("weigh-seconds", "adapt-seconds")
    names = {
        "reweighted": ("weigh-seconds",),
        "adapted": adapted,
        "ternary": (*adapted, "ternarize-seconds"),
    }
    cost = {}
    if step in names:
        cost["seconds"] = statistics.fmean(
            sum(t.get(name, 0.0) for name in names[step]) for t in targets
        )
    if step == "ternary" and sizes["ternary"]:
        cost["kB"] = max(sizes["ternary"]) / 1000
    elif step in ("barycenter", "reweighted", "adapted"):
        cost["kB"] = sizes["generator"] / 1000
    return cost


def _shorten(section: Section) -> None:
    """Say what all rows have in common in the section's title instead."""
    rows = [row for row in section.rows.values() if row.step != "few"]
    if len({tuple(row.overrides) for row in rows}) < 2:
        return  # what is said of one run stays with its rows
    shared = [word for word in rows[0].overrides if all(word in r.overrides for r in rows)]
    section.overrides = [*section.overrides, *shared]
    for row in rows:
        row.overrides = [word for word in row.overrides if word not in shared]


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """Return the rows step by step, those of several sources as their best and their mean."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        others = {k: v for k, v in row.settings.items() if k != "strategy.source"}
        families.setdefault(json.dumps([row.step, others]), []).append(row)
    found: list[Row] = []
    for family in families.values():
        found += family if len(family) == 1 else _best_and_mean(family)
    return sorted(found, key=lambda row: list(STEPS).index(row.step))


def _best_and_mean(family: Sequence[Row]) -> Iterator[Row]:
    def energy(row: Row) -> float:
        return statistics.fmean(figures["energy"] for figures in row.figures.values())

    best = min(family, key=energy)
    words = [word for word in best.overrides if not word.startswith("strategy.source=")]
    note = f"best of {len(family)} sources (by energy)"
    yield Row(best.step, words, best.settings, best.figures, best.curves, note)
    seeds = set.intersection(*(set(row.figures) for row in family))
    figures = {seed: _mean([row.figures[seed] for row in family]) for seed in sorted(seeds)}
    yield Row(best.step, words, best.settings, figures, {}, f"mean of {len(family)} sources")


def _table(section: Section) -> str:
    found = {name for row in section.rows.values() for f in row.figures.values() for name in f}
    columns = [name for name in (*COLUMNS, *SCALES) if name in found]
    lines = [["", *(SCALES.get(name, name) for name in columns), "n"]]
    for row in section.rows.values():
        cells = [
            tables.mean(
                [f[name] for f in row.figures.values() if name in f], 3 - 2 * (name in SCALES)
            )
            for name in columns
        ]
        lines.append([row.title, *cells, str(len(row.figures))])
    return tables.markdown(lines)


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average numbers, or columns of numbers, by name."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: _average([part[name] for part in parts]) for name in names}


def _average(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [statistics.fmean(column) for column in zip(*values, strict=True)]
    return statistics.fmean(values)


def _is(key: str, prefixes: Sequence[str]) -> bool:
    """Tell whether a setting, or an override of one, is one of these or below one."""
    key = key.partition("=")[0].lstrip("+~")
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def main() -> None:
    """Print the report of the folders that the command line names."""
    parser = argparse.ArgumentParser(prog="fl-wb-report", description="Tables of runs, by setting.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, e.g. multirun/")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="draw convergence into this folder; needs fl-wb[plots], and runs with "
        "client.evaluation.snapshots=8 or so",
    )
    arguments = parser.parse_args()
    try:
        sections = read(arguments.folders)
        print(markdown(sections))
        for number, section in enumerate(sections if arguments.plots else []):
            curves = {row.title: row.curves for row in section.rows.values() if row.curves}
            if not curves:
                continue
            path = convergence(curves, section.title, arguments.plots / f"convergence-{number}.png")
            print(f"\n![Convergence, {section.title}]({path})")
    except (ValueError, OSError, MissingExtra) as error:
        sys.exit(f"fl-wb-report: {error}")


if __name__ == "__main__":
    main()
