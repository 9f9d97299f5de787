"""Reading images through flwr-datasets: CIFAR, LSUN and whatever else is on the Hugging Face Hub.

Who gets which image is decided in `fl_wb.data.datasets`, as for all other data; flwr-datasets
brings the whole. It is an extra: pip install "fl-wb[datasets]".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import ImageOps

from fl_wb.data.pictures import Bytes, DataError, Labels, Stack, in_one_form, seen

TEST_SPLITS = ("test", "validation", "valid")


def read_hub(
    dataset: str, shape: Sequence[int] = (), limit: int | None = None
) -> list[tuple[Bytes, Labels]]:
    """Read the training part of a data set, and its test part where it has one.

    The images are the first column of images, the classes the first one of class labels (a
    ``label`` of integers will do; of CIFAR-100's two, the fine ones). Where there is none, all are
    of class 0.

    Parameters
    ----------
    dataset : str
        Its name on the Hugging Face Hub, such as "uoft-cs/cifar10", or a folder in the same format.
    shape : sequence of int, optional
        (c, h, w) to bring images to: cropped at their centre to the ratio of its sides, then
        scaled. Without: they are of one size, and stay as they are.
    limit : int, optional
        Read no more images than this of each part.

    Returns
    -------
    list[tuple[Bytes, Labels]]
        Images (n, c, h, w) and labels (n,) of each part.

    Raises
    ------
    DataError
        If flwr-datasets is not installed, or the data cannot be had, or holds no images.
    """
    try:
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise DataError(
            f"data.dataset={dataset!r} is read by flwr-datasets, which is not installed: "
            'pip install "fl-wb[datasets]"'
        ) from error
    # Shuffled, so that the first `limit` are of all classes; always alike.
    federated = FederatedDataset(dataset=dataset, partitioners={}, shuffle=True, seed=2101)
    try:
        parts = [federated.load_split("train")]
    except Exception as error:  # a download, a cache, a parser: each has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.dataset={dataset!r} cannot be read: {reason}") from error
    for split in TEST_SPLITS:
        try:
            parts.append(federated.load_split(split))
            break
        except ValueError:  # there is no such part
            continue
    return in_one_form([_part(part, dataset, shape, limit) for part in parts])


def _part(part: Any, dataset: str, shape: Sequence[int], limit: int | None) -> tuple[Bytes, Labels]:
    images = _column(part, "Image")
    if images is None:
        raise DataError(
            f"data.dataset={dataset!r} has no column of images, only {', '.join(part.features)}"
        )
    if limit is not None and len(part) > limit:
        part = part.select(range(limit))
    names = _column(part, "ClassLabel") or ("label" if "label" in part.features else None)
    labels = np.zeros(len(part), np.int64) if names is None else np.asarray(part[names], np.int64)
    return _stack(part[images], dataset, shape), labels


def _column(part: Any, kind: str) -> str | None:
    """Return the first column of a kind, by the name of the kind's class in `datasets`."""
    found = (name for name, feature in part.features.items() if type(feature).__name__ == kind)
    return next(found, None)


def _stack(pictures: Iterable[Any], dataset: str, shape: Sequence[int]) -> Bytes:
    stack = Stack()
    for number, picture in enumerate(pictures):
        name = f"data.dataset={dataset!r}: image {number}"
        try:
            image = seen(picture)
        except Exception as error:  # Pillow's decoders have exceptions of their own
            raise DataError(f"{name} cannot be read: {error}") from error
        if shape:
            image = image.convert("L" if shape[0] == 1 else "RGB")
            image = ImageOps.fit(image, (shape[2], shape[1]))
        pixels = np.asarray(image)
        try:
            stack.add(name, pixels.reshape(*pixels.shape[:2], -1))
        except DataError as error:
            raise DataError(
                f"{error}: data.dataset={dataset!r} has images of several sizes: set data.shape, "
                "such as [3,32,32], to bring them to one"
            ) from error
    return stack.done()
