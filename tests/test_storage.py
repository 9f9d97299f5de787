"""State on disk: whole or not at all, and named by what is in it."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_wb.persistence.tensor_files import (
    StorageError,
    digest,
    load_tensors,
    save_tensors,
    write_atomic,
)

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "counter": torch.tensor(5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


def test_write_makes_folders_and_replaces(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_open_to_whom_the_umask_lets(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_text_come_back(tmp_path: Path):
    path = tmp_path / "state.safetensors"

    save_tensors(path, STATE, {"t": "0.5"})
    tensors, metadata = load_tensors(path)

    assert metadata == {"t": "0.5"}
    assert tensors.keys() == STATE.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == STATE[name].dtype and tensor.equal(STATE[name])


def test_tied_weights_are_saved(tmp_path: Path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    save_tensors(tmp_path / "tied", {"encoder": weight, "decoder": weight})
    tensors, _ = load_tensors(tmp_path / "tied")
    assert tensors["encoder"].equal(weight) and tensors["decoder"].equal(weight)


def test_a_damaged_file_is_a_storage_error(tmp_path: Path):
    path = tmp_path / "state"
    save_tensors(path, STATE)
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [rng.randbytes(n) for n in (1, 8, 100)]
    damaged += [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(8, len(whole))]
    damaged += [whole + b"more", pickle.dumps({"weight": 1}), b"\xff" * 100]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(StorageError, match="state is damaged"):
            load_tensors(path)


def test_a_missing_file_is_told_apart_from_a_damaged_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing")


def test_digest_does_not_depend_on_order_layout_or_graph():
    reordered = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in reversed(STATE.items())
    }
    reordered["weight"].requires_grad_(True)
    assert digest(reordered) == digest(STATE)
    assert len(digest({})) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0, 0, 0, -0.0])},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ],
    ids=["name", "shape", "dtype", "bytes", "more"],
)
def test_digest_tells_states_apart(changed: dict[str, Tensor]):
    assert digest(changed) != digest({"a": torch.zeros(4)})
