"""Reading images from folders: IDX files (MNIST and its relatives) and class folders of pictures.

Both come from strangers, so everything is checked before it is believed, and what is wrong is said
with the file's name.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

IDX_NAME = re.compile(r"^(?P<prefix>.*?)[-_.]?(?P<kind>images|labels)[-.]idx[13]-ubyte(?:\.gz)?$")
PICTURES = (".png", ".jpg", ".jpeg")
CHUNK = 1 << 20


class DataError(ValueError):
    """Data that cannot be used; the text names the file, node or class and what is allowed."""


def read_digits() -> tuple[Bytes, Labels, int]:
    """Return scikit-learn's 8x8 digits (n, 1, 8, 8), their labels, and the highest value, 16."""
    from sklearn.datasets import load_digits  # here: it takes a second that other data need not pay

    digits = load_digits()
    return digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64), 16


def read_idx_folder(folder: Path) -> list[tuple[Bytes, Labels]]:
    """Read one pair of IDX files, or a training and a test pair, in this order.

    A pair is a test pair if its names contain ``t10k`` or ``test``.

    Returns
    -------
    list[tuple[Bytes, Labels]]
        Images (n, 1, h, w) and labels (n,) of each pair.

    Raises
    ------
    DataError
        If there is no pair, half a pair, more than one data set, or a damaged file.
    """
    pairs: dict[str, dict[str, Path]] = {}
    for path in sorted(
        folder.iterdir(), reverse=True
    ):  # reversed, so that a plain file wins over its .gz
        if path.is_file() and (match := IDX_NAME.match(path.name)):
            pairs.setdefault(match["prefix"], {})[match["kind"]] = path
    if not pairs:
        raise DataError(
            f"no IDX files in {folder}: looked for *images-idx3-ubyte and *labels-idx1-ubyte, "
            "plain or .gz"
        )
    for prefix, pair in pairs.items():
        for kind in {"images", "labels"} - set(pair):
            there = next(iter(pair.values())).name
            raise DataError(
                f"{folder} holds {there} but no {kind} file with the same beginning {prefix!r}"
            )
    tests = [prefix for prefix in pairs if re.search("t10k|test", prefix)]
    trains = [prefix for prefix in pairs if prefix not in tests]
    if len(tests) > 1 or len(trains) > 1:
        names = ", ".join(sorted(pair["images"].name for pair in pairs.values()))
        raise DataError(
            f"{folder} holds more than one data set ({names}); keep one pair, "
            "or one pair and its test pair"
        )
    parts = [_idx_pair(**pairs[prefix]) for prefix in trains + tests]
    if len({pixels.shape[1:] for pixels, _ in parts}) > 1:
        raise DataError(f"the training and the test images in {folder} differ in size")
    return parts


def _idx_pair(images: Path, labels: Path) -> tuple[Bytes, Labels]:
    pixels, classes = read_idx(images, ndim=3), read_idx(labels, ndim=1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images, but {labels} holds {len(classes)} labels"
        )
    return pixels[:, None], classes.astype(np.int64)


def read_idx(path: Path, *, ndim: int) -> Bytes:
    """Read an IDX file of bytes, plain or gzipped (by its name).

    The header's sizes are checked against the bytes that are there before anything of that size is
    allocated.

    Parameters
    ----------
    path : Path
        The file.
    ndim : int
        Dimensions it must have: 3 for images (n, h, w), 1 for labels (n,).

    Raises
    ------
    DataError
        If the file is unreadable, is no such IDX file, or is shorter or longer than its header
        says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx(file, path, ndim)  # type: ignore[arg-type]  # GzipFile reads like any binary file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_idx(file: IO[bytes], path: Path, ndim: int) -> Bytes:
    header = file.read(4 + 4 * ndim)
    if len(header) < 4 + 4 * ndim or header[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(
            f"{path} is no IDX file of bytes with {ndim} dimension(s): "
            f"it begins with {header[:4].hex()}"
        )
    shape = [int(size) for size in np.frombuffer(header, dtype=">u4", offset=4)]
    expected = 1
    for size in shape:  # Python integers: a forged header cannot overflow them
        expected *= size
    if expected == 0:
        raise DataError(f"{path} is empty: its header says {shape}")
    # In chunks: read(expected) would reserve whatever a damaged header claims.
    content = bytearray()
    while len(content) <= expected and (chunk := file.read(CHUNK)):
        content += chunk
    if len(content) != expected:
        found = f"{len(content)} bytes" if len(content) < expected else "more"
        raise DataError(f"{path}: its header says {shape}, {expected} bytes, but it holds {found}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def read_picture_folder(root: Path) -> tuple[Bytes, Labels]:
    """Read a folder of class folders of PNG and JPEG files.

    Folders named by numbers have these as classes; otherwise the classes count the folder names in
    order.

    Returns
    -------
    tuple[Bytes, Labels]
        Images (n, c, h, w), with one channel if all are grey and three otherwise, and labels (n,).

    Raises
    ------
    DataError
        If a folder is empty, a file is no picture, or sizes differ.
    """
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not folders:
        raise DataError(f"{root} holds no class folders; expected {root}/<class>/*.png or .jpg")
    numbered = all(folder.name.isascii() and folder.name.isdigit() for folder in folders)
    pictures, labels = [], []
    for position, folder in enumerate(folders):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if not paths:
            raise DataError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
        for path in paths:
            pictures.append((path, _picture(path)))
            labels.append(int(folder.name) if numbered else position)
    first, (height, width, _) = pictures[0][0], pictures[0][1].shape
    for path, pixels in pictures:
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(
                f"{path} is {found} pixels, but {first} is {width}x{height}; all must have one size"
            )
    channels = max(
        pixels.shape[2] for _, pixels in pictures
    )  # one colour picture makes all of them RGB
    stack = [np.broadcast_to(pixels, (height, width, channels)) for _, pixels in pictures]
    return np.stack(stack).transpose(0, 3, 1, 2), np.asarray(labels, dtype=np.int64)


def _picture(path: Path) -> Bytes:
    """Return the (h, w, 1) or (h, w, 3) bytes of a picture; transparency is dropped."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
            pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error
    return pixels[..., None] if grey else pixels
