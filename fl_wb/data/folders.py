"""Folders of pictures: which folder is which class, and which files are pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fl_wb.data.pictures import (
    Bytes,
    DataError,
    Labels,
    Stack,
    grey_by_header,
    in_one_form,
    pixels_of,
    suffixes,
)

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's

# What archives and file managers leave among pictures; hidden files and folders are litter, too.
LITTER = ("__macosx", "thumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin")
TRAINING = ("train", "training")
TEST = ("test", "testing", "t10k", "validation", "valid", "val")  # the first that is there


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is nothing that its owner made."""
    return name.startswith(".") or name.lower() in LITTER


def read_picture_folders(root: Path) -> list[tuple[Bytes, Labels]]:
    """Read class folders of pictures, or a training and a test folder of class folders.

    In any form that Pillow decodes. Pictures in folders below a class folder are of its class.
    Folders named by different numbers have these as classes; otherwise the classes count the folder
    names in order. Hidden files and what file managers leave are passed over; any other file that
    is no picture is left out with a warning.

    Returns
    -------
    list[tuple[Bytes, Labels]]
        Of each part, images (n, c, h, w), with one channel if all of both are grey and three
        otherwise, and labels (n,).

    Raises
    ------
    DataError
        If a folder is empty, a picture cannot be read, sizes differ, a class's number is beyond 64
        bits, or the two parts differ in their classes or sizes.
    """
    roots = part_folders(root)
    classes = _classes(roots[0])
    parts = in_one_form([_read(part, classes) for part in roots])
    sizes = [pixels.shape[1:] for pixels, _ in parts]
    if sizes[0] != sizes[-1]:
        raise DataError(f"{roots[0]} has pictures {sizes[0]}, but {roots[1]} has {sizes[1]}")
    return parts


def _read(root: Path, classes: Mapping[str, int]) -> tuple[Bytes, Labels]:
    if others := _beside(root):
        log.warning("%s: left out, in no class folder: %s", root, _some(others))
    stack, labels = Stack(), []
    for folder in class_folders(root):
        if folder.name not in classes:
            raise DataError(f"{folder} is of a class that the training part has not")
        for path in pictures_in(folder):
            stack.add(str(path), pixels_of(path))
            labels.append(classes[folder.name])
    return stack.done(), np.asarray(labels, dtype=np.int64)


def picture_shape(root: Path) -> tuple[int, int, int]:
    """Return the shape (c, h, w) of a folder's pictures, from one and the others' headers.

    Raises
    ------
    DataError
        As `read_picture_folders`.
    """
    paths = [
        path
        for part in part_folders(root)
        for folder in class_folders(part)
        for path in pictures_in(folder, quiet=True)
    ]
    height, width, channels = pixels_of(paths[0]).shape
    if channels == 1 and not all(map(grey_by_header, paths[1:])):
        channels = 3
    return channels, height, width


def part_folders(root: Path) -> list[Path]:
    """Return the folder of class folders, or those of its training and its test part.

    Raises
    ------
    DataError
        If there is a test part, but no training part.
    """
    named = {folder.name.lower(): folder for folder in _folders(root)}
    if not named or not set(named) <= {*TRAINING, *TEST}:
        return [root]
    if not all(_folders(folder) for folder in named.values()):  # classes that have such names
        return [root]
    trains = [named[name] for name in TRAINING if name in named]
    tests = [named[name] for name in TEST if name in named]
    if len(trains) != 1:
        raise DataError(
            f"{root} holds the parts {', '.join(sorted(named))}; it needs one that is called train"
        )
    for folder in tests[1:]:
        log.warning("%s is left out: %s is the held-out part", folder, tests[0])
    return [*trains, *tests[:1]]


def class_folders(root: Path) -> list[Path]:
    """Return the class folders of a folder, in order.

    Raises
    ------
    DataError
        If there are none, or the only one holds no pictures but folders: it is the folder meant.
    """
    folders = _folders(root)
    if not folders:
        raise DataError(f"{root} holds no class folders; expected {root}/<class>/*.png or .jpg")
    if len(folders) == 1 and len(_folders(folders[0])) > 1 and not _beside(folders[0]):
        raise DataError(
            f"{folders[0]} is the only folder of {root} and holds folders itself; are they the "
            "classes? Then name that folder"
        )
    return folders


def pictures_in(folder: Path, *, quiet: bool = False) -> list[Path]:
    """Return the pictures in a class folder and below it, in order.

    Raises
    ------
    DataError
        If there are none, or a folder cannot be read.
    """
    files = sorted(_files_below(folder))
    paths = [path for path in files if path.suffix.lower() in suffixes()]
    others = [path.name for path in files if path.suffix.lower() not in suffixes()]
    if not paths:
        raise DataError(
            f"{folder} holds no pictures (such as .png or .jpg)"
            + (f", only {_some(others)}" if others else "")
        )
    if others and not quiet:
        log.warning("%s: left out, no picture by name: %s", folder, _some(others))
    return paths


def _classes(root: Path) -> dict[str, int]:
    """Return the class of each class folder, by the folder's name."""
    names = [folder.name for folder in class_folders(root)]
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    if len(numbers) == len(names):
        if max(numbers) >= 1 << 63:
            raise DataError(f"{root}: {max(numbers)} as a folder's name is too large a class")
        if len(set(numbers)) == len(names):
            return dict(zip(names, numbers, strict=True))
        log.warning("%s: folders of one number; their classes count %s", root, _some(names))
    return {name: place for place, name in enumerate(names)}


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in _entries(root) if path.is_dir())


def _beside(root: Path) -> list[str]:
    return sorted(path.name for path in _entries(root) if not path.is_dir())


def _entries(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if not is_litter(path.name)]
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, each folder once: links may be circles."""
    waiting, known = [folder], set()
    while waiting:
        here = waiting.pop()
        if (place := os.path.realpath(here)) in known:
            continue
        known.add(place)
        for path in _entries(here):
            if path.is_dir():
                waiting.append(path)
            else:
                yield path


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
