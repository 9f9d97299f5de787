"""A packed ternary generator with numpy alone: copy this one file to a device that has no torch.

    from numpy_reader import PackedGenerator
    samples = PackedGenerator("target-0.flwb", shape=(1, 8, 8)).samples(16, seed=0)

It runs the networks that FL-WB ships ("mlp", "conv", "dcgan"), conditional and reweighted ones too.
docs/ternary-format.md has the format. Nothing of FL-WB is imported here, on purpose.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

MAGIC, VERSION = b"FLWBTERN", 3
NETWORKS = ("MLPGenerator", "ConvGenerator", "DCGANGenerator")
EPSILON, PREFIX = 1e-5, struct.Struct("<8sII")  # of torch's batch normalisation; of a file
CODE, GATE = ("shares", "weights"), ("gate.first", "gate.second", "gate.third")
_BYTES = {"float16": 2, "float32": 4, "float64": 8, "int64": 8}
_SHA, _MOST_PLANES, _MOST_CELLS = 32, 3, 1024  # few enough for a tree of any shape
_TAIL = 1e-9  # of Phi, as in fl_wb.generators.latents
ENDS = {"uniform": (0.0, 1.0), "uniform(-1,1)": (-1.0, 1.0)}  # of laws of latents but the normal

Array = np.ndarray[Any, np.dtype[Any]]


class PackedFileError(ValueError):
    """A packed file is truncated, altered, of another version or for another network."""


class PackedGenerator:
    """A generator from a packed file: latents (n, latent_dim) to samples (n, *shape).

    Parameters
    ----------
    path : str or Path
        The packed file.
    shape : sequence of int
        Shape of one sample, (c, h, w); `PackedFileError` where the file holds no such network.
    """

    def __init__(self, path: str | Path, shape: Sequence[int]) -> None:
        network, arrays, (self.latents, self.labels) = parse(Path(path).read_bytes())
        if network not in NETWORKS:
            raise PackedFileError(f"{path} holds a {network!r}, not one of {', '.join(NETWORKS)}")
        self.shape = tuple(shape)
        layers: dict[int, dict[str, Array]] = {}
        self._code = code_in(arrays)
        if self._code and self.latents == "own":
            raise PackedFileError(f"{path}: its cells are of a law that no file holds: use torch")
        self._gate = [arrays[name] for name in GATE if self._code and name in arrays]
        try:
            for name, array in arrays.items():
                if self._code and name in (*CODE, *GATE):
                    continue
                *_, index, key = name.split(".")
                layers.setdefault(int(index), {})[key] = array
            self._layers = [layers[index] for index in sorted(layers)]
            self.latent_dim = int(self._layers[0]["weight"].shape[1]) - self.labels
            made = self(np.zeros((1, self.latent_dim), np.float32), [0]).shape
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise PackedFileError(f"{path} holds no {network} of {self.shape}: {error}") from None
        if made != (1, *self.shape):
            raise PackedFileError(f"{path} makes samples {made[1:]}, not {self.shape}")

    def samples(self, n: int, *, seed: int = 0, labels: Sequence[int] | None = None) -> Array:
        """Draw n samples in [-1, 1], (n, *shape) float32; of all labels in turn, or of these n."""
        rng, size = np.random.default_rng(seed), (n, self.latent_dim)
        if self.latents == "normal":
            return self(rng.standard_normal(size, np.float32), labels)
        if self.latents == "own":
            raise ValueError("its latents have a law of their own: draw them, and call this")
        return self(rng.uniform(*ENDS[self.latents], size).astype(np.float32), labels)

    def __call__(self, z: Array, labels: Sequence[int] | None = None) -> Array:
        """Map latents (n, latent_dim), and labels if there are any, to samples (n, *shape)."""
        kinds = [layer["weight"].ndim for layer in self._layers]
        convolutions, last_linear = kinds.count(4), max(k for k, n in enumerate(kinds) if n == 2)
        x = chosen(z, self._gate) if self._gate else z
        x = self._recoded(x, *self._code) if self._code else x
        if self.labels:
            wanted = np.arange(len(z)) % self.labels if labels is None else labels
            x = np.concatenate([x, np.eye(self.labels, dtype=np.float32)[wanted]], axis=1)
        for k, layer in enumerate(self._layers):
            weight = layer["weight"]
            if weight.ndim == 1:  # a normalisation, which ReLU follows in every shipped network
                x = np.maximum(_normalised(x, layer), 0)
                continue
            x = _transposed_convolution(x, weight) if weight.ndim == 4 else x @ weight.T
            x = x + _across(layer["bias"], x) if "bias" in layer else x
            if convolutions and k == last_linear:
                x = x.reshape(len(x), -1, *(size >> convolutions for size in self.shape[1:]))
        return np.tanh(x).reshape(len(z), *(self.shape if x.ndim == 2 else x.shape[1:]))

    def _recoded(self, z: Array, shares: Array, weights: Array) -> Array:
        if self.latents not in ENDS:
            return recoded(z, shares, weights)
        low, high = ENDS[self.latents]  # by way of N(0, I)
        u = np.clip((z.astype(np.float64) - low) / (high - low), _TAIL, 1 - _TAIL)
        moved = _phi(recoded(_inverse_phi(u), shares, weights))
        return np.asarray(low + (high - low) * moved, z.dtype)


def parse(data: bytes) -> tuple[str, dict[str, Array], tuple[str, int]]:
    """Return the network's name, its arrays by name, its latents' law and the number of labels.

    Nothing is allocated before the checksum and every declared size agree with the data.
    """
    if len(data) < PREFIX.size + _SHA or data[: len(MAGIC)] != MAGIC:
        raise PackedFileError("it is no packed ternary generator, or is cut off at the start")
    body = memoryview(data)[:-_SHA]
    if hashlib.sha256(body).digest() != data[-_SHA:]:
        raise PackedFileError("its checksum does not agree: it is truncated or was altered")
    _, version, length = PREFIX.unpack_from(data)
    if not 1 <= version <= VERSION:
        raise PackedFileError(f"it has version {version}; this program reads 1 to {VERSION}")
    try:
        header = json.loads(bytes(body[PREFIX.size : PREFIX.size + length]))
        entries = [_entry(entry) for entry in header["tensors"]]
        law, labels = str(header.get("latents", "normal")), header.get("labels", 0)
        if law not in ("normal", *ENDS, "own") or type(labels) is not int or labels < 0:
            raise ValueError(f"latents {law[:40]!r}, labels {str(labels)[:40]}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileError(f"its header cannot be read: {error}") from None
    payload = body[PREFIX.size + length :]
    if sum(size for *_, size in entries) != len(payload):
        raise PackedFileError("its header does not agree with its size")
    if len({name for name, *_ in entries}) != len(entries):
        raise PackedFileError("its header names a tensor twice")
    arrays = {}
    for name, shape, kind, alphas, size in entries:
        part, payload = payload[:size], payload[size:]
        if kind != "ternary":
            arrays[name] = np.frombuffer(part, f"<{kind[0]}{_BYTES[kind]}").reshape(shape)
            continue
        codes = np.frombuffer(part, np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        if (codes == 3).any():
            raise PackedFileError(f"{name} holds a code that is no ternary weight")
        signs = np.array([0, 1, -1], np.int8)[codes].reshape(len(alphas), -1)
        arrays[name] = planes_sum(alphas, signs[:, : math.prod(shape)]).reshape(shape)
    return str(header.get("network")), arrays, (law, labels)


def planes_sum(alphas: Sequence[float], signs: Array) -> Array:
    """Add up ternary planes, the first one first: alphas (planes,), signs (planes, ...)."""
    total = np.zeros(signs.shape[1:], np.float32)
    for alpha, plane in zip(alphas, signs, strict=True):
        total = total + np.array([0.0, alpha, -alpha], np.float32)[plane]
    return total


def code_in(arrays: dict[str, Array]) -> tuple[Array, Array] | None:
    """Return the shares and weights of a generator's cells, (K,) each, if it has them."""
    if not all(name in arrays for name in CODE):
        return None
    shares, weights = (arrays[name] for name in CODE)
    good = shares.dtype == weights.dtype == np.float64 and shares.shape == weights.shape
    good = good and shares.ndim == 1 and 0 < len(shares) <= _MOST_CELLS and weights.any()
    good = good and all(0 < share < math.inf for share in shares)
    if not good or not all(0 <= weight < math.inf for weight in weights):
        raise PackedFileError("its shares and weights are those of no code")
    return shares, weights


