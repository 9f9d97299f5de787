"""What a run leaves behind and what it shows meanwhile.

TensorBoard events, grids of samples as PNG and JSON files in the output folder; a bar or log lines
while something trains; a table at the end. A disk that fails costs an artefact, never the run.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fl_wb.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER
from fl_wb.storage import write_atomic

# Flower's logger, by its name: its handlers show our lines beside Flower's, and without Flower this
# is a plain logger.
log = logging.getLogger("flwr")

LOG_SECONDS = 5.0  # between two lines of progress
VISIBLE = 32  # pixels that a sample in a grid has at least; 8x8 digits are blown up to it
GAP = 2
PAPER, INK = 255, 60


def sample_grid(samples: Tensor | Mapping[str, Tensor], columns: int = 10) -> bytes:
    """Draw samples side by side.

    Parameters
    ----------
    samples : Tensor or mapping of str to Tensor
        Images (n, c, h, w) in [-1, 1], row after row; or titled sets of them, each of which gets
        one row of at most ``columns``, with its title in front.
    columns : int
        Samples in a row.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    ValueError
        If there is nothing to draw, or samples are not images of one size.
    """
    if isinstance(samples, Tensor):
        rows = [("", part) for part in torch.split(samples, columns)]
    else:
        rows = [(title, part[:columns]) for title, part in samples.items()]
    shapes = {tuple(part.shape[1:]) for _, part in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3 or not any(len(part) for _, part in rows):
        raise ValueError(f"only images (c, h, w) of one size can be drawn, not {sorted(shapes)}")
    _, height, width = next(iter(shapes))
    scale = max(1, math.ceil(VISIBLE / min(height, width)))
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    font = ImageFont.load_default()
    # The default font may have no other letters than these.
    titles = [title.encode("ascii", "replace").decode() for title, _ in rows]
    margin = max(math.ceil(font.getlength(title)) for title in titles)
    margin += 4 * GAP if margin else GAP
    longest = max(len(part) for _, part in rows)
    size = (margin + longest * cell_w, GAP + len(rows) * cell_h)
    canvas = Image.new("RGB", size, (PAPER,) * 3)
    draw = ImageDraw.Draw(canvas)
    for row, (title, (_, part)) in enumerate(zip(titles, rows, strict=True)):
        top = GAP + row * cell_h
        draw.text((2 * GAP, top + cell_h // 2), title, fill=(INK,) * 3, font=font, anchor="lm")
        for column, pixels in enumerate(_pixels(part)):
            picture = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (margin + column * cell_w, top))
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return file.getvalue()


def save_grid(path: Path, samples: Tensor | Mapping[str, Tensor], columns: int = 10) -> None:
    """Write `sample_grid` to a file, atomically."""
    write_atomic(path, sample_grid(samples, columns))


class Tracker:
    """Writes what a run leaves into its output folder.

    Parameters
    ----------
    output : Path
        The folder; made if it is not there. Events go to ``tensorboard/`` in it.

    Raises
    ------
    OSError
        If the folder cannot be written: better now than at the end of a long run. Once the run is
        under way, a disk that fails costs the artefact and a warning.
    """

    def __init__(self, output: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second

        self.output = Path(output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except OSError as error:
            raise OSError(f"the output folder {self.output} cannot be written: {error}") from error
        self._events: SummaryWriter | None = None
        self._attempt(
            "TensorBoard events",
            lambda: setattr(self, "_events", SummaryWriter(str(self.output / "tensorboard"))),
        )

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a TensorBoard curve."""
        self._event(lambda events: events.add_scalar(tag, value, step))

    def images(
        self,
        tag: str,
        samples: Tensor | Mapping[str, Tensor],
        *,
        columns: int = 10,
        step: int | None = None,
    ) -> None:
        """Write a grid of samples to ``<tag>.png`` and to TensorBoard; see `sample_grid`."""

        def draw() -> None:
            picture = sample_grid(samples, columns)
            write_atomic(self.output / f"{tag}.png", picture)
            pixels = np.asarray(Image.open(io.BytesIO(picture)))
            self._event(lambda events: events.add_image(tag, pixels, step, dataformats="HWC"))

        self._attempt(f"{tag}.png", draw)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write ``<name>`` as JSON; what JSON has no number for (nan, infinity) becomes null."""
        text = json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"
        self._attempt(name, lambda: write_atomic(self.output / name, text.encode()))

    def close(self) -> None:
        """Finish the event file."""
        self._event(lambda events: events.close())
        self._events = None

    def _event(self, action: Callable[[Any], object]) -> None:
        if self._events is not None and not self._attempt(
            "TensorBoard events", lambda: action(self._events)
        ):
            self._events = None  # its writer is broken for good; one warning is enough

    def _attempt(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: samples that are no images
            log.warning("%s in %s is left out: %s", what, self.output, error)
            return False
        return True


def progress(title: str) -> Callable[[int, int, dict[str, float]], None]:
    """Return a callback that shows how far a training is.

    It takes the iterations done, the iterations in all and the losses, and may be used for one
    training after the other. On a terminal it draws a bar; elsewhere it logs a line every few
    seconds and at the end, since carriage returns pile up in captured logs.
    """
    return _Bar(title) if sys.stderr.isatty() else _Lines(title)


class _Lines:
    """Progress as log lines."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.began = self.last = time.monotonic()
        self.done = math.inf

    def __call__(self, done: int, total: int, losses: dict[str, float]) -> None:
        now = time.monotonic()
        if done <= self.done:  # another training, which may begin at a checkpoint
            self.began = now
        self.done = done
        if done < total and now - self.last < LOG_SECONDS:
            return
        self.last = now
        log.info(
            "%s: %d/%d, %.0f s%s", self.title, done, total, now - self.began, _in_words(losses)
        )


class _Bar:
    """Progress as a bar on the terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.title = title
        self.progress = Progress(console=Console(stderr=True))
        self.task = self.progress.add_task(title, total=None, start=False, visible=False)
        # If the training fails, nobody says so here; a bar left open would hide the cursor.
        weakref.finalize(self, self.progress.stop)

    def __call__(self, done: int, total: int, losses: dict[str, float]) -> None:
        bar = self.progress
        if not bar.live.is_started:
            bar.remove_task(self.task)
            self.task = bar.add_task(self.title, total=total)
            bar.start()
        description = self.title + _in_words(losses)
        bar.update(self.task, completed=done, total=total, description=description)
        if done >= total:
            bar.stop()


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
        cells.append([title, *(_number(figures.get(name, math.nan)) for name in names)])
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


def _pixels(images: Tensor) -> list[np.ndarray]:
    """Turn images (n, c, h, w) in [-1, 1] into arrays (h, w, 3) of bytes."""
    images = torch.nan_to_num(images.detach().cpu().float()).clamp(-1, 1)
    # Grey becomes RGB; of any other number of channels, three are shown.
    channels = [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]
    array = ((images[:, channels] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [np.ascontiguousarray(image) for image in array]


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Tensor, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _in_words(losses: Mapping[str, float]) -> str:
    return "".join(f", {name} {_number(value)}" for name, value in losses.items())
