"""The packed file: nothing damaged or forged gets through."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from fl_wb.ternary import (
    PackedFileError,
    load,
    unpack,
)
from fl_wb.ternary.numpy_reader import parse
from tests.packed import SHA, crafted, network, packed, parts, sealed, ternary
from tests.points import same

# files that are not what they should be


def test_an_error_names_the_file(tmp_path: Path):
    (tmp_path / "broken.tern").write_bytes(packed()[:-1])
    with pytest.raises(PackedFileError, match=r"broken\.tern: its checksum"):
        load(tmp_path / "broken.tern", network())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.tern", network())


def test_a_truncated_file_is_refused():
    for n in {*range(64), *range(0, len(packed()), 13), len(packed()) - 1}:
        with pytest.raises(PackedFileError):
            unpack(packed()[:n], network())


def test_an_altered_file_is_refused():
    rng = random.Random(0)
    for _ in range(500):
        data = bytearray(packed())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(PackedFileError):
            unpack(bytes(data), network())
    for data in (b"", b"FLWBTERN", rng.randbytes(500), packed() + b"\0", packed()[1:]):
        with pytest.raises(PackedFileError):
            unpack(data, network())


def test_another_version_is_named():
    body = packed()[:8] + struct.pack("<I", 4) + packed()[12:-SHA]
    with pytest.raises(PackedFileError, match=r"version 4; this program reads 1 to 3"):
        unpack(sealed(body), network())


def test_another_network_is_named():
    with pytest.raises(
        PackedFileError, match=r"another network: .* has shape \(8, 4\) in the file"
    ):
        unpack(packed(), network(width=12))
    with pytest.raises(PackedFileError, match="another network"):
        unpack(packed(), network(name="conv"))


# forged files: the checksum is right, the content is not


def test_a_file_with_random_bits_flipped_and_a_new_checksum_is_read_or_refused():
    # Bits of the payload are weights, which no reader can tell from right ones; nothing else.
    rng = random.Random(1)
    refused = 0
    for _ in range(500):
        body = bytearray(packed()[:-SHA])
        for _ in range(rng.choice([1, 1, 2, 8])):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        try:
            loaded = unpack(sealed(bytes(body)), network())
            assert [v.shape for v in loaded.state_dict().values()] == [
                v.shape for v in network().state_dict().values()
            ]
        except PackedFileError:
            refused += 1
    assert 100 < refused < 500


def test_a_file_cut_anywhere_with_a_new_checksum_is_refused():
    body = packed()[:-SHA]
    for n in {*range(40), *range(0, len(body), 11), len(body) - 1}:
        with pytest.raises(PackedFileError):
            unpack(sealed(body[:n]), network())
        with pytest.raises(PackedFileError):
            unpack(sealed(body + bytes(n + 1)), network())


HUGE = 10**4000
FIELDS: dict[str, list[object]] = {
    "alphas": [
        *([a] for a in (float("nan"), float("inf"), -float("inf"), 1e300, -1.0, HUGE, 1, True)),
        *([a] for a in (None, "1", [1.0], {})),
        *(None, 1.0, "1", {}, [], [1.0] * 2, [1.0] * 4, [1.0] * 10**5),
    ],
    "shape": [
        None,
        8,
        "84",
        {},
        [8],
        [4, 8],
        [-8, -4],
        [8.0, 4],
        [True, 32],
        [8, None],
        [[8], 4],
        [2**31, 2**31],
        [2**62, 4],
        [HUGE, HUGE],
        [0],
        [0, 2**62, 2**62],
        [8, 4] + [1] * 40,
        [2**39] * 32,
        [2**39] * 1000,
    ],
    "kind": [None, 1, "", "float64", "int8", "object", "Ternary", ["ternary"], {"a": 1}],
    "name": [None, 1, [], {}, "", "net", "\ud800", "x" * 100_000],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_forged_field_is_refused(field: str):
    missing = object()
    for value in [*FIELDS[field], missing]:
        header, payload = parts()
        entry = header["tensors"][0]
        assert entry["kind"] == "ternary" and entry["shape"] == [8, 4]
        entry[field] = value
        if value is missing:
            del entry[field]
        with pytest.raises(PackedFileError):
            unpack(crafted(header, payload), network())


def test_a_forged_header_is_refused():
    header, payload = parts()
    tensors = header["tensors"]
    good = json.dumps(header).encode()
    assert same(unpack(crafted(header, payload), network()), ternary())
    for forged in (
        b"",
        b"null",
        b"[]",
        b"\xff\xfe\xfd",
        b"{",
        good[:-1],
        good + b"x",
        b"[" * 100_000,
        b'{"tensors":' * 50_000,
        b'{"tensors": [{"name": "a", "shape": [1], "kind": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"tensors": [{"name": "a", "shape": [' + b"9" * 10_000 + b'], "kind": "float32"}]}',
        {},
        [header],
        {"tensors": None},
        {"tensors": {}},
        {"tensors": 5},
        {"tensors": "net"},
        {"tensors": [None]},
        {"tensors": [[]]},
        {"tensors": ["name"]},
        {"tensors": []},
        {"tensors": tensors[:-1]},
        {"tensors": tensors[1:]},
        {"tensors": tensors[::-1]},
        {"tensors": [*tensors, tensors[0]]},
        {"tensors": [*tensors, tensors[0] | {"shape": [0]}]},
        {"tensors": [*tensors, {"name": "more", "shape": [0], "kind": "float32"}]},
    ):
        with pytest.raises(PackedFileError):
            unpack(crafted(forged, payload), network())


def test_a_tensor_named_twice_is_refused():
    entry = {"name": "a", "shape": [2, 2], "kind": "ternary", "alphas": [1.0]}
    assert parse(crafted({"tensors": [entry]}, b"\x49"))[1]["a"].tolist() == [[1, -1], [0, 1]]
    with pytest.raises(PackedFileError, match="twice"):
        parse(crafted({"tensors": [entry, entry]}, b"\x49\x49"))


def test_a_code_that_is_no_weight_is_refused():
    entry = {"name": "a", "shape": [2, 2], "kind": "ternary", "alphas": [1.0]}
    with pytest.raises(PackedFileError, match="a holds a code"):
        parse(crafted({"tensors": [entry]}, b"\xc0"))


def test_a_lying_header_length_is_refused():
    body = bytearray(packed()[:-SHA])
    (length,) = struct.unpack_from("<I", body, 12)
    for lie in (0, 1, length - 1, length + 1, len(body), 2**31, 2**32 - 1):
        struct.pack_into("<I", body, 12, lie)
        with pytest.raises(PackedFileError):
            unpack(sealed(bytes(body)), network())


@pytest.mark.parametrize(
    "shape", [[2**20, 2**19], [2**39], [2**39] * 30, [0, 2**62]], ids=["2T", "big", "huge", "zero"]
)
@pytest.mark.parametrize("kind", ["ternary", "float32", "float64", "int64"])
def test_declared_sizes_cost_no_memory(kind: str, shape: list[int]):
    data = crafted(
        {"tensors": [{"name": "a", "shape": shape, "kind": kind, "alphas": [1.0]}]}, b"abc"
    )
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError):
            parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
