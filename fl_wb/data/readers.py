"""Reading images from folders: IDX files (MNIST and its relatives) and class folders of pictures.

Both come from strangers, so everything is checked before it is believed, and what is wrong is said
with the file's name.
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fl_wb.data.folders import (
    TEST,
    TRAINING,
    is_litter,
    picture_shape,
    read_picture_folders,
)
from fl_wb.data.pictures import MOST_BYTES, Bytes, DataError, Labels

__all__ = [
    "Bytes",
    "DataError",
    "Labels",
    "idx_shape",
    "is_idx",
    "picture_shape",
    "read_digits",
    "read_idx",
    "read_idx_folder",
    "read_picture_folders",
]

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's

IDX_NAME = re.compile(
    r"^(?P<prefix>.*?)[-_.]?(?P<kind>images|labels)[-.]idx\d-(?:u?byte|short|int|float|double)"
    r"(?:\.gz)?$",
    re.IGNORECASE,
)
IDX_TYPES = {8: "bytes", 9: "signed bytes", 11: "16-bit integers", 12: "32-bit integers",
             13: "32-bit floats", 14: "64-bit floats"}  # fmt: skip
DIGITS_SHAPE = (1, 8, 8)
CHUNK = 1 << 20
# What a .gz may grow to: images of a data set take about a fifth, of blank paper more.
GROWTH, FREE = 32, 1 << 26


def read_digits() -> tuple[Bytes, Labels, int]:
    """Return scikit-learn's 8x8 digits (n, 1, 8, 8), their labels, and the highest value, 16."""
    from sklearn.datasets import load_digits  # here: it takes a second that other data need not pay

    digits = load_digits()
    return digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64), 16


def is_idx(path: Path) -> bool:
    """Return whether a file's name is that of an IDX file of images or labels."""
    return not is_litter(path.name) and bool(IDX_NAME.match(path.name))


def read_idx_folder(folder: Path) -> list[tuple[Bytes, Labels]]:
    """Read one pair of IDX files, or a training and a test pair, in this order.

    Of two pairs, the words in their names tell which is which: ``train`` and ``t10k`` or ``test``,
    as words of their own. One such name is enough, then the other pair is the other part. Of one
    file plain and as ``.gz``, the plain one is read.

    Returns
    -------
    list[tuple[Bytes, Labels]]
        Images (n, c, h, w) and labels (n,) of each pair.

    Raises
    ------
    DataError
        If there is no pair, half a pair, more than one data set, or a damaged file.
    """
    parts = [_idx_pair(**pair) for pair in _idx_pairs(folder)]
    if len({pixels.shape[1:] for pixels, _ in parts}) > 1:
        raise DataError(f"the training and the test images in {folder} differ in size")
    return parts


def idx_shape(folder: Path) -> tuple[int, int, int]:
    """Return the shape (c, h, w) of a folder's images, from one header.

    Raises
    ------
    DataError
        As `read_idx_folder`.
    """
    path = _idx_pairs(folder)[0]["images"]
    with _opened(path) as file:
        shape = _idx_header(file, path, (3, 4))
    return _idx_layout(path, shape)[1]


def _idx_pairs(folder: Path) -> list[dict[str, Path]]:
    """Return the files of the training and the test pair, or of the only pair."""
    pairs: dict[str, dict[str, Path]] = {}
    # Reversed, so that a plain file wins over its .gz.
    for path in sorted(folder.iterdir(), reverse=True):
        if path.is_file() and is_idx(path) and (match := IDX_NAME.match(path.name)):
            pair, kind = pairs.setdefault(match["prefix"], {}), match["kind"].lower()
            if kind in pair:
                log.warning("%s is left out: %s is read", pair[kind], path)
            pair[kind] = path
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
    if len(pairs) == 1:
        return list(pairs.values())
    tests = [prefix for prefix in pairs if _part_of(prefix) == "test"]
    trains = [prefix for prefix in pairs if _part_of(prefix) == "train"]
    if len(pairs) == 2 and len(tests) + len(trains) == 1:
        (other,) = set(pairs) - {*tests, *trains}
        (trains if tests else tests).append(other)
        log.info(
            "%s: %r is taken for the training part, %r for the test part", folder, *trains, *tests
        )
    if len(pairs) > 2 or len(tests) != 1 or len(trains) != 1:
        names = ", ".join(sorted(pair["images"].name for pair in pairs.values()))
        raise DataError(
            f"{folder} holds more than one data set ({names}); keep one pair, "
            "or one pair and its test pair"
        )
    return [pairs[trains[0]], pairs[tests[0]]]