def _entry(entry: dict[str, Any]) -> tuple[str, list[int], str, list[float], int]:
    """Return a tensor's name, shape, kind, alphas and bytes; refuse what cannot be."""
    name, shape, kind = entry["name"], entry["shape"], entry["kind"]
    good = isinstance(name, str) and isinstance(shape, list) and len(shape) <= 32
    good = good and all(type(n) is int and n >= 0 for n in shape)
    if not good or math.prod(max(n, 1) for n in shape) >= 2**40:  # too big even beside a 0
        raise ValueError(f"shape {shape}")
    if kind != "ternary":
        return name, shape, kind, [], math.prod(shape) * _BYTES[kind]
    alphas = entry["alphas"] if "alphas" in entry else [entry["alpha"]]
    good = isinstance(alphas, list) and 0 < len(alphas) <= _MOST_PLANES
    good = good and all(isinstance(alpha, float) and alpha >= 0 for alpha in alphas)
    if not good or not sum(alphas) <= float(np.finfo("f4").max):
        raise ValueError(f"alphas {alphas!r}")
    return name, shape, kind, alphas, len(alphas) * -(-math.prod(shape) // 4)


def chosen(z: Array, gate: Sequence[Array]) -> Array:
    """Choose a roll of each latent (n, latent_dim), as `fl_wb.generators.gate.Gate.choose` does."""
    rolled = [sign * np.roll(z, by, 1) for sign in (1, -1) for by in range(z.shape[1])]
    candidates = np.stack(rolled[:16], 1)
    x = candidates.astype(np.float64)
    for depth, layer in enumerate(gate):
        x = (x if depth == 0 else np.maximum(x, 0)) @ layer[:, :-1].T + layer[:, -1]
    odds = np.exp(np.clip(x[..., 0], -20, 3.4)).cumsum(1)
    drawn = np.abs(np.modf(64 * z[:, :1].astype(np.float64))[0]) * odds[:, -1:]
    taken = np.minimum((odds < drawn).sum(1), odds.shape[1] - 1)
    return np.asarray(candidates[np.arange(len(z)), taken])


def recoded(z: Array, shares: Array, weights: Array) -> Array:
    """Give cell k weights[k] of latents (n, latent_dim): `fl_wb.generators.code.Code.recode`."""
    if len(shares) == 1:
        return z
    total = 1.0 if abs(math.fsum(shares) - 1) <= 1e-12 else math.fsum(shares)  # as in `Code`
    children, paths = _tree([float(share) / total for share in shares])
    known, steps = paths >= 0, np.maximum(paths, 0)

    def cuts(masses: Array) -> Array:
        below = np.zeros(2 * len(children))
        np.add.at(below, steps, masses[:, None] * known)
        left, right = below.reshape(-1, 2).T
        share = np.full(len(left), 0.5)
        np.divide(left, left + right, out=share, where=left + right > 0)
        return share

    levels = [(depth, depth % z.shape[1]) for depth in range(paths.shape[1])]
    used = z[:, : len(levels)]  # the other coordinates stay
    with np.errstate(all="ignore"):
        u, ratio = _phi(used.astype(np.float64)), cuts(weights)
        node, cut = np.zeros(len(z), np.int64), np.zeros(used.shape, bool)
        for _, column in levels:
            at, inside = np.maximum(node, 0), node >= 0
            p, x = ratio[at], u[:, column]
            right = (x >= p) & (p < 1)
            u[:, column] = np.where(inside, np.where(right, (x - p) / (1 - p), x / p), x)
            cut[:, column] |= inside
            node = np.where(inside, children[at, right.astype(np.int64)], node)
        used = _moved(used, u, cut)
        u, ratio = _phi(used.astype(np.float64)), cuts(shares / total)
        for depth, column in reversed(levels):
            step = paths[~node, depth]
            p, x = ratio[np.maximum(step, 0) // 2], u[:, column]
            outer = np.where(step % 2 == 1, p + (1 - p) * x, p * x)
            u[:, column] = np.where(step >= 0, outer, x)
        used = _moved(used, u, cut)
    return np.concatenate([used, z[:, len(levels) :]], axis=1)


def _tree(shares: Sequence[float]) -> tuple[Array, Array]:
    """Return Huffman's tree: its nodes' children (K-1, 2), the paths to its cells (K, depth).

    The root is first; cell k stands as ~k. A path has 2 node + side at each depth, -1 below a cell.
    """
    heap = [(share, cell, ~cell) for cell, share in enumerate(shares)]
    heapify(heap)
    joined: list[tuple[int, int]] = []
    while len(heap) > 1:
        one, other = heappop(heap), heappop(heap)
        left, right = sorted((one, other), key=lambda subtree: subtree[1])
        heappush(heap, (one[0] + other[0], left[1], len(joined)))
        joined.append((left[2], right[2]))
    last = len(joined) - 1  # the root was joined last
    children = [[last - c if c >= 0 else c for c in pair] for pair in reversed(joined)]
    ways: list[list[int]] = [[] for _ in shares]
    above: dict[int, list[int]] = {0: []}
    for node, pair in enumerate(children):
        for side, child in enumerate(pair):
            way = [*above[node], 2 * node + side]
            if child >= 0:
                above[child] = way
            else:
                ways[~child] = way
    depth = max(map(len, ways))
    paths = np.array([way + [-1] * (depth - len(way)) for way in ways], np.int64)
    return np.array(children, np.int64).reshape(-1, 2), paths.reshape(len(shares), depth)


_phi = np.vectorize(NormalDist().cdf, otypes=[np.float64])
_inverse_phi = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


def _moved(z: Array, u: Array, cut: Array) -> Array:
    inverse = _inverse_phi(np.clip(np.nan_to_num(u), _TAIL, 1 - _TAIL))
    return np.where(cut, inverse.astype(z.dtype), z)


def _across(values: Array, x: Array) -> Array:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _normalised(x: Array, layer: dict[str, Array]) -> Array:
    scale = layer["weight"] / np.sqrt(layer["running_var"] + np.float32(EPSILON))
    shift = layer["bias"] - layer["running_mean"] * scale
    return x * _across(scale, x) + _across(shift, x)


def _transposed_convolution(x: Array, weight: Array) -> Array:
    """Double the sides: kernel 4, stride 2, padding 1, as in every shipped network."""
    if weight.shape[2:] != (4, 4):
        raise ValueError(f"a kernel of {weight.shape[2:]}")
    n, _, height, width = x.shape
    y = np.zeros((n, weight.shape[1], 2 * height + 2, 2 * width + 2), np.float32)
    for i, j in np.ndindex(4, 4):
        part = np.einsum("nchw,co->nohw", x, weight[:, :, i, j], optimize=True)
        y[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] += part
    return y[:, :, 1:-1, 1:-1]
