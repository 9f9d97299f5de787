"""The packed file of a ternary generator: four weights to a byte, checked before it is trusted.

Layout (version 1, little-endian)::

    8 bytes   magic "FLWBTERN"
    4 bytes   version (uint32)
    4 bytes   length of the header (uint32)
    header    UTF-8 JSON: {"network": class name, "tensors": [{"name", "shape", "kind", "alpha"}]}
    payload   the tensors one after another, in the header's order
    32 bytes  SHA-256 of everything before

A tensor's kind is "ternary" (ceil(n / 4) bytes; weight 4b + i is in bits 2i, 2i+1 of byte b: 0, 1
and 2 stand for 0, +alpha and -alpha), "float32" or "int64" (raw). Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_wb.storage import write_atomic

MAGIC = b"FLWBTERN"
VERSION = 1
_PREFIX = struct.Struct("<8sII")
_SHA = hashlib.sha256().digest_size
_RAW: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
_LARGEST = float(np.finfo(np.float32).max)


Array = np.ndarray[Any, np.dtype[Any]]


class PackedFileError(ValueError):
    """A packed file is truncated, altered, of another version or for another network."""


def save(generator: nn.Module, path: str | Path) -> Path:
    """Write a ternary generator to a packed file, atomically; see `pack`."""
    path = Path(path)
    write_atomic(path, pack(generator))
    return path


def load(path: str | Path, generator: nn.Module) -> nn.Module:
    """Read a packed file into a copy of `generator`; see `unpack`."""
    try:
        return unpack(Path(path).read_bytes(), generator)
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {error}") from None


def pack(generator: nn.Module) -> bytes:
    """Pack a generator's state: two bits a weight where a tensor takes -alpha, 0, alpha.

    Raises
    ------
    ValueError
        If no tensor is ternary (`fl_wb.ternary.ternarize` comes first).
    """
    tensors: list[dict[str, Any]] = []
    payload: list[bytes] = []
    for name, tensor in generator.state_dict().items():
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
        values = tensor.detach().cpu().reshape(-1)
        alpha = _alpha_of(values)
        if alpha is not None:
            entry |= {"kind": "ternary", "alpha": alpha}
            payload.append(_to_bits(values))
        else:
            kind = "float32" if tensor.is_floating_point() else "int64"
            entry["kind"] = kind
            payload.append(values.to(getattr(torch, kind)).numpy().astype(_RAW[kind]).tobytes())
        tensors.append(entry)
    if not any(e["kind"] == "ternary" and len(e["shape"]) > 1 for e in tensors):
        raise ValueError(f"no weight of this {type(generator).__name__} is ternary: ternarize it")
    header = json.dumps({"network": type(generator).__name__, "tensors": tensors}).encode()
    body = _PREFIX.pack(MAGIC, VERSION, len(header)) + header + b"".join(payload)
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes, generator: nn.Module) -> nn.Module:
    """Read packed bytes into a copy of `generator`, in eval mode.

    Parameters
    ----------
    data : bytes
        What `pack` returned.
    generator : nn.Module
        Any module of the same architecture; left alone.

    Raises
    ------
    PackedFileError
        If the bytes are damaged, or are of another version or network.
    """
    state = read(data)
    loaded = deepcopy(generator)
    own = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    for name in [*own, *state]:
        if name not in state or name not in own or own[name] != state[name].shape:
            raise PackedFileError(
                f"it is for another network: {name} has shape "
                f"{tuple(state[name].shape) if name in state else 'none'} in the file and "
                f"{tuple(own[name]) if name in own else 'none'} in {type(generator).__name__}"
            )
    loaded.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return loaded.eval()


def read(data: bytes) -> dict[str, Array]:
    """Read packed bytes into arrays by name, with numpy alone.

    Raises
    ------
    PackedFileError
        If the bytes are damaged or of another version. Nothing is allocated before the checksum
        and every declared size agree with the data.
    """
    if len(data) < _PREFIX.size + _SHA or data[: len(MAGIC)] != MAGIC:
        raise PackedFileError("it is no packed ternary generator, or is cut off at the start")
    body = memoryview(data)[:-_SHA]
    if hashlib.sha256(body).digest() != data[-_SHA:]:
        raise PackedFileError("its checksum does not agree: it is truncated or was altered")
    _, version, length = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise PackedFileError(f"it has version {version}; this program reads version {VERSION}")
    try:
        header = json.loads(bytes(body[_PREFIX.size : _PREFIX.size + length]))
        entries = [_checked(entry) for entry in header["tensors"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileError(f"its header cannot be read: {error}") from None
    payload = body[_PREFIX.size + length :]
    if len({entry["name"] for entry in entries}) != len(entries):
        raise PackedFileError("its header names a tensor twice")
    if sum(_size(entry) for entry in entries) != len(payload):
        raise PackedFileError("its header does not agree with its size")
    arrays = {}
    for entry in entries:
        part, payload = payload[: _size(entry)], payload[_size(entry) :]
        arrays[entry["name"]] = _array(entry, part)
    return arrays


def _alpha_of(values: Tensor) -> float | None:
    """Return the one magnitude of a tensor's non-zero values, or None if there are several."""
    if not values.is_floating_point():
        return None
    magnitude = values.abs()
    alpha = magnitude.max().item() if len(values) else 0.0
    return alpha if bool(((magnitude == alpha) | (magnitude == 0)).all()) else None


def _to_bits(values: Tensor) -> bytes:
    codes = (values.sign().to(torch.int8).numpy() % 3).astype(np.uint8)  # -1 becomes 2
    codes = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    return bytes(np.bitwise_or.reduce(codes << np.array([0, 2, 4, 6], np.uint8), axis=1))


def _array(entry: Mapping[str, Any], part: memoryview) -> Array:
    if entry["kind"] != "ternary":
        return np.frombuffer(part, _RAW[entry["kind"]]).reshape(tuple(entry["shape"])).copy()
    packed = np.frombuffer(part, np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8)
    codes = (packed & 3).reshape(-1)[: math.prod(entry["shape"])]
    if (codes == 3).any():
        raise PackedFileError(f"{entry['name']} holds a code that is no ternary weight")
    values = np.array([0.0, entry["alpha"], -entry["alpha"]], np.float32)
    array: Array = values[codes].reshape(tuple(entry["shape"]))
    return array


def _size(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor in the payload."""
    n: int = math.prod(entry["shape"])
    return -(-n // 4) if entry["kind"] == "ternary" else n * int(_RAW[entry["kind"]].itemsize)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    shape = entry["shape"]
    if not (isinstance(entry["name"], str) and isinstance(shape, list)):
        raise ValueError("a tensor needs a name and a shape")
    if (
        len(shape) > 32
        or not all(type(n) is int and n >= 0 for n in shape)
        or math.prod(max(n, 1) for n in shape) >= 2**40  # too big for numpy even beside a 0
    ):
        raise ValueError(f"shape {shape}")
    if entry["kind"] not in ("ternary", *_RAW):
        raise ValueError(f"kind {entry['kind']!r}")
    if entry["kind"] == "ternary" and not (
        isinstance(entry["alpha"], float) and 0 <= entry["alpha"] <= _LARGEST
    ):
        raise ValueError(f"alpha {entry['alpha']!r}")
    return entry