def _part_of(prefix: str) -> str | None:
    """Return which part a name says: "contest" is no test."""
    words = set(re.split(r"[^a-z0-9]+", prefix.lower()))
    train, test = bool(words & {*TRAINING}), bool(words & {*TEST})
    return None if train == test else "train" if train else "test"


def _idx_pair(images: Path, labels: Path) -> tuple[Bytes, Labels]:
    pixels, classes = read_idx(images, ndim=(3, 4)), read_idx(labels, ndim=1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images, but {labels} holds {len(classes)} labels"
        )
    last, shape = _idx_layout(images, list(pixels.shape))
    if last:
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels.reshape(-1, *shape), classes.astype(np.int64)


def _idx_layout(path: Path, shape: list[int]) -> tuple[bool, tuple[int, int, int]]:
    """Return whether channels come last, and (c, h, w)."""
    if len(shape) == 3:
        return False, (1, shape[1], shape[2])
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise DataError(f"{path}: which of {shape} are the 1 or 3 channels cannot be told")
    _, a, b, c = shape
    return (True, (c, a, b)) if last else (False, (a, b, c))


def read_idx(path: Path, *, ndim: int | tuple[int, ...]) -> Bytes:
    """Read an IDX file of bytes, plain or gzipped (by its name).

    The header's sizes are checked against the bytes that are there before anything of that size is
    allocated; a ``.gz`` may grow to ``GROWTH`` times its size, or to ``FREE`` bytes.

    Parameters
    ----------
    path : Path
        The file.
    ndim : int or tuple of int
        Dimensions it may have: 3 for images (n, h, w), 4 for images with channels, 1 for labels
        (n,).

    Raises
    ------
    DataError
        If the file is unreadable, is no such IDX file, or is shorter or longer than its header
        says.
    """
    with _opened(path) as file:
        return _read_idx(file, path, (ndim,) if isinstance(ndim, int) else ndim)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]  # GzipFile reads like any binary file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _idx_header(file: IO[bytes], path: Path, ndims: tuple[int, ...]) -> list[int]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != bytes(2) or magic[2] != 8 or magic[3] not in ndims:
        kind = f"IDX file of {IDX_TYPES[magic[2]]}" if _other_idx(magic) else magic.hex()
        raise DataError(
            f"{path} is no IDX file of bytes with {' or '.join(map(str, ndims))} dimension(s): "
            f"it begins as {kind}"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} is no IDX file: it ends within its header")
    shape = [int(size) for size in np.frombuffer(sizes, dtype=">u4")]
    if math.prod(shape) == 0:
        raise DataError(f"{path} is empty: its header says {shape}")
    return shape


def _other_idx(magic: bytes) -> bool:
    return len(magic) == 4 and magic[:2] == bytes(2) and magic[2] in IDX_TYPES and magic[2] != 8


def _read_idx(file: IO[bytes], path: Path, ndims: tuple[int, ...]) -> Bytes:
    shape = _idx_header(file, path, ndims)
    expected, there = math.prod(shape), path.stat().st_size
    most = min(max(GROWTH * there, FREE), MOST_BYTES) if path.suffix.lower() == ".gz" else there
    # In chunks, and no more than is believable: a forged header reserves nothing.
    content = bytearray()
    while len(content) <= min(expected, most) and (chunk := file.read(CHUNK)):
        content += chunk
    if expected > most < len(content):
        raise DataError(
            f"{path}: its header says {shape}, {expected} bytes, and it grows beyond {most} bytes "
            f"from {there}; unpack it if that is right"
        )
    if len(content) != expected:
        found = f"{len(content)} bytes" if len(content) < expected else "more"
        raise DataError(f"{path}: its header says {shape}, {expected} bytes, but it holds {found}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
