"""The packed file of a ternary generator: four weights to a byte, checked before it is trusted.

Layout (version 1, little-endian)::

    8 bytes   magic "FLWBTERN"
    4 bytes   version (uint32)
    4 bytes   length of the header (uint32)
    header    UTF-8 JSON: {"network": class name, "tensors": [{"name", "shape", "kind", "alpha"}]}
    payload   the tensors one after another, in the header's order
    32 bytes  SHA-256 of everything before

A tensor's kind is "ternary" (ceil(n / 4) bytes; weight 4b + i is in bits 2i, 2i+1 of byte b: 0, 1
and 2 stand for 0, +alpha and -alpha), "float32" or "int64" (raw). Nothing in it is code. The bytes
are read in `fl_wb.ternary.numpy_reader`, which needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_wb.generators.copies import copy_of
from fl_wb.persistence.tensor_files import write_atomic
from fl_wb.ternary.numpy_reader import MAGIC, PREFIX, VERSION, PackedFileError, parse

_RAW: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}


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
        If no tensor is ternary (`fl_wb.ternary.ternarization.ternarize` comes first).
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
    body = PREFIX.pack(MAGIC, VERSION, len(header)) + header + b"".join(payload)
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
    _, state = parse(data)
    loaded = copy_of(generator)
    own = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    for name in [*own, *state]:
        if name not in state or name not in own or own[name] != state[name].shape:
            raise PackedFileError(
                f"it is for another network: {name} has shape "
                f"{tuple(state[name].shape) if name in state else 'none'} in the file and "
                f"{tuple(own[name]) if name in own else 'none'} in {type(generator).__name__}"
            )
    loaded.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return loaded.eval()


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
