"""Readers under mutation: any bytes end in samples or in the documented error, in bounded memory.

``python -m benchmarks.fuzz --minutes 5`` writes pictures of many forms, IDX files, stages on disk
(safetensors), packed ternary generators and uploaded arrays (.npy), changes them at random, forged
sizes with right checksums among them, and reads them; first of all bombs, small files that unpack
to gigabytes or to the most that is allowed. It ends with the number of files and the memory that
the worst took, or with the first exception that is not the reader's documented one; it fails where
that memory is more than `MOST`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from PIL import Image

from fl_wb.data.pictures import MOST_PIXELS, pixels_of
from fl_wb.data.readers import DataError, read_idx
from fl_wb.generators.networks import MLPGenerator
from fl_wb.messages import records
from fl_wb.persistence.tensor_files import StorageError, load_tensors, save_tensors
from fl_wb.ternary import PackedFileError, numpy_reader, packing, ternarize

MOST = 1e9
"""Bytes. A transparent picture of as many pixels as are allowed takes 0.8e9."""

FORMS = ("png", "jpg", "gif", "tif", "webp", "bmp", "tga", "ppm", "ico", "pcx", "sgi", "jp2", "dds")


def generator() -> MLPGenerator:
    """Make a tiny generator."""
    torch.manual_seed(0)
    return MLPGenerator((1, 4, 4), 4, 8)


def read_packed(path: Path) -> None:
    """Read a packed file by both readers, which must agree on whether they do."""
    numpy_reader.parse(path.read_bytes())
    packing.load(path, generator())


def read_upload(path: Path) -> None:
    """Read the bytes of an array as the server does."""
    array = Array("float32", (3, 5), "numpy.ndarray", path.read_bytes())
    records.validate(ArrayRecord({"w": array}), {"w": torch.zeros(3, 5)})


def read_images(path: Path) -> None:
    """Read an IDX file of images."""
    read_idx(path, ndim=(3, 4))


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "idx3-ubyte": (read_images, DataError),
    "idx3-ubyte.gz": (read_images, DataError),
    "safetensors": (load_tensors, StorageError),
    "tern": (read_packed, PackedFileError),
    "npy": (read_upload, records.InvalidUpload),
}
"""What reads files of an ending, and the error that it documents; all others are pictures."""


def read(path: Path) -> bool:
    """Return whether a file was read, or refused as is documented."""
    reader, refusal = READERS.get(path.name.split("-", 1)[1], (pixels_of, DataError))
    try:
        with warnings.catch_warnings(action="ignore"):
            reader(path)
    except refusal:
        return False
    return True


def seeds(folder: Path) -> dict[str, bytes]:
    """Return the content of sound files, by a name for each."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 4)).astype(np.uint8)
    images = {
        "rgb": Image.fromarray(pixels[..., :3]),
        "rgba": Image.fromarray(pixels),
        "grey": Image.fromarray(pixels[..., 0]),
        "palette": Image.fromarray(pixels[..., :3]).quantize(16),
        "deep": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    }
    files = {}
    for form in FORMS:
        for kind, image in images.items():
            file = io.BytesIO()
            with contextlib.suppress(Exception):  # not every form holds every kind
                image.save(file, Image.registered_extensions()[f".{form}"])
                files[f"{kind}-{form}"] = file.getvalue()
    idx = bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 16, 16) + pixels.tobytes()
    save_tensors(folder / "stage", generator().state_dict(), {"settings": "{}"})
    return files | {
        "images-idx3-ubyte": idx,
        "images-idx3-ubyte.gz": gzip.compress(idx),
        "stage-safetensors": (folder / "stage").read_bytes(),
        "packed-tern": packing.pack(ternarize(generator(), iterations=1)),
        "upload-npy": Array(np.ones((3, 5), np.float32)).data,
    }


