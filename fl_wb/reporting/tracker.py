"""What a run leaves behind: TensorBoard events, pictures and JSON files in its output folder.

A disk that fails costs a picture or a curve, with a warning; the JSON file is not optional.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fl_wb.persistence.tensor_files import write_atomic
from fl_wb.reporting.pictures import sample_grid

# Flower's logger, by its name: its handlers show our lines beside Flower's, and without Flower this
# is a plain logger.
log = logging.getLogger("flwr")


class Tracker:
    """Writes what a run leaves into its output folder.

    Parameters
    ----------
    output : Path
        The folder; made if it is not there. Events go to ``tensorboard/`` in it.
    """

    def __init__(self, output: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second

        self.output = Path(output)
        self._events: SummaryWriter | None = None
        self._attempt(
            "TensorBoard events",
            lambda: setattr(self, "_events", SummaryWriter(str(self.output / "tensorboard"))),
        )

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a TensorBoard curve."""
        self._event(lambda events: events.add_scalar(tag, value, step))

    def images(
        self, tag: str, samples: Tensor | Mapping[str, Tensor], *, columns: int = 10
    ) -> None:
        """Write a grid of samples to ``<tag>.png`` and to TensorBoard; see `sample_grid`."""
        self.picture(tag, lambda: sample_grid(samples, columns))

    def picture(self, tag: str, drawn: Callable[[], bytes]) -> None:
        """Write a PNG file to ``<tag>.png`` and to TensorBoard."""

        def draw() -> None:
            picture = drawn()
            write_atomic(self.output / f"{tag}.png", picture)
            pixels = np.asarray(Image.open(io.BytesIO(picture)))
            self._event(lambda events: events.add_image(tag, pixels, dataformats="HWC"))

        self._attempt(f"{tag}.png", draw)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write ``<name>`` as JSON; what JSON has no number for (nan, infinity) becomes null.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        text = json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"
        try:
            write_atomic(self.output / name, text.encode())
        except OSError as error:
            raise OSError(f"{self.output / name} cannot be written: {error}") from error

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
