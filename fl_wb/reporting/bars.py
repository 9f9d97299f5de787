"""Who has what, as a picture: a bar for each node, with a part for each class."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from fl_wb.reporting.pictures import GAP, INK, PAPER

LENGTH, HEIGHT = 480, 14  # pixels of the longest bar
KEY = 34  # of the width of a class in the key


def stacked_bars(rows: Mapping[str, Mapping[int, int]]) -> bytes:
    """Draw stacked bars, one below the other, and below them what colour is what class.

    Parameters
    ----------
    rows : mapping of str to mapping of int to int
        Title of a bar to the counts of its parts.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    totals = {title: sum(counts.values()) for title, counts in rows.items()}
    if not any(totals.values()):
        raise ValueError("no node has anything")
    labels = sorted({label for counts in rows.values() for label in counts})
    colours = {label: _colour(place, len(labels)) for place, label in enumerate(labels)}
    font = ImageFont.load_default()
    margin = math.ceil(max(font.getlength(title) for title in rows)) + 4 * GAP
    scale, step = LENGTH / max(totals.values()), HEIGHT + 2 * GAP
    number = math.ceil(max(font.getlength(str(total)) for total in totals.values()))
    width = margin + LENGTH + number + 4 * GAP
    columns = max((width - margin) // KEY, 1)
    height = step * (len(rows) + math.ceil(len(labels) / columns) + 1)
    canvas = Image.new("RGB", (width, height), (PAPER,) * 3)
    draw = ImageDraw.Draw(canvas)

    def text(x: float, top: float, words: str) -> None:
        draw.text((x, top + HEIGHT // 2), words, fill=(INK,) * 3, font=font, anchor="lm")

    for row, (title, counts) in enumerate(rows.items()):
        top, done = GAP + row * step, 0
        text(2 * GAP, top, title)
        for label in sorted(counts):
            left, done = margin + done * scale, done + counts[label]
            right = margin + done * scale
            if round(right) > round(left):
                box = (round(left), top, round(right) - 1, top + HEIGHT)
                draw.rectangle(box, fill=colours[label])
        text(margin + done * scale + 2 * GAP, top, str(done))
    for place, label in enumerate(labels):
        top = GAP + (len(rows) + place // columns) * step + HEIGHT // 2
        left = margin + place % columns * KEY
        draw.rectangle((left, top + 3, left + 7, top + HEIGHT - 4), fill=colours[label])
        text(left + 10, top, str(label))
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return file.getvalue()


def _colour(place: int, number: int) -> str:
    # Neighbours alternate in lightness: hues alone can hardly be told apart beyond some ten.
    return f"hsl({360 * place // max(number, 1)}, 60%, {(45, 65)[place % 2]}%)"
