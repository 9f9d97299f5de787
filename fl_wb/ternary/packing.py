"""The packed file of a ternary generator: four weights to a byte, checked before it is trusted.

Layout (version 3, little-endian)::

    8 bytes   magic "FLWBTERN"
    4 bytes   version (uint32)
    4 bytes   length of the header (uint32)
    header    UTF-8 JSON: {"network": class name, "tensors": [{"name", "shape", "kind", "alphas"}]}
    payload   the tensors one after another, in the header's order
    32 bytes  SHA-256 of everything before

A tensor's kind is "ternary" (a plane for each alpha, one after another: ceil(n / 4) bytes; weight
4b + i is in bits 2i, 2i+1 of byte b: 0, 1 and 2 stand for 0, +alpha and -alpha; the planes add up),
"float16", "float32", "float64" or "int64" (raw). A `Reweighted` or conditional generator is named
by the class inside; its tensors say the rest. Nothing in it is code. The bytes are read in
`fl_wb.ternary.numpy_reader`, which needs no torch, and reads older versions, too: version 1 has one
plane, "alpha", and version 2, which is still written where nothing else is needed, no float16.

Where a generator wants more than N(0, I), the header has "latents", the name of their law ("own"
for one without), and "labels", how many there are; the file is then of version 3, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_wb.generators.code import Code
from fl_wb.generators.copies import copy_of
from fl_wb.generators.gate import Gate
from fl_wb.generators.latents import NAMES, Draw, Driven, Latents, law_of
from fl_wb.generators.networks import ConditionalGenerator
from fl_wb.generators.reweighted import Reweighted, reweighted
from fl_wb.generators.sampling import driven
from fl_wb.persistence.tensor_files import write_atomic
from fl_wb.ternary.numpy_reader import (
    GATE,
    MAGIC,
    PREFIX,
    VERSION,
    PackedFileError,
    code_in,
    parse,
    planes_sum,
)

MOST_PLANES = 3

Array = np.ndarray[Any, np.dtype[Any]]


def save(
    generator: nn.Module,
    path: str | Path,
    *,
    labels: int | None = None,
    latents: str | Draw = "normal",
) -> Path:
    """Write a ternary generator to a packed file, atomically; see `pack`."""
    path = Path(path)
    write_atomic(path, pack(generator, labels=labels, latents=latents))
    return path


def load(path: str | Path, generator: nn.Module) -> nn.Module:
    """Read a packed file into a copy of `generator`; see `unpack`."""
    try:
        return unpack(Path(path).read_bytes(), generator)
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {error}") from None


def pack(
    generator: nn.Module, *, labels: int | None = None, latents: str | Draw = "normal"
) -> bytes:
    """Pack a generator's state: two bits a weight for each ternary plane of a tensor.

    Parameters
    ----------
    generator : nn.Module
        What `fl_wb.ternary.ternarize` returned.
    labels : int, optional
        How many it takes; the shipped conditional generators say it themselves.
    latents : optional
        As in `fl_wb.generators.sampling.generate`.

    Raises
    ------
    ValueError
        If no tensor is ternary (`fl_wb.ternary.ternarization.ternarize` comes first).
    """
    tensors: list[dict[str, Any]] = []
    payload: list[bytes] = []
    law = getattr(generator, "latents", None)
    wants = _wants(law.law if isinstance(law, Latents) else law_of(latents), generator, labels)
    if isinstance(generator, Driven):
        generator = generator.generator
    for name, tensor in generator.state_dict().items():
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
        array = _array(tensor)
        alphas = _alphas_of(array, MOST_PLANES if tensor.dim() > 1 else 1)
        if alphas:
            entry |= {"kind": "ternary", "alphas": alphas}
            payload += [_to_bits(plane) for plane in _planes_of(array, alphas)]
        else:
            if name in GATE:
                array = array.astype(np.float16)  # it has no more digits
            entry["kind"] = array.dtype.name
            payload.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
        tensors.append(entry)
    core = generator
    while isinstance(core, Reweighted | Driven | ConditionalGenerator):
        core = core.generator
    network = type(core).__name__
    if not any(e["kind"] == "ternary" and len(e["shape"]) > 1 for e in tensors):
        raise ValueError(f"no weight of this {network} is ternary: ternarize it")
    header = json.dumps({"network": network, "tensors": tensors, **wants}).encode()
    newer = wants or any(entry["kind"] == "float16" for entry in tensors)
    version = VERSION if newer else VERSION - 1
    body = PREFIX.pack(MAGIC, version, len(header)) + header + b"".join(payload)
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes, generator: nn.Module) -> nn.Module:
    """Read packed bytes into a copy of `generator`, in eval mode.

    Parameters
    ----------
    data : bytes
        What `pack` returned.
    generator : nn.Module
        Any module of the same architecture; left alone. Where the file holds a `Reweighted`
        generator, of the one inside.

    Raises
    ------
    PackedFileError
        If the bytes are damaged, or are of another version or network.
    """
    _, state, (law, _) = parse(data)
    code = code_in(state)
    loaded = copy_of(_inside(generator) if code else generator)
    if code:
        try:
            loaded = driven(loaded, latents=law) if law in NAMES else loaded
            loaded = reweighted(
                loaded, Code(code[0].tolist()), code[1].tolist(), gate=_gate_in(state)
            )
        except ValueError as error:
            raise PackedFileError(f"its code is none: {error}") from None
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


def _wants(law: str | Draw, generator: nn.Module, labels: int | None) -> dict[str, str | int]:
    """Return what the header says of a generator's inputs: nothing of N(0, I)."""
    wants: dict[str, str | int] = {}
    if law != "normal":
        wants["latents"] = law if isinstance(law, str) else "own"
    inside = generator.generator if isinstance(generator, Driven) else generator
    number = inside.labels if isinstance(inside, ConditionalGenerator) else labels
    if number:
        wants["labels"] = number
    return wants


