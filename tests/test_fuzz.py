"""Bytes from strangers: mutated at random, they end in the documented error and little memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from fl_wb.generators.networks import MLPGenerator
from fl_wb.messages import records
from fl_wb.ternary import numpy_reader, packing, ternarize

ROUNDS = 2000  # of seeded mutations, each
SLACK = 2_000_000  # bytes beside a small multiple of the input
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def packed() -> bytes:
    torch.manual_seed(0)
    return packing.pack(ternarize(MLPGenerator((1, 4, 4), 4, 8), iterations=1))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        kind = rng.randrange(4)
        if kind == 0 and changed:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 40)]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = rng.choice([b"9" * 30, b"-1", b"[", b'"', b"\0\0\0\0", b"1e999"])
    return bytes(changed)


def signed(data: bytes) -> bytes:
    """Make the checksum right, so that what lies behind it is reached."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def read(data: bytes) -> None:
    """Read bytes; the documented error is all that may come of it."""
    with contextlib.suppress(numpy_reader.PackedFileError):
        numpy_reader.parse(data)


def bounded(act: Callable[[], None], limit: int) -> None:
    """Assert that something takes no more memory than that, at any time."""
    tracemalloc.start()
    try:
        act()
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_mutated_packed_files_are_refused(packed: bytes) -> None:
    rng = random.Random(0)
    changed = [mutated(packed, rng) for _ in range(ROUNDS)]

    def act() -> None:
        for data in changed:
            read(data)
            read(signed(data))

    bounded(act, 20 * len(packed) + SLACK)


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_behind_a_packed_files_beginning(data: bytes) -> None:
    read(data)
    read(signed(numpy_reader.MAGIC + b"\1\0\0\0" + data + bytes(32)))


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@QUICK
@given(
    name=HEADERS, shape=HEADERS, kind=st.sampled_from(["ternary", "float32", "int64"]) | HEADERS,
    alpha=HEADERS, payload=st.binary(max_size=64),
)  # fmt: skip
def test_any_header_of_a_packed_file(
    name: object, shape: object, kind: object, alpha: object, payload: bytes
) -> None:
    entry = {"name": name, "shape": shape, "kind": kind, "alpha": alpha}
    header = json.dumps({"network": "x", "tensors": [entry]}).encode()
    prefix = numpy_reader.MAGIC + (1).to_bytes(4, "little") + len(header).to_bytes(4, "little")
    read(signed(prefix + header + payload + bytes(32)))


TEMPLATE = {"w": torch.zeros(3, 5), "n": torch.zeros((), dtype=torch.int64)}


def validate(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (3, 5)) -> None:
    count = Array(np.array(1))
    record = ArrayRecord({"w": Array(dtype, shape, "numpy.ndarray", data), "n": count})
    try:
        state = records.validate(record, TEMPLATE)
    except records.InvalidUpload:
        return
    assert {name: (v.shape, v.dtype) for name, v in state.items()} == {
        name: (v.shape, v.dtype) for name, v in TEMPLATE.items()
    }
    assert all(bool(v.isfinite().all()) for v in state.values())


def test_mutated_uploads_are_refused_or_harmless() -> None:
    rng = random.Random(1)
    data = Array(np.ones((3, 5), np.float32)).data
    changed = [mutated(data, rng) for _ in range(ROUNDS)]

    def act() -> None:
        for upload in changed:
            validate(upload)

    bounded(act, 20 * len(data) + SLACK)


@QUICK
@given(st.binary(max_size=300), st.text(max_size=12), st.lists(st.integers(0, 2**40), max_size=9))
def test_any_upload(data: bytes, dtype: str, shape: list[int]) -> None:
    validate(data)
    validate(b"\x93NUMPY\1\0" + data, dtype)
    validate(data, dtype, tuple(shape))


def test_mutated_files_of_all_forms_are_read_or_refused(tmp_path: Path) -> None:
    for name, data in fuzz.seeds(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        assert fuzz.read(tmp_path / name) or name.startswith("deep-"), name
    before = fuzz.memory()
    outcomes = dict.fromkeys(islice(fuzz.attack(tmp_path, random.Random(2)), 1500))
    refused = {name for name, was_read in outcomes if not was_read}
    assert {"packed-tern", "stage-safetensors", "upload-npy", "images-idx3-ubyte"} < refused
    assert len({name for name, was_read in outcomes if was_read}) > 20
    assert fuzz.memory() - before < 600e6


def test_bombs_take_no_more_than_is_said() -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--minutes", "0"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "5792-png of" in found and "bytes: read;" in found
    assert "22000-png of" in found and found.count("bytes: refused;") == 2
