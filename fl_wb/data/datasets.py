"""Real data and how it is spread over the nodes.

Scikit-learn's bundled 8x8 digits, a folder of IDX files (MNIST and its many relatives) or of class
folders of pictures, or, as an extra, what flwr-datasets finds on the Hugging Face Hub. A fixed part
is held out and never meets training; from the rest, every target node first gets its few samples,
then the source nodes share what is left: no two nodes of a run ever see the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_wb.data import hub, readers
from fl_wb.data.readers import IDX_NAME, Bytes, DataError
from fl_wb.settings import Rule, Settings, above, at_least, one_of

NAMES = ("digits", "idx", "images", "hub")

Indices = npt.NDArray[np.int64]

# The held-out part is the same for all partition seeds: their figures stay comparable.
SPLIT_SEED = 2101


CLASSES = Rule(
    lambda nodes: nodes and all(classes and min(classes) >= 0 for classes in nodes),
    "a list with the classes of each node, at least one node and one class each, "
    "such as [[0,1,2],[3,4]]",
)
COUNTS = Rule(
    lambda counts: counts and min(counts) > 0,
    "a list with one number, 1 or more, for each node, such as [100,25]",
)
SHAPE = Rule(lambda s: len(s) == 3 and min(s) > 0, "channels, height and width, such as [1,28,28]")


@dataclass
class DataConfig(Settings):
    """Which data a run uses and which node gets what."""

    # Bundled 8x8 digits, IDX files, folders of pictures, or what flwr-datasets finds.
    name: Annotated[str, one_of(*NAMES)] = "digits"
    root: str | None = None  # the folder of "idx" and "images"
    dataset: str | None = None  # of "hub": its name there, or a folder in its format
    limit: Annotated[int, at_least(2)] | None = None  # most images that "hub" reads of each part
    # Shape (c, h, w) of an image. Only needed where the nodes bring data of their own and the
    # server has none to look at; and what images of the hub are brought to.
    shape: Annotated[list[int], SHAPE] | None = None
    # Classes of each source node. Sources that share a class get disjoint images of it.
    sources: Annotated[list[list[int]], CLASSES] = field(
        default_factory=lambda: [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    )
    # Classes of each target node, and how many images of each class it has.
    targets: Annotated[list[list[int]], CLASSES] = field(default_factory=lambda: [[*range(10)]])
    samples_per_class: Annotated[int, at_least(1)] = 10
    # Most images of a class that each source keeps of its share; None: all. A source's weight is
    # the number of its images.
    source_samples_per_class: Annotated[list[int], COUNTS] | None = None
    # One source in place of `sources`, with every training image of the targets' classes, also
    # those that the targets have: the ceiling, which no node can reach.
    pooled: bool = False
    # Share kept for evaluation; unused where the data brings a test part of its own.
    held_out: Annotated[float, above(0, below=1)] = 0.3
    seed: Annotated[int, at_least(0)] = 0  # of the partition; the held-out part is always the same


@dataclass(frozen=True)
class Samples:
    """Labelled images: ``images`` (n, c, h, w) float32 in [-1, 1], ``labels`` (n,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: Tensor | Indices) -> Samples:
        """Return a copy of the images that an index array or mask names."""
        index = torch.as_tensor(index)
        return Samples(self.images[index], self.labels[index])


def load(data: DataConfig) -> tuple[Samples, Samples]:
    """Return the training part and the held-out part; no image is in both.

    The held-out part is the data's own test part where it has one (IDX files called ``t10k`` or
    ``test``), otherwise a stratified split with a fixed seed: ``data.held_out`` of each class, at
    least one image and never all of them. Both are shuffled, so that their first n images are a
    fair sample. The result is cached within the process and shared: do not write into it.

    Raises
    ------
    DataError
        If the data is not there or damaged.
    """
    if data.name != "hub":
        return _load(data.name, data.root, data.held_out)
    return _load("hub", data.dataset, data.held_out, tuple(data.shape or ()), data.limit)


def load_own(folder: str, data: DataConfig) -> tuple[Samples, Samples]:
    """Return the training part and the held-out part of a node's own data.

    Parameters
    ----------
    folder : str
        Absolute folder of IDX files, or of class folders of pictures.
    data : DataConfig
        Says what share is held out, and what shape every node's images have.

    Raises
    ------
    DataError
        If the folder is not absolute, holds no such data, or images of another shape.
    """
    if not Path(folder).is_absolute():
        raise DataError(f"data={folder!r} of a node must be an absolute folder")
    files = Path(folder).glob("*")
    name = "idx" if any(IDX_NAME.match(file.name) for file in files) else "images"
    train, test = _load(name, folder, data.held_out)
    shape, expected = tuple(train.images.shape[1:]), image_shape(data)
    if shape != expected:
        raise DataError(f"{folder} holds images {shape}, but those of this run are {expected}")
    return train, test


def image_shape(data: DataConfig) -> tuple[int, ...]:
    """Return the shape (c, h, w) of a run's images, from the settings or else from the data."""
    return tuple(data.shape) if data.shape else tuple(load(data)[0].images.shape[1:])