def _gate_in(state: dict[str, Array]) -> Gate | None:
    """Return the gate that a file's arrays hold, if it has one."""
    if not all(name in state for name in GATE):
        return None
    return Gate([torch.tensor(state[name]) for name in GATE])


def _inside(generator: nn.Module) -> nn.Module:
    return generator.generator if isinstance(generator, Reweighted) else generator


def _array(tensor: Tensor) -> Array:
    """Return a flat array of a dtype that the file has."""
    kind = torch.float32 if tensor.is_floating_point() else torch.int64
    if tensor.dtype == torch.float64 and tensor.dim() == 1:
        kind = torch.float64  # a code's shares need their digits
    array: Array = tensor.detach().cpu().reshape(-1).to(kind).numpy()
    return array


def _alphas_of(array: Array, most: int) -> list[float]:
    """Return the fewest magnitudes whose ternary planes add up to an array, bit for bit.

    Empty if there are none, or if one of them never stands alone, as in tensors of a few weights.
    """
    if array.dtype != np.float32:
        return []
    levels = np.unique(np.abs(array))
    if not np.isfinite(levels).all():
        return []
    magnitudes = levels[levels > 0][::-1]
    if not len(magnitudes):
        return [0.0]
    for planes in range(1, most + 1):
        if len(magnitudes) > (3**planes - 1) // 2:
            continue
        for alphas in permutations(magnitudes.tolist(), planes):
            if np.isin(magnitudes, list(_sums(alphas))).all():
                return list(alphas)
    return []


def _sums(alphas: Sequence[float]) -> dict[np.float32, tuple[int, ...]]:
    """Return the values that planes of these alphas add up to, and the signs that make each."""
    signs = list(product((0, 1, -1), repeat=len(alphas)))
    sums = planes_sum(alphas, np.array(signs, np.int8).T)
    return dict(zip(sums[::-1], signs[::-1], strict=True))  # zeros win where several signs do


def _planes_of(array: Array, alphas: Sequence[float]) -> Array:
    """Return each plane's signs: (planes, n)."""
    levels, where = np.unique(array, return_inverse=True)
    signs = _sums(alphas)
    return np.array([signs[level] for level in levels], np.int8).reshape(len(levels), -1)[where].T


def _to_bits(signs: Array) -> bytes:
    codes = (signs % 3).astype(np.uint8)  # -1 becomes 2
    codes = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    return bytes(np.bitwise_or.reduce(codes << np.array([0, 2, 4, 6], np.uint8), axis=1))