def bombs(folder: Path) -> Iterator[Path]:
    """Write small files that unpack to much: within what is allowed, and beyond it."""
    side = int(MOST_PIXELS**0.5)
    for size in ((side, side), (22_000, 11_000)):
        path = folder / f"{size[0]}-png"
        path.write_bytes(blank_png(*size))
        yield path
    packed = folder / "images-idx3-ubyte.gz"
    zeros = gzip.compress(bytes(1 << 20), 1)  # once: a gzip file may be many, one behind the other
    with packed.open("wb") as file:
        file.write(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1 << 31, 1, 1)))
        for _ in range(1 << 11):
            file.write(zeros)
    yield packed


def blank_png(width: int, height: int) -> bytes:
    """Return a PNG of one transparent colour, packed row by row: it is never unpacked here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    row, checksum = bytes([0]) + bytes([3, 4, 5, 6]) * width, 1
    for _ in range(height):
        checksum = zlib.adler32(row, checksum)
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(row) + packer.flush(zlib.Z_FULL_FLUSH)  # all rows are packed alike
    data = b"\x78\xda" + packed * height + packer.flush() + struct.pack(">I", checksum)
    header = struct.pack(">2I5B", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes, near the beginning more often than elsewhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(changed), rng.choice([64, 1 << 20])) or 1)
        size = rng.randint(1, 8)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at : at + size] = rng.choice([b"\xff", b"\0", b"\x7f"]) * size
            case 2:
                del changed[at : at + size * 8]
            case 3:
                changed[at:at] = changed[at : at + size * 8]
            case 4:
                changed[at:at] = rng.randbytes(size)
    return bytes(changed)


def forged(name: str, data: bytes, rng: random.Random) -> bytes:
    """Give a PNG or an IDX file other sizes, a packed file any change, with all checksums right."""
    sizes = [rng.choice([1, 16, 4000, 30_000, 1 << 31, (1 << 32) - 1]) for _ in range(3)]
    if name.endswith("png"):
        header = b"IHDR" + struct.pack(">2I", *sizes[:2]) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if "idx" in name:
        plain = gzip.decompress(data) if name.endswith(".gz") else data
        plain = plain[:4] + struct.pack(">3I", *sizes) + plain[16:]
        return gzip.compress(plain) if name.endswith(".gz") else plain
    if name.endswith("tern"):
        changed = mutated(data[:-32], rng)
        return changed + hashlib.sha256(changed).digest()
    return mutated(data, rng)


def attack(folder: Path, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Read one changed file after the other; yield its name, and whether it was read or refused.

    Raises
    ------
    Exception
        Whatever its reader does not document.
    """
    sound = seeds(folder)
    while True:
        pictures = rng.random() < 0.5
        name = rng.choice([name for name in sound if (name.split("-", 1)[1] in FORMS) == pictures])
        change = forged(name, sound[name], rng) if rng.random() < 0.2 else mutated(sound[name], rng)
        path = folder / name
        path.write_bytes(change)
        yield name, read(path)


def memory() -> int:
    """Return the most bytes that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the command line interface."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, before = time.monotonic() + 60 * arguments.minutes, memory()
    files: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for path in bombs(Path(folder)):
            size, was_read = path.stat().st_size, "read" if read(path) else "refused"
            grown = (memory() - before) / 1e6
            print(f"{path.name} of {size} bytes: {was_read}; memory grew by {grown:.0f} MB so far")
        for name, was_read in attack(Path(folder), random.Random(arguments.seed)):
            kind = name.split("-", 1)[1]
            files["picture" if kind in FORMS else kind, was_read] += 1
            if time.monotonic() > end:
                break
    for kind in sorted({kind for kind, _ in files}):
        print(f"{kind}: {files[kind, True]} read, {files[kind, False]} refused")
    grown = memory() - before
    print(f"{files.total()} files; memory grew by {grown / 1e6:.0f} MB")
    sys.exit(grown > MOST)


if __name__ == "__main__":
    main()