def source_samples(data: DataConfig, index: int) -> Samples:
    """Return the training images of source node ``index``.

    Raises
    ------
    DataError
        If there is no such source, or no image of one of its classes is left for it.
    """
    train, _ = load(data)
    node = f"data.sources[{index}]"
    classes = _classes(data.sources, index, node)
    parts = []
    for label in classes:
        part = _partition(train, label, data)[1].get(index)
        if part is None or len(part) == 0:
            raise DataError(
                f"{node}: no training image of class {label} is left for it; {_counts(train)}"
            )
        parts.append(part)
    return train[np.sort(np.concatenate(parts))]


def target_samples(data: DataConfig, index: int) -> Samples:
    """Return the few training images of target node ``index``.

    They are ``data.samples_per_class`` of each of its classes. No source and no other target has
    any of them. The labels are there for evaluation; adaptation needs none.

    Raises
    ------
    DataError
        If there is no such target, or a class has too few images.
    """
    train, _ = load(data)
    node = f"data.targets[{index}]"
    classes = _classes(data.targets, index, node)
    parts = []
    for label in classes:
        part = _partition(train, label, data)[0].get(index)
        if part is None:
            raise DataError(
                f"{node}: too few training images of class {label} for data.samples_per_class="
                f"{data.samples_per_class}, after the targets before it; {_counts(train)}"
            )
        parts.append(part)
    return train[np.sort(np.concatenate(parts))]


def held_out(data: DataConfig, classes: Iterable[int]) -> Samples:
    """Return the held-out images of ``classes``.

    Raises
    ------
    DataError
        If no class is named, or one has no held-out image.
    """
    _, samples = load(data)
    wanted = sorted(set(classes))
    if not wanted:
        raise DataError("no class named to evaluate on")
    for label in wanted:
        if not bool((samples.labels == label).any()):
            raise DataError(f"class {label} has no held-out image; {_counts(samples)}")
    return samples[torch.isin(samples.labels, torch.tensor(wanted))]


def _classes(nodes: list[list[int]], index: int, node: str) -> list[int]:
    """Return the distinct classes of a node, or say that there is none."""
    if not 0 <= index < len(nodes):
        raise DataError(
            f"{node} does not exist: the settings name {len(nodes)} such nodes, counted from 0"
        )
    return list(dict.fromkeys(nodes[index]))


def _counts(samples: Samples) -> str:
    """Return how many images each class has, for an error's text."""
    labels, counts = torch.unique(samples.labels, return_counts=True)
    there = ", ".join(
        f"{label}: {count}" for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    )
    return f"images by class: {there}"


def _partition(
    train: Samples, label: int, data: DataConfig
) -> tuple[dict[int, Indices], dict[int, Indices]]:
    """Deal out the training images of one class; return target -> indices and source -> indices.

    Targets are served first and the sources share the rest: a target's few samples would otherwise
    have been seen in pre-training, and adaptation would look better than it is. A target that asks
    for more than there is gets nothing (its own call says so) rather than starving everyone else.
    """
    order = torch.nonzero(train.labels == label).flatten().numpy()
    # One stream per class, so that a class is dealt out the same way whatever other classes a run
    # uses.
    order = np.random.default_rng([data.seed, label]).permutation(order)
    targets: dict[int, Indices] = {}
    for index, classes in enumerate(data.targets):
        if label in classes and data.samples_per_class <= len(order):
            targets[index], order = np.split(order, [data.samples_per_class])
    if data.pooled:
        order = np.concatenate([*targets.values(), order])
    owners = [index for index, classes in enumerate(data.sources) if label in classes]
    shares = np.array_split(order, len(owners)) if owners else []
    most = data.source_samples_per_class
    return targets, {
        index: share if most is None else share[: most[index]]
        for index, share in zip(owners, shares, strict=True)
    }


@lru_cache(maxsize=4)
def _load(name: str, place: str | None, share: float, *details: Any) -> tuple[Samples, Samples]:
    train, test = _read(name, place, share, *details)
    return _shuffled(train), _shuffled(test)


def _read(name: str, place: str | None, share: float, *details: Any) -> tuple[Samples, Samples]:
    if name == "digits":
        return _split(_to_samples(*readers.read_digits()), share)
    if not place:
        key, what = ("dataset", "its name") if name == "hub" else ("root", "its folder")
        raise DataError(f"data.name={name} needs data.{key}, {what}")
    if name == "hub":
        return _parts([_to_samples(*part) for part in hub.read_hub(place, *details)], share)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={folder} is not a folder")
    if name == "images":
        return _split(_to_samples(*readers.read_picture_folder(folder)), share)
    return _parts([_to_samples(*part) for part in readers.read_idx_folder(folder)], share)


def _parts(parts: list[Samples], share: float) -> tuple[Samples, Samples]:
    """Return training and held-out part, of data that may bring a test part of its own."""
    return _split(parts[0], share) if len(parts) == 1 else (parts[0], parts[1])


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


def _to_samples(pixels: Bytes, labels: Indices, top: int = 255) -> Samples:
    """Scale (n, c, h, w) bytes from 0 to top to [-1, 1]."""
    images = torch.from_numpy(pixels).float().div_(top / 2).sub_(1)
    return Samples(images, torch.from_numpy(labels))
