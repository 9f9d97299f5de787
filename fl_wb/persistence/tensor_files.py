"""State on disk: written atomically, as safetensors, named by what is in it; never pickled."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

CHECKSUM = "sha256"


class StorageError(ValueError):
    """A file of saved state is damaged or is not one of ours."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:  # not by tempfile, whose files are the user's alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save named tensors, text beside them and a checksum of both as one safetensors file."""
    # cloned, because safetensors refuses tensors that share memory, as tied weights do
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    said = dict(metadata or {})
    write_atomic(path, to_safetensors(plain, {**said, CHECKSUM: _checksum(plain, said)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load what `save_tensors` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    StorageError
        If the file is damaged: no safetensors file, or one whose checksum is missing or wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise StorageError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.pop(CHECKSUM, None) != _checksum(tensors, metadata):
        raise StorageError(f"{path} is damaged or not one of ours: its checksum is another")
    return tensors, metadata


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: names, dtypes, shapes and bytes, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def fingerprint(network: nn.Module, inputs: Tensor) -> str:
    """SHA-256 (hex) of a network: its state, and what its code makes of these inputs."""
    with torch.no_grad():
        does: Tensor = network(inputs)
    return digest({**network.state_dict(), "does": does})


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    whole = digest(tensors) + json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    # view(uint8) keeps bfloat16 and other types that numpy does not have
    flat: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.tobytes()
