"""The pictures of a run: what nodes and server draw of each step, in grids of one row a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fl_wb.messages import replies
from fl_wb.reporting.tracker import Tracker

COLUMNS = 12  # of a grid of pictures
OWN = ("few", "reweighted", "adapted", "ternary")  # steps of which each target has pictures
APART = 3  # targets that have rows of their own in the table and the overview
ROWS = 32  # of a picture: one of a thousand nodes would be a bomb to open


class Album:
    """Samples by step and by the node's name, and the grids of them in the output folder.

    Parameters
    ----------
    tracker : Tracker
        Of the output folder.
    shape : sequence of int
        Of a sample: of others than pictures nothing is drawn.
    """

    def __init__(self, tracker: Tracker, shape: Sequence[int]) -> None:
        self._tracker, self._drawable = tracker, replies.drawable(shape)
        self.samples: dict[str, dict[str, Tensor]] = {}

    def put(self, step: str, name: str, samples: Tensor) -> None:
        """Keep what a node's row shows."""
        self.samples.setdefault(step, {})[name] = samples[:COLUMNS]

    def draw(self, step: str, tag: str) -> None:
        """Draw the rows of a step, if there are any."""
        self._draw(tag, self._rows(step))

    def draw_model(self, samples: Tensor) -> None:
        """Draw the final model, in several rows; the overview has the first of them."""
        self.put("barycenter", "", samples)
        self._tracker.images("barycenter", samples, columns=COLUMNS)

    def draw_overview(self) -> None:
        """Draw one picture of the whole run, from the sources to the first targets."""
        rows = self._rows("source")
        if drawn := self.samples.get("barycenter"):  # the server's, or else what a target drew
            rows["barycenter"] = drawn.get("", next(iter(drawn.values())))
        names = sorted({name for step in OWN for name in self.samples.get(step, {})}, key=by_number)
        for name in names[:APART]:
            whose = f", target {name}" if len(names) > 1 else ""
            for step in OWN:
                if name in self.samples.get(step, {}):
                    rows[step + whose] = self.samples[step][name]
        self._draw("overview", rows)

    def _rows(self, step: str) -> dict[str, Tensor]:
        who = "source" if step in ("source", "cell") else "target"
        samples = self.samples.get(step, {})
        return {f"{who} {name}": samples[name] for name in sorted(samples, key=by_number)[:ROWS]}

    def _draw(self, tag: str, rows: Mapping[str, Tensor]) -> None:
        if rows and self._drawable:
            self._tracker.images(tag, rows, columns=COLUMNS)


def by_number(name: str) -> tuple[int, str]:
    """Return by what nodes' names are sorted, so that 10 comes behind 9."""
    return len(name), name
