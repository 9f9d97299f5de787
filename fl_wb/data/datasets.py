"""Real data and how it is spread over the nodes.

Scikit-learn's bundled 8x8 digits, a folder of IDX files (MNIST and its many relatives) or of class
folders of pictures, or, as an extra, what flwr-datasets finds on the Hugging Face Hub. A fixed part
is held out and never meets training; from the rest, every target node first gets its few samples,
then the source nodes share what is left: no two nodes of a run ever see the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from fl_wb.data import partition, readers
from fl_wb.data.partition import PARTITIONS, Piles
from fl_wb.data.readers import DataError
from fl_wb.data.samples import Samples as Samples
from fl_wb.data.samples import folder_of, read_parts
from fl_wb.settings import Rule, Settings, above, at_least, one_of

NAMES = ("digits", "idx", "images", "hub")


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
    # How the sources share the training part, after the targets got their few samples: one of
    # `partition.PARTITIONS`, which says what each is.
    partition: Annotated[str, one_of(*PARTITIONS)] = "classes"
    # Sources of every partition but "classes"; None: as many as `sources` lists.
    num_sources: Annotated[int, at_least(1)] | None = None
    alpha: Annotated[float, above(0)] = 0.5  # of "dirichlet": the smaller, the more uneven
    # shards ("shards") or classes ("pathological") of each source
    per_source: Annotated[int, at_least(1)] = 2
    # Classes of each source node, for "classes". Sources that share a class get disjoint images of
    # it.
    sources: Annotated[list[list[int]], CLASSES] = field(
        default_factory=lambda: [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    )
    # Classes of each target node, and how many images of each class it has.
    targets: Annotated[list[list[int]], CLASSES] = field(default_factory=lambda: [[*range(10)]])
    samples_per_class: Annotated[int, at_least(1)] = 10
    # Most images of a class that each source keeps of its share; None: all. A source's weight is
    # the number of its images.
    source_samples_per_class: Annotated[list[int], COUNTS] | None = None
    # Nodes take part in turn: of the sources and of the targets, the first in round 1 alone, the
    # second in round 2, ...; what comes after the last is left to the last target.
    in_turn: bool = False
    # One source in place of `sources`, with every training image of the targets' classes, also
    # those that the targets have: the ceiling, which no node can reach.
    pooled: bool = False
    # Share kept for evaluation; unused where the data brings a test part of its own.
    held_out: Annotated[float, above(0, below=1)] = 0.3
    seed: Annotated[int, at_least(0)] = 0  # of the partition; the held-out part is always the same

    @property
    def source_count(self) -> int:
        """Number of source nodes, in every partition."""
        if self.pooled or self.partition == "classes" or self.num_sources is None:
            return len(self.sources)
        return self.num_sources


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
        return read_parts(data.name, data.root, data.held_out)
    return read_parts("hub", data.dataset, data.held_out, tuple(data.shape or ()), data.limit)


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
    name = "idx" if any(map(readers.is_idx, Path(folder).glob("*"))) else "images"
    train, test = read_parts(name, folder, data.held_out)
    shape, expected = tuple(train.images.shape[1:]), image_shape(data)
    if shape != expected:
        raise DataError(f"{folder} holds images {shape}, but those of this run are {expected}")
    return train, test


def image_shape(data: DataConfig) -> tuple[int, ...]:
    """Return the shape (c, h, w) of a run's images, from the settings or else from the data.

    Of a folder, a header or a picture tells it; only the hub's data are read.

    Raises
    ------
    DataError
        As `load`.
    """
    if data.shape:
        return tuple(data.shape)
    if data.name == "digits":
        return readers.DIGITS_SHAPE
    if data.name in ("idx", "images"):
        folder = folder_of(data.name, data.root)
        return (readers.idx_shape if data.name == "idx" else readers.picture_shape)(folder)
    return tuple(load(data)[0].images.shape[1:])


def source_samples(data: DataConfig, index: int) -> Samples:
    """Return the training images of source node ``index``.

    Raises
    ------
    DataError
        If there is no such source, or no image is left for it, or for one of the classes that
        ``data.sources`` names.
    """
    train, _ = load(data)
    node = f"data.sources[{index}]"
    listed = data.pooled or data.partition == "classes"
    classes = _classes(data.sources, index, node) if listed else []
    if index not in range(data.source_count):
        raise DataError(f"source {index} does not exist: there are {data.source_count}, from 0")
    own = deal(data)[0][index]
    for label in classes:
        if len(own.get(label, ())) == 0:
            raise DataError(
                f"{node}: no training image of class {label} is left for it; {_counts(train)}"
            )
    if not any(map(len, own.values())):
        raise DataError(
            f"data.partition={data.partition}: no training image is left for source {index} of "
            f"{data.source_count}; {_counts(train)}"
        )
    return train[np.sort(np.concatenate(list(own.values())))]


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
    own = _few(data)[0][index]
    for label in classes:
        if label not in own:
            raise DataError(
                f"{node}: too few training images of class {label} for data.samples_per_class="
                f"{data.samples_per_class}, after the targets before it; {_counts(train)}"
            )
    return train[np.sort(np.concatenate(list(own.values())))]


def deal(data: DataConfig) -> tuple[list[Piles], list[Piles]]:
    """Return what training images of each class each source has, and each target.

    Raises
    ------
    DataError
        If the partition cannot be made.
    """
    few, rest = _few(data)
    if data.pooled:  # everything, also what the targets have
        rest = {
            label: np.concatenate([*(own[label] for own in few if label in own), pile])
            for label, pile in rest.items()
        }
    sources = partition.deal(
        rest,
        "classes" if data.pooled else data.partition,
        data.sources,
        data.source_count,
        alpha=data.alpha,
        per_source=data.per_source,
        seed=data.seed,
    )
    most = data.source_samples_per_class
    if most is not None:
        sources = [
            {label: pile[:count] for label, pile in own.items()}
            for own, count in zip(sources, most, strict=True)
        ]
    return sources, few


def who_has_what(data: DataConfig) -> dict[str, dict[int, int]]:
    """Return how many training images of each class each node has, by the node's name.

    Raises
    ------
    DataError
        As `load` and `deal`.
    """
    sources, targets = deal(data)
    return {
        f"{role} {index}": {label: len(pile) for label, pile in sorted(own.items()) if len(pile)}
        for role, nodes in (("source", sources), ("target", targets))
        for index, own in enumerate(nodes)
    }


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


def _few(data: DataConfig) -> tuple[list[Piles], Piles]:
    """Return what each target has, and what is left for the sources."""
    there = partition.piles(load(data)[0].labels.numpy(), data.seed)
    return partition.serve(there, data.targets, data.samples_per_class)
