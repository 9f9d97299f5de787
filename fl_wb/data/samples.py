"""A data set as samples: read, scaled, and parted into training and held-out part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_wb.data import hub, readers
from fl_wb.data.readers import Bytes, DataError, Labels

# The held-out part is the same for all partition seeds: their figures stay comparable.
SPLIT_SEED = 2101


@dataclass(frozen=True)
class Samples:
    """Labelled images: ``images`` (n, c, h, w) float32 in [-1, 1], ``labels`` (n,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: Tensor | Labels) -> Samples:
        """Return a copy of the images that an index array or mask names."""
        index = torch.as_tensor(index)
        return Samples(self.images[index], self.labels[index])


@lru_cache(maxsize=4)
def read_parts(
    name: str, place: str | None, share: float, *details: Any
) -> tuple[Samples, Samples]:
    """Return the training part and the held-out part, both shuffled, and kept for the next call.

    Parameters
    ----------
    name : str
        What data: "digits", "idx", "images" or "hub".
    place : str or None
        Their folder, or their name.
    share : float
        That is held out where the data bring no test part.
    *details : tuple of int, int or None
        Of "hub": shape and limit, see `fl_wb.data.hub.read_hub`.

    Raises
    ------
    DataError
        If the data are not there or damaged.
    """
    if name == "digits":
        parts = [_to_samples(*readers.read_digits())]
    elif name == "hub":
        if not place:
            raise DataError("data.name=hub needs data.dataset, its name")
        parts = [_to_samples(*part) for part in hub.read_hub(place, *details)]
    else:
        read = readers.read_idx_folder if name == "idx" else readers.read_picture_folders
        parts = [_to_samples(*part) for part in read(folder_of(name, place))]
    train, test = _split(parts[0], share) if len(parts) == 1 else parts
    return _shuffled(train), _shuffled(test)


def folder_of(name: str, root: str | None) -> Path:
    """Return ``data.root`` as a folder that is there, or raise a `DataError`."""
    if not root:
        raise DataError(f"data.name={name} needs data.root, its folder")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={folder} is not a folder")
    return folder


def _split(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """Split into training and held-out part, class by class, always in the same way."""
    generator = np.random.default_rng(SPLIT_SEED)
    mask = torch.zeros(len(samples), dtype=torch.bool)
    for label in torch.unique(samples.labels):
        order = generator.permutation(torch.nonzero(samples.labels == label).flatten().numpy())
        count = min(max(round(share * len(order)), 1), len(order) - 1)
        mask[torch.from_numpy(order[:count])] = True
    return samples[~mask], samples[mask]


def _shuffled(samples: Samples) -> Samples:
    # Files are sorted by class, or by writer as MNIST's test part is.
    return samples[np.random.default_rng(SPLIT_SEED).permutation(len(samples))]


def _to_samples(pixels: Bytes, labels: Labels, top: int = 255) -> Samples:
    """Scale (n, c, h, w) bytes from 0 to top to [-1, 1]."""
    images = torch.from_numpy(pixels).float().div_(top / 2).sub_(1)
    return Samples(images, torch.from_numpy(labels))
