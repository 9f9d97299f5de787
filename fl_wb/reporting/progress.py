"""What a training shows while it runs: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
import weakref
from collections.abc import Callable, Mapping

from fl_wb.reporting.tables import number

# Flower's logger, by its name: its handlers show our lines beside Flower's, and without Flower this
# is a plain logger.
log = logging.getLogger("flwr")

LOG_SECONDS = 5.0  # between two lines of progress


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


def _in_words(losses: Mapping[str, float]) -> str:
    return "".join(f", {name} {number(value)}" for name, value in losses.items())
