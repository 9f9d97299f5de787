"""A packed ternary generator with numpy alone: copy this one file to a device that has no torch.

    from numpy_reader import PackedGenerator
    samples = PackedGenerator("target-0.flwb", shape=(1, 8, 8)).samples(16, seed=0)

It runs the networks that FL-WB ships ("mlp", "conv", "dcgan"). The format is documented in
docs/ternary-format.md; `fl_wb.ternary.packing` reads files by the same `parse` where torch is at
hand. Nothing of FL-WB is imported here, on purpose.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSION = b"FLWBTERN", 1
NETWORKS = ("MLPGenerator", "ConvGenerator", "DCGANGenerator")
EPSILON = 1e-5  # of torch's batch normalisation
PREFIX = struct.Struct("<8sII")
_SHA = 32
_BYTES = {"float32": 4, "int64": 8}

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
        Shape of one sample, (c, h, w).

    Raises
    ------
    PackedFileError
        If the file is damaged, or its network is none that this file can run at that shape.
    """

    def __init__(self, path: str | Path, shape: Sequence[int]) -> None:
        network, arrays = parse(Path(path).read_bytes())
        if network not in NETWORKS:
            raise PackedFileError(f"{path} holds a {network!r}, not one of {', '.join(NETWORKS)}")
        self.shape = tuple(shape)
        layers: dict[int, dict[str, Array]] = {}
        try:
            for name, array in arrays.items():
                _, index, key = name.split(".")
                layers.setdefault(int(index), {})[key] = array
            self._layers = [layers[index] for index in sorted(layers)]
            self.latent_dim = int(self._layers[0]["weight"].shape[1])
            made = self(np.zeros((1, self.latent_dim), np.float32)).shape
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise PackedFileError(f"{path} holds no {network} of {self.shape}: {error}") from None
        if made != (1, *self.shape):
            raise PackedFileError(f"{path} makes samples {made[1:]}, not {self.shape}")

    def samples(self, n: int, *, seed: int = 0) -> Array:
        """Draw n samples in [-1, 1], (n, *shape) float32."""
        z = np.random.default_rng(seed).standard_normal((n, self.latent_dim), np.float32)
        return self(z)

    def __call__(self, z: Array) -> Array:
        """Map latents (n, latent_dim) to samples (n, *shape)."""
        convolutions = sum(layer["weight"].ndim == 4 for layer in self._layers)
        x = z
        for layer in self._layers:
            weight = layer["weight"]
            if weight.ndim == 1:  # a normalisation, which ReLU follows in every shipped network
                x = np.maximum(_normalised(x, layer), 0)
                continue
            x = _transposed_convolution(x, weight) if weight.ndim == 4 else x @ weight.T
            if "bias" in layer:
                x = x + _across(layer["bias"], x)
            if convolutions and x.ndim == 2:
                coarse = [size >> convolutions for size in self.shape[1:]]
                x = x.reshape(len(x), -1, *coarse)
        return np.tanh(x).reshape(len(z), *(self.shape if x.ndim == 2 else x.shape[1:]))


def parse(data: bytes) -> tuple[str, dict[str, Array]]:
    """Return the network's name and its arrays by name.

    Raises
    ------
    PackedFileError
        If the bytes are damaged or of another version. Nothing is allocated before the checksum
        and every declared size agree with the data.
    """
    if len(data) < PREFIX.size + _SHA or data[: len(MAGIC)] != MAGIC:
        raise PackedFileError("it is no packed ternary generator, or is cut off at the start")
    body = memoryview(data)[:-_SHA]
    if hashlib.sha256(body).digest() != data[-_SHA:]:
        raise PackedFileError("its checksum does not agree: it is truncated or was altered")
    _, version, length = PREFIX.unpack_from(data)
    if version != VERSION:
        raise PackedFileError(f"it has version {version}; this program reads version {VERSION}")
    try:
        header = json.loads(bytes(body[PREFIX.size : PREFIX.size + length]))
        entries = [_entry(entry) for entry in header["tensors"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileError(f"its header cannot be read: {error}") from None
    payload = body[PREFIX.size + length :]
    if sum(size for *_, size in entries) != len(payload):
        raise PackedFileError("its header does not agree with its size")
    if len({name for name, *_ in entries}) != len(entries):
        raise PackedFileError("its header names a tensor twice")
    arrays = {}
    for name, shape, kind, alpha, size in entries:
        part, payload = payload[:size], payload[size:]
        if kind != "ternary":
            arrays[name] = np.frombuffer(part, f"<{kind[0]}{_BYTES[kind]}").reshape(shape)
            continue
        codes = np.frombuffer(part, np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        codes = codes.reshape(-1)[: math.prod(shape)]
        if (codes == 3).any():
            raise PackedFileError(f"{name} holds a code that is no ternary weight")
        arrays[name] = np.array([0.0, alpha, -alpha], np.float32)[codes].reshape(shape)
    return str(header.get("network")), arrays


def _entry(entry: dict[str, Any]) -> tuple[str, list[int], str, float, int]:
    """Return a tensor's name, shape, kind, alpha and bytes; refuse what cannot be."""
    name, shape, kind, alpha = entry["name"], entry["shape"], entry["kind"], entry.get("alpha", 0.0)
    if not (isinstance(name, str) and isinstance(shape, list) and len(shape) <= 32):
        raise ValueError("a tensor needs a name and a shape")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {shape}")
    if math.prod(max(n, 1) for n in shape) >= 2**40:  # too big for numpy even beside a 0
        raise ValueError(f"shape {shape}")
    if kind == "ternary":
        if not (isinstance(entry["alpha"], float) and 0 <= alpha <= float(np.finfo("f4").max)):
            raise ValueError(f"alpha {alpha!r}")
        return name, shape, kind, alpha, -(-math.prod(shape) // 4)
    return name, shape, kind, alpha, math.prod(shape) * _BYTES[kind]


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
    for i in range(4):
        for j in range(4):
            part = np.einsum("nchw,co->nohw", x, weight[:, :, i, j], optimize=True)
            y[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] += part
    return y[:, :, 1:-1, 1:-1]
