"""Which node gets which image: targets first, then the sources share what is left.

The partitions of the sources carry the names of flwr-datasets' partitioners, draw as they do, and
give each source as many images of each class for the same seed (a test compares them where it is
installed). flwr-datasets is an extra, and deals out only what is in its own tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fl_wb.data.readers import DataError

# "classes": those that the settings list for each source, shared evenly among who lists them.
# "iid": all alike.
# "dirichlet": of each class, shares drawn from Dirichlet(alpha) (Yurochkin et al., 2019).
# "shards": sorted by class and cut up; each source draws some shards (McMahan et al., 2017).
# "pathological": classes drawn for each source, shared evenly among who has them.
PARTITIONS = ("classes", "iid", "dirichlet", "shards", "pathological")
LEAST = 10  # images that "dirichlet" gives every source,
ATTEMPTS = 11  # within so many draws: both are flwr-datasets'

Indices = npt.NDArray[np.int64]
Piles = dict[int, Indices]  # class -> indices of images


def piles(labels: Indices, seed: int) -> Piles:
    """Return the images of each class, shuffled."""
    # One stream per class, so that a class is dealt out the same way whatever other classes a run
    # uses.
    return {
        label: np.random.default_rng([seed, max(label, 0)]).permutation(
            np.flatnonzero(labels == label)
        )
        for label in np.unique(labels).tolist()
    }


def serve(there: Piles, targets: Sequence[Sequence[int]], count: int) -> tuple[list[Piles], Piles]:
    """Give each target ``count`` images of each of its classes; return these, and what is left.

    Targets are served first: their few samples would otherwise have been seen in pre-training, and
    adaptation would look better than it is. A target that asks for more than there is gets nothing
    of that class rather than starving everyone else.
    """
    few: list[Piles] = []
    rest = dict(there)
    for classes in targets:
        own = {}
        for label in dict.fromkeys(classes):
            if 0 < count <= len(rest.get(label, ())):
                own[label], rest[label] = np.split(rest[label], [count])
        few.append(own)
    return few, rest


def deal(
    rest: Piles,
    partition: str,
    sources: Sequence[Sequence[int]],
    number: int,
    *,
    alpha: float,
    per_source: int,
    seed: int,
) -> list[Piles]:
    """Deal what there is to the sources, as the settings of `fl_wb.data.datasets.DataConfig` say.

    ``sources`` are the classes of each for "classes", ``number`` is how many there are of all
    other partitions.

    Raises
    ------
    DataError
        If there is too little for so many sources, or no such partition.
    """
    rng = np.random.default_rng(seed)
    if partition == "classes":
        return _by_class(rest, sources)
    if partition == "iid":
        return _iid(rest, number, rng)
    if partition == "dirichlet":
        return _dirichlet(rest, number, alpha, rng)
    if partition == "shards":
        return _shards(rest, number, per_source, rng)
    if partition == "pathological":
        return _by_class(rest, _drawn_classes(rest, number, per_source, rng))
    raise DataError(f"data.partition={partition!r} must be one of: {', '.join(PARTITIONS)}")


def _by_class(rest: Piles, owners: Sequence[Sequence[int]]) -> list[Piles]:
    dealt: list[Piles] = [{} for _ in owners]
    for label, pile in rest.items():
        those = [own for own, classes in zip(dealt, owners, strict=True) if label in classes]
        for own, share in zip(those, np.array_split(pile, max(len(those), 1)), strict=False):
            own[label] = share
    return dealt


def _iid(rest: Piles, number: int, rng: np.random.Generator) -> list[Piles]:
    labels, indices = _flat(rest)
    order = rng.permutation(len(indices))
    return [_sorted(labels[part], indices[part]) for part in np.array_split(order, number)]


def _dirichlet(rest: Piles, number: int, alpha: float, rng: np.random.Generator) -> list[Piles]:
    for _ in range(ATTEMPTS):
        dealt: list[Piles] = [{} for _ in range(number)]
        for label, pile in rest.items():
            shares = rng.dirichlet(np.full(number, alpha))
            cuts = (np.cumsum(shares) * len(pile)).astype(int)[:-1]
            for own, part in zip(dealt, np.split(pile, cuts), strict=True):
                own[label] = part
        if min(sum(map(len, own.values())) for own in dealt) >= LEAST:
            return dealt
    raise DataError(
        f"data.partition=dirichlet data.alpha={alpha} data.num_sources={number} left a source with "
        f"fewer than {LEAST} of the {sum(map(len, rest.values()))} images in {ATTEMPTS} draws; use "
        "a larger alpha, fewer sources or another data.seed"
    )


def _shards(rest: Piles, number: int, each: int, rng: np.random.Generator) -> list[Piles]:
    labels, indices = _flat(rest)
    size = len(indices) // (number * each)
    if size == 0:
        raise DataError(
            f"data.partition=shards data.num_sources={number} data.per_source={each}: "
            f"{len(indices)} images cannot be cut into {number * each} shards"
        )
    drawn = rng.permutation(len(indices) // size)[: number * each].reshape(number, each)
    places = [(shards[:, None] * size + np.arange(size)).ravel() for shards in drawn]
    return [_sorted(labels[place], indices[place]) for place in places]


def _drawn_classes(
    rest: Piles, number: int, each: int, rng: np.random.Generator
) -> list[list[int]]:
    if each > len(rest):
        raise DataError(
            f"data.partition=pathological data.per_source={each} must be at most {len(rest)}, the "
            "number of classes"
        )
    labels = list(rest)
    return [rng.choice(labels, size=each, replace=False).tolist() for _ in range(number)]


def _flat(rest: Piles) -> tuple[Indices, Indices]:
    """Return label and index of every image, sorted by class."""
    labels = np.repeat(list(rest), [len(pile) for pile in rest.values()])
    return labels, np.concatenate(list(rest.values()))


def _sorted(labels: Indices, indices: Indices) -> Piles:
    return {label: indices[labels == label] for label in np.unique(labels).tolist()}
