"""Readers under mutation: any bytes end in samples or in the documented error, in bounded memory.

``python -m benchmarks.fuzz --minutes 5`` writes pictures of many forms and IDX files, changes them
at random, forged sizes with right checksums among them, and reads them. It ends with the number of
files and the memory that the worst took, or with the first exception that is no `DataError`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import random
import resource
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fl_wb.data.pictures import pixels_of
from fl_wb.data.readers import DataError, read_idx

FORMS = ("png", "jpg", "gif", "tif", "webp", "bmp", "tga", "ppm", "ico", "pcx", "sgi", "jp2", "dds")


def seeds() -> dict[str, bytes]:
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
                files[f"{kind}.{form}"] = file.getvalue()
    idx = bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 16, 16) + pixels.tobytes()
    return files | {"images-idx3-ubyte": idx, "images-idx3-ubyte.gz": gzip.compress(idx)}


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
    """Give a PNG or an IDX file other sizes, with all checksums right."""
    sizes = [rng.choice([1, 16, 4000, 30_000, 1 << 31, (1 << 32) - 1]) for _ in range(3)]
    if name.endswith("png"):
        header = b"IHDR" + struct.pack(">2I", *sizes[:2]) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if "idx" in name:
        plain = gzip.decompress(data) if name.endswith(".gz") else data
        plain = plain[:4] + struct.pack(">3I", *sizes) + plain[16:]
        return gzip.compress(plain) if name.endswith(".gz") else plain
    return mutated(data, rng)


def attack(folder: Path, rng: random.Random) -> Iterator[bool]:
    """Read one changed file after the other; yield whether it was read or refused.

    Raises
    ------
    Exception
        Whatever is no `DataError`.
    """
    sound = seeds()
    while True:
        name = rng.choice(list(sound))
        change = forged(name, sound[name], rng) if rng.random() < 0.2 else mutated(sound[name], rng)
        path = folder / name
        path.write_bytes(change)
        try:
            with warnings.catch_warnings(action="ignore"):
                if "idx" in name:
                    read_idx(path, ndim=(3, 4))
                else:
                    pixels_of(path)
            yield True
        except DataError:
            yield False


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
    files = accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        for was_read in attack(Path(folder), random.Random(arguments.seed)):
            files, accepted = files + 1, accepted + was_read
            if time.monotonic() > end:
                break
    print(
        f"{files} files: {accepted} read, {files - accepted} refused; "
        f"memory grew by {(memory() - before) / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
