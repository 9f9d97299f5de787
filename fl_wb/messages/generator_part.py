"""The generative part of a larger model: which arrays are the generator's, by name or place.

A VAE's clients send encoder and decoder in one ArrayRecord; only the decoder generates. Server and
clients tell the two apart here, alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from flwr.app import ArrayRecord

Part = tuple[str, ...] | slice
"""Prefixes of the generator's arrays, or their places in a list that has others too."""


def check_prefixes(prefixes: Iterable[str] | slice | None) -> Part | None:
    """Return prefixes as a tuple, a slice as it is, or None where the whole model is the generator.

    Raises
    ------
    TypeError
        If they are one string, or not strings.
    ValueError
        If there are none, or one is empty.
    """
    if prefixes is None or isinstance(prefixes, slice):
        return prefixes
    if isinstance(prefixes, str):
        raise TypeError(
            f"generator_keys must be several prefixes, such as ({prefixes!r},), not one string"
        )
    found = tuple(prefixes)
    if not all(isinstance(prefix, str) for prefix in found):
        raise TypeError(f"generator_keys must be strings, not {found!r}")
    if not found or not all(found):
        raise ValueError(f"generator_keys={found!r}: give at least one prefix, and none that is ''")
    return found


def split(arrays: ArrayRecord, prefixes: Part | None) -> tuple[ArrayRecord, ArrayRecord]:
    """Return the generator's arrays, and all others.

    Raises
    ------
    ValueError
        If a prefix is that of no array, or a slice is of none.
    """
    if prefixes is None:
        return arrays, ArrayRecord()
    if isinstance(prefixes, slice):
        generative = {name: arrays[name] for name in list(arrays)[prefixes]}
        if not generative:
            raise ValueError(f"generator_keys: the slice has none of the {len(arrays)} arrays")
        return ArrayRecord(generative), _without(arrays, generative)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in arrays):
            raise ValueError(
                f"generator_keys: no array's name begins with {prefix[:80]!r}; the model's begin "
                f"with {', '.join(head[:80] for head in _beginnings(arrays)[:20])}"
            )
    generative = {n: array for n, array in arrays.items() if n.startswith(prefixes)}
    return ArrayRecord(generative), _without(arrays, generative)


def own(arrays: ArrayRecord, names: Collection[str]) -> tuple[ArrayRecord, str]:
    """Give a generator's arrays the generator's own names, where the model's are longer.

    A generator that is the attribute ``model.generator`` of what the clients train has arrays
    ``model.generator.0.weight`` there, and ``0.weight`` in a factory that makes it alone.

    Returns
    -------
    ArrayRecord
        Under the generator's own names; the same one if these fit in no way.
    str
        What stood before them: "model.generator.", or "".
    """
    first = min(arrays, default="")
    heads = ["", *(first[: i + 1] for i, letter in enumerate(first) if letter == ".")]
    for head in heads:
        found = {name.removeprefix(head): array for name, array in arrays.items()}
        if all(name.startswith(head) for name in arrays) and not found.keys().isdisjoint(names):
            return ArrayRecord(found), head
    return arrays, ""


def _without(arrays: ArrayRecord, names: Collection[str]) -> ArrayRecord:
    return ArrayRecord({n: array for n, array in arrays.items() if n not in names})


def _beginnings(names: Collection[str]) -> list[str]:
    """Return the shortest dotted beginnings that tell names apart."""
    found: set[str] = set()
    for depth in range(1, 9):
        split = [(name, name.split(".")) for name in names]
        found = {
            ".".join([*dots[:depth], ""]) if len(dots) > depth else name for name, dots in split
        }
        if len(found) > 1:
            break
    return sorted(found)
