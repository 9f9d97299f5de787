"""Pictures as people have them, in any form that Pillow decodes, as bytes.

What one sees is kept, or a refusal says why it cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

MOST_PIXELS = 1 << 25  # of a picture: 33 million, a large camera's
MOST_BYTES = 1 << 31  # of all pictures of a data set
# Pillow starts Ghostscript on EPS, and for the others has a name, but no decoder of its own.
NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")


class DataError(ValueError):
    """Data that cannot be used; the text names the file, node or class and what is allowed."""


def seen(image: Image.Image) -> Image.Image:
    """Return what one sees of a picture, in mode L if it is grey and RGB otherwise.

    It is turned as its EXIF orientation says; 16 bits and floats are scaled to 8 bits. Transparent
    parts show white, or black where the picture would vanish on white.

    Raises
    ------
    ValueError
        If it has more than ``MOST_PIXELS``, several frames, or numbers whose range is not known;
        and whatever Pillow's decoders raise for damaged files.
    """
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MOST_PIXELS}")
    # MPO: a camera's JPEG with a preview behind it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("it has several frames; only still pictures are read")
    image.load()
    form, image = image.format, ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, sixteen=form in ("PNG", "PPM"))
    if image.has_transparency_data:
        image = _on_ground(image)
    return image.convert("L" if is_grey(image) else "RGB")


def is_grey(image: Image.Image) -> bool:
    """Return whether a picture has no colour, by its mode and palette alone."""
    if image.mode in ("P", "PA"):
        colours = np.reshape(image.getpalette() or [], (-1, 3))
        return bool((colours == colours[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))


def _eight_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    numbers = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and sixteen):
        scaled = (numbers.astype(np.uint32) * 255 + 32767) // 65535
    elif image.mode == "F":
        low, high = float(numbers.min()), float(numbers.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its floating-point values go from {low} to {high}, not from 0 to 1")
        scaled = np.round(numbers * 255)
    else:
        raise ValueError("it has integers of 32 bits, whose range is not known; save it as 8 or 16")
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        alpha = Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _on_ground(image: Image.Image) -> Image.Image:
    grey, image = is_grey(image), image.convert("RGBA")
    white, black = (
        Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert(
            "L" if grey else "RGB"
        )
        for ground in ("white", "black")
    )
    return black if _blank(white) and not _blank(black) else white


def _blank(image: Image.Image) -> bool:
    return bool((np.ptp(np.atleast_2d(image.getextrema()), axis=1) == 0).all())


def pixels_of(path: Path) -> Bytes:
    """Return the (h, w, 1) or (h, w, 3) bytes of a picture; see `seen`.

    Raises
    ------
    DataError
        If it cannot be read, naming it.
    """
    with _opened(path) as image:
        pixels = np.asarray(seen(image))
    return pixels.reshape(*pixels.shape[:2], -1)


def grey_by_header(path: Path) -> bool:
    """Return whether a picture is grey, without decoding it.

    Raises
    ------
    DataError
        As `pixels_of`.
    """
    with _opened(path) as image:
        return is_grey(image)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():  # a pipe would be waited for, a broken link be a riddle
        raise DataError(f"{path} is no file, or a link to none")
    try:
        with Image.open(path, formats=formats()) as image:
            yield image
    except Exception as error:  # Pillow's decoders have exceptions of their own
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


class Stack:
    """Pictures of one size, gathered; one in colour makes all of them RGB."""

    def __init__(self) -> None:
        self.pictures: list[Bytes] = []
        self.first, self.bytes = "", 0

    def add(self, name: str, pixels: Bytes) -> None:
        """Add the bytes (h, w, c) of a picture.

        Raises
        ------
        DataError
            If it is of another size than those before, or there are too many bytes.
        """
        self.first = self.first or name
        height, width = self.pictures[0].shape[:2] if self.pictures else pixels.shape[:2]
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but {self.first} is "
                f"{width}x{height}; all must have one size"
            )
        self.pictures.append(pixels)
        self.bytes += pixels.nbytes
        if self.bytes > MOST_BYTES:
            raise DataError(f"{name}: the pictures up to it take more than {MOST_BYTES} bytes")

    def done(self) -> Bytes:
        """Return all of them (n, c, h, w)."""
        channels = max(pixels.shape[2] for pixels in self.pictures)
        shape = (*self.pictures[0].shape[:2], channels)
        return np.stack([np.broadcast_to(p, shape) for p in self.pictures]).transpose(0, 3, 1, 2)


def in_one_form(parts: list[tuple[Bytes, Labels]]) -> list[tuple[Bytes, Labels]]:
    """Return parts of a data set, images (n, c, h, w) and labels, all RGB where one is."""
    channels = max(pixels.shape[1] for pixels, _ in parts)
    return [
        (pixels if pixels.shape[1] == channels else pixels.repeat(channels, 1), labels)
        for pixels, labels in parts
    ]


@cache
def suffixes() -> frozenset[str]:
    """Return the endings of files that are taken for pictures, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in formats())


@cache
def formats() -> tuple[str, ...]:
    """Return the names of the forms that are read, by Pillow's names."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)
