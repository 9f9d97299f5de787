"""Grids of samples as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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


def _pixels(images: Tensor) -> list[np.ndarray]:
    """Turn images (n, c, h, w) in [-1, 1] into arrays (h, w, 3) of bytes."""
    images = torch.nan_to_num(images.detach().cpu().float()).clamp(-1, 1)
    # Grey becomes RGB; of any other number of channels, three are shown.
    channels = [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]
    array = ((images[:, channels] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [np.ascontiguousarray(image) for image in array]
